"""`perdure ledger verify`: damaged lines, missing parts and rolled-back ledgers."""

import json
import shutil
from pathlib import Path

import pytest

from helpers.command_line import assert_refused
from helpers.learners import change_facts
from helpers.ledger_cli import ARMS, KEY, shown
from perdure.errors import LedgerError
from perdure.experiment.results import ledger_files
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.ledger.merged import Merged, read
from perdure.privacy.ledger.storage import SealedHead, head_path, link
from perdure.privacy.noise.key import NoiseKey

# --------------------------------------------------------------------------- verify


def test_verify_prints_each_ledger_and_what_is_not_verified(perdure, either):
    out = shown(perdure("verify", either))
    own = sorted(either.glob("arms/*/**/ledger.jsonl"))
    *lines, last = out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        str(path) for path in (either / "ledger.jsonl", *own)
    ]
    count = {path: len(path.read_text().splitlines()) for path in own}
    assert lines[0].startswith(
        f"{either / 'ledger.jsonl'}: {len(own)} ledgers, {sum(count.values())} lines; "
    )
    for path, line in zip(own, lines[1:], strict=True):
        assert line.startswith(
            f"{path}: {count[path]} lines; chain verified, head verified with its key"
        )
    assert last.startswith(
        "not covered: anyone who can write here could restore an older ledger together"
    )


def spoilt(lines, how):
    """Return the lines after a change, and the number of the first wrong line."""
    changed = list(lines)
    if how == "edited":
        changed[3] = lines[3].replace('"steps":4', '"steps":3')
    elif how == "reordered":
        changed[3] = lines[4]
        changed[4] = lines[3]
    elif how == "cut out":
        del changed[3]
    elif how == "inserted":
        changed.insert(3, lines[2])
    elif how == "shortened":
        del changed[-1]
    assert changed != lines
    return changed, len(lines) if how == "shortened" else 4


@pytest.mark.parametrize("how", ["edited", "reordered", "cut out", "inserted", "shortened"])
def test_verify_names_the_file_and_line_of_a_changed_ledger(perdure, mine, how):
    path = mine / "arms" / "ewc-private" / "ledger.jsonl"
    before = path.read_text().splitlines()
    lines, number = spoilt(before, how)
    path.write_text("".join(f"{line}\n" for line in lines))
    code, out, err = perdure("verify", mine)
    assert (code, err) == (1, "")
    (wrong,) = [line for line in out.splitlines() if line.startswith("WRONG: ")]
    assert wrong.startswith(f"WRONG: {path}, line {number}: ")
    # the others are checked all the same
    assert f"{mine / 'arms' / 'replay-private' / 'ledger.jsonl'}: " in out

    assert_refused(perdure("show", path.parent), f"{path}, line {number}: ")


@pytest.mark.parametrize("how", ["edited", "reordered", "cut out", "inserted", "shortened", "torn"])
def test_verify_checks_every_line_of_the_merged_ledger(perdure, mine, how):
    path = mine / "ledger.jsonl"
    title, head, *chain = path.read_text().splitlines()
    count = json.loads(head)["count"]
    if how == "torn":
        text = path.read_text()[:-9]
        number = len(chain)
    else:
        own, number = spoilt(chain[:count], how)
        text = "".join(f"{line}\n" for line in (title, head, *own, *chain[count:]))
    path.write_text(text)
    code, out, _ = perdure("verify", mine)
    assert code == 1
    (wrong,) = [line for line in out.splitlines() if line.startswith("WRONG: ")]
    assert wrong.startswith(f"WRONG: {path}, line {number + 2}: ")


def test_verify_ignores_an_incomplete_line_after_sealed_lines(perdure, mine):
    path = mine / "arms" / "ewc-private" / "ledger.jsonl"
    with path.open("a") as file:
        file.write('{"kind":"entry","torn')
    out = shown(perdure("verify", mine))
    assert (
        f"{path}: 7 lines; chain verified, head verified with its key; 21 bytes after "
        "the last line that the head covers do not count" in out
    )


@pytest.mark.parametrize("name", ["ledger.jsonl", "ledger.head.json"])
def test_verify_reports_a_missing_ledger_or_head_file(perdure, mine, name):
    (mine / "arms" / "ewc-private" / name).unlink()
    code, out, _ = perdure("verify", mine)
    assert code == 1
    told = {
        "ledger.jsonl": "ledger.jsonl, line 1: the line is missing",
        "ledger.head.json": "line 1: the file is not an exported ledger",
    }
    assert f"WRONG: {mine / 'arms' / 'ewc-private'}/" in out and told[name] in out


def test_a_rewritten_ledger_is_detected_only_with_the_key(perdure, mine):
    path = mine / "arms" / "ewc-private" / "ledger.jsonl"
    last = "0" * 64
    lines = []
    for line in path.read_text().splitlines():
        body = {
            name: value for name, value in json.loads(line).items() if name not in ("prev", "hash")
        }
        if body["kind"] == "entry":
            body["noise_multiplier"] = 99.0
        new, last = link(body, last)
        lines.append(new)
    path.write_text("".join(f"{line}\n" for line in lines))
    head_path(path).write_text(SealedHead(len(lines), last, "0" * 64).text())
    (mine / "ledger.jsonl").unlink()
    code, out, _ = perdure("verify", mine)
    assert (
        code == 1 and f"WRONG: {head_path(path)}: the MAC of the head does not fit this key" in out
    )

    (path.parent / "private" / "key").unlink()
    code, out, _ = perdure("verify", mine)
    assert (
        code == 1 and f"WRONG: {path}, line 7: this is not the line recorded by checkpoint" in out
    )
    shutil.rmtree(path.parent / "checkpoint")
    (path.parent / "private" / "ledger.head.json").unlink()
    code, out, err = perdure("verify", mine)
    assert (code, err) == (3, "")
    assert (
        f"{path}: 7 lines; chain verified, head not verified, because its key is missing: "
        "the whole history could be forged" in out
    )
    assert "NOT VERIFIED: 1 of 2 heads, because their keys are missing" in out
    assert (
        "chains verified; 1 of 2 heads verified with their keys, the others not verified"
        in shown(perdure("show", mine))
    )


def test_verify_reports_heads_without_keys_as_not_verified(perdure, mine, tmp_path):
    """Without `private/`, the writer of the files could have invented all of them."""
    sent = tmp_path / "sent.jsonl"
    shutil.copy(mine / "ledger.jsonl", sent)
    code, out, _ = perdure("verify", sent)
    assert code == 3 and "NOT VERIFIED: 2 of 2 heads" in out and "WRONG" not in out
    for arm in ARMS:
        shutil.rmtree(mine / "arms" / arm / "private")
        shutil.rmtree(mine / "arms" / arm / "checkpoint")
    code, out, _ = perdure("verify", mine)
    assert code == 3 and "NOT VERIFIED: 4 of 4 heads" in out and "WRONG" not in out


def test_show_prints_that_stored_heads_were_not_compared(perdure, alone):
    assert "not compared with checkpoints and recorded heads" in shown(perdure("show", alone))


def test_verify_reports_a_wrong_key_and_a_key_others_can_read(perdure, mine):
    keys = [mine / "arms" / arm / "private" / "key" for arm in ARMS]
    keys[0].write_bytes(keys[1].read_bytes())
    code, out, _ = perdure("verify", mine)
    # of the arm's ledger and its copy
    assert code == 1 and out.count("the MAC of the head does not fit this key") == 2
    assert_refused(perdure("show", mine), "the MAC of the head does not fit this key")
    keys[0].chmod(0o644)
    code, out, _ = perdure("verify", mine)
    assert code == 1 and "has mode 0644, allowed: 0600" in out


def test_verify_reports_a_simulated_ledger_of_another_seed(perdure, federated, tmp_path):
    shutil.copytree(federated, tmp_path / "run")
    path = tmp_path / "run" / "config.toml"
    path.write_text(path.read_text().replace("seed = 3", "seed = 4"))
    code, out, _ = perdure("verify", tmp_path / "run")
    assert code == 1 and out.count("the MAC of the head does not fit this key") == 5


def test_verify_reports_a_ledger_older_than_the_merged_ledger(perdure, mine, monkeypatch):
    path = mine / "arms" / "ewc-private" / "ledger.jsonl"
    key = NoiseKey.from_os(path.parent / "private" / "key")
    lines = path.read_text().splitlines()[:-1]
    path.write_text("".join(f"{line}\n" for line in lines))
    head_path(path).write_text(
        SealedHead.seal(len(lines), json.loads(lines[-1])["hash"], key).text()
    )
    # put back with all that knows of it, nothing is there to compare it with: as the last line says
    monkeypatch.setenv("PERDURE_STATE", "off")
    shutil.rmtree(path.parent / "checkpoint")
    (path.parent / "private" / "ledger.head.json").unlink()
    assert perdure("verify", path)[0] == 0
    code, out, _ = perdure("verify", mine)
    assert code == 1
    merged = mine / "ledger.jsonl"
    assert f"WRONG: {path} differs from the ledger of 'ewc-private/client-0' in {merged}" in out


def test_verify_accepts_an_empty_ledger(perdure, tmp_path):
    class Stopped(BaseException):
        pass

    def stop(point):
        raise Stopped

    with pytest.raises(Stopped):
        Ledger.open(tmp_path / "ledger.jsonl", key=KEY, trace=stop)
    assert "ledger.jsonl: 0 lines; nothing was charged yet" in shown(perdure("verify", tmp_path))
    assert "epsilon 0.00" in shown(perdure("show", tmp_path))


# ---------------------------------------------------------------- ledgers that are gone altogether


@pytest.fixture
def ours(federated, tmp_path):
    """Return a copy of the finished federated run that a test may damage."""
    shutil.copytree(federated, tmp_path / "run")
    return tmp_path / "run"


def test_verify_reports_a_missing_client_folder(perdure, ours):
    """The client's folder is deleted completely, so no file in it shows the loss."""
    arm = ours / "arms" / "ewc-private"
    (ours / "result.json").unlink()
    (ours / "ledger.jsonl").unlink()
    (arm / "arm.json").unlink()
    code, whole, _ = perdure("verify", ours)
    assert code == 0 and "WRONG" not in whole
    shutil.rmtree(arm / "clients" / "000")
    for asked in (ours, arm):
        code, out, _ = perdure("verify", asked)
        lines = [line for line in out.splitlines() if line.startswith("WRONG")]
        assert code == 1 and len(lines) == 1
        assert "ewc-private/clients/000/ledger.jsonl is missing, but the checkpoint of" in lines[0]
    code, out, _ = perdure("verify", arm / "clients" / "001")
    assert code == 0


def test_show_states_no_epsilon_when_a_ledger_is_missing(perdure, ours):
    shutil.rmtree(ours / "arms" / "ewc-private" / "clients" / "000")
    code, out, _ = perdure("show", ours)
    assert code == 0 and "worst partition by itself: epsilon" in out, "the merged file is whole"
    (ours / "ledger.jsonl").unlink()
    code, out, _ = perdure("show", ours)
    assert code == 1 and "worst partition" not in out and "all arms together" not in out
    assert "3 of 4 ledgers are there; missing: " in out
    assert "no epsilon is stated for the run" in out
    code, out, _ = perdure("show", ours, "--json")
    facts = json.loads(out)
    assert code == 1 and facts["statement"] is None and facts["all_arms_together"] is None
    assert [Path(path).parent.name for path in facts["missing"]] == ["000"]
    code, out, _ = perdure("show", ours, "--arm", "replay-private")
    assert code == 0 and "worst partition by itself: epsilon" in out and "3 of 4 ledgers" in out


def test_verify_reports_a_ledger_missing_in_the_merged_file(perdure, ours):
    own = [part for part in read(ours / "ledger.jsonl").parts if "ewc" not in part.account.owner]
    Merged(own).export(ours / "ledger.jsonl")
    code, out, _ = perdure("verify", ours)
    assert code == 1 and "the ledger of 'ewc-private/client-0' in the merged file is missing" in out
    code, out, _ = perdure("show", ours)
    assert code == 1 and "2 of 4 ledgers are there" in out


def test_verify_reports_a_client_ledger_behind_the_server(perdure, ours):
    arm = ours / "arms" / "ewc-private"
    newest = max((arm / "checkpoint").glob("0*.json"))
    facts = json.loads(newest.read_text())
    head = json.loads(facts["heads"]["1"])
    forged = json.dumps(head | {"count": head["count"] + 1}, separators=(",", ":"))
    change_facts(newest, heads=facts["heads"] | {"1": forged})
    code, out, _ = perdure("verify", ours)
    assert code == 1
    assert "clients/001/ledger.jsonl holds" in out
    assert f"but the checkpoint of the federation's server records {head['count'] + 1}" in out


def test_ledger_files_refuses_a_folder_with_a_missing_client(ours):
    arm = ours / "arms" / "ewc-private"
    assert len(ledger_files(arm)) == 2
    shutil.rmtree(arm / "clients" / "001")
    with pytest.raises(LedgerError, match=r"clients/001/ledger.jsonl missing, but a checkpoint"):
        ledger_files(arm)


def test_verify_reports_a_checkpoint_without_its_ledger(perdure, mine):
    (mine / "ledger.jsonl").unlink()
    folder = mine / "arms" / "ewc-private"
    for path in (folder / "ledger.jsonl", folder / "ledger.head.json"):
        path.unlink()
    shutil.rmtree(folder / "private")
    code, out, _ = perdure("verify", mine)
    assert code == 1 and "ewc-private/ledger.jsonl is missing, but" in out
    code, out, _ = perdure("show", mine)
    assert code == 1 and "1 of 2 ledgers are there" in out
