"""Heads of ledgers that a privacy officer keeps, and ledgers that are older than their heads."""

import shutil

import pytest

from helpers.command_line import assert_refused
from helpers.ledger_cli import ARMS, shown


def heads(perdure, run):
    return shown(perdure("head", run)).splitlines()


def test_head_prints_one_line_per_ledger(perdure, either):
    lines = heads(perdure, either)
    own = sorted(either.glob("arms/*/**/ledger.jsonl"))
    assert len(lines) == len(own)
    for line in lines:
        owner, _, rest = line.partition("@")
        count, digest, mac = rest.split(":")
        assert owner.split("/")[0] in ARMS and int(count) > 2
        assert len(digest) == len(mac) == 64 and " " not in line


def test_verify_accepts_a_ledger_that_matches_its_head(perdure, either):
    lines = heads(perdure, either)
    out = shown(perdure("verify", either, "--at-least", "\n".join(lines)))
    assert "WRONG" not in out
    shown(perdure("verify", either, "--at-least", lines[0], "--at-least", lines[-1]))


def older(folder, perdure):
    """Remove the last line of an arm's ledger; return the arm's folder and the head that covered
    the line.
    """
    from perdure.privacy.ledger.storage import SealedHead, head_path, load
    from perdure.privacy.noise.key import NoiseKey

    arm = folder / "arms" / "ewc-private"
    (line,) = heads(perdure, arm)
    path = arm / "ledger.jsonl"
    key = NoiseKey.from_os(arm / "private" / "key")
    lines, _, _ = load(path, key)
    path.write_text("".join(f"{each}\n" for each in lines[:-1]))
    import json

    last = json.loads(lines[-2])["hash"]
    head_path(path).write_text(SealedHead.seal(len(lines) - 1, last, key).text())
    return arm, line


def test_verify_compares_a_shortened_ledger_with_every_head(perdure, mine, monkeypatch):
    arm, line = older(mine, perdure)
    code, out, _ = perdure("verify", arm, "--at-least", line)
    wrong = [each for each in out.splitlines() if each.startswith("WRONG: ")]
    assert code == 1
    for place in ("the head given with --at-least", "checkpoint 00", "private/ledger.head.json"):
        assert any(f"{place}" in each and "are missing" in each for each in wrong), place
    assert any("state" in each and ".head.json records" in each for each in wrong)
    monkeypatch.setenv("PERDURE_STATE", "off")
    shutil.rmtree(arm / "checkpoint")
    (arm / "private" / "ledger.head.json").unlink()
    # a rollback of all that lies in the folder shows against the officer's record only
    assert perdure("verify", arm)[0] == 0
    code, out, _ = perdure("verify", arm, "--at-least", line)
    assert code == 1 and "the head given with --at-least records" in out


def test_verify_reports_a_ledger_with_as_many_but_other_lines(perdure, mine):
    line = heads(perdure, mine / "arms" / "ewc-private")[0]
    owner, _, rest = line.partition("@")
    count, digest, mac = rest.split(":")
    other = f"{owner}@{count}:{digest[::-1]}:{mac}"
    code, out, _ = perdure("verify", mine, "--at-least", other)
    assert code == 1 and "does not fit this key" in out
    (mine / "arms" / "ewc-private" / "private" / "key").unlink()
    code, out, _ = perdure("verify", mine, "--at-least", other)
    assert code == 1 and "not the line recorded by the head given with --at-least" in out


def test_verify_reports_a_head_without_its_ledger(perdure, mine):
    lines = heads(perdure, mine)
    (mine / "ledger.jsonl").unlink()
    shutil.rmtree(mine / "arms" / "replay-private")
    code, out, _ = perdure("verify", mine, "--at-least", "\n".join(lines))
    assert code == 1 and "there is no ledger of 'replay-private/client-0'" in out


def test_verify_reports_a_ledger_deleted_with_its_head(perdure, mine):
    arm = mine / "arms" / "ewc-private"
    for name in ("ledger.jsonl", "ledger.head.json"):
        (arm / name).unlink()
    (mine / "ledger.jsonl").unlink()
    code, out, _ = perdure("verify", mine)
    assert code == 1 and "ledger.jsonl is missing, but" in out


@pytest.mark.parametrize("text", ["7", "curator@7", "curator@x:00:00", "a@1:" + "g" * 64])
def test_verify_refuses_an_invalid_head_argument(perdure, alone, text):
    assert_refused(
        perdure("verify", alone, "--at-least", text), "--at-least", "perdure ledger head"
    )


@pytest.mark.parametrize("how", ["shorter", "missing", "edited"])
def test_verify_reports_a_changed_log_of_noise_draws(perdure, mine, how):
    log = mine / "arms" / "ewc-private" / "private" / "draws.jsonl"
    data = log.read_bytes()
    if how == "missing":
        log.unlink()
    else:
        shorter = b"".join(data.splitlines(keepends=True)[:-1])
        log.write_bytes(shorter if how == "shorter" else data.replace(b"open", b"shut", 1))
    code, out, _ = perdure("verify", mine)
    (wrong,) = [each for each in out.splitlines() if each.startswith("WRONG: ")]
    told = "line 1 is damaged or edited" if how == "edited" else "is missing, or does not continue"
    assert code == 1 and str(log) in wrong and told in wrong
