"""The log of noise draws: equal sums get the same noise, other sums are charged again."""

import os
import stat

import numpy as np
import pytest

from perdure.errors import LedgerError, PrivacyError
from perdure.privacy.noise.draw_lines import read_lines
from perdure.privacy.noise.draw_log import DrawLog
from perdure.privacy.noise.key import NoiseKey
from perdure.utils.folder_lock import FolderLock

SUM = np.array([1, 2, 3])
OTHER = np.array([1, 2, 4])


@pytest.fixture
def key():
    return NoiseKey(bytes(range(32)), simulated=False)


def test_an_equal_sum_gets_the_nonce_of_its_first_draw(tmp_path, key):
    log = DrawLog(tmp_path / "draws.jsonl", key, "boot 1")
    log.open("e")
    first = log.nonce_for("gradient", "e", 0, SUM)
    later = DrawLog(tmp_path / "draws.jsonl", key, "boot 1")
    assert later.nonce != log.nonce
    assert later.nonce_for("gradient", "e", 0, SUM) == first
    assert later.nonce_for("gradient", "e", 1, SUM) == later.nonce


def test_a_different_sum_gets_no_nonce_and_writes_no_line(tmp_path, key):
    log = DrawLog(tmp_path / "draws.jsonl", key, "boot 1")
    log.open("e")
    log.nonce_for("gradient", "e", 0, SUM)
    before = (tmp_path / "draws.jsonl").read_bytes()
    assert log.nonce_for("gradient", "e", 0, OTHER) is None
    assert (tmp_path / "draws.jsonl").read_bytes() == before


def test_a_draw_is_logged_before_its_nonce_is_given(tmp_path, key):
    path = tmp_path / "draws.jsonl"
    log = DrawLog(path, key, "boot 1")
    log.open("e")
    log.nonce_for("gradient", "e", 0, SUM)
    assert log.nonce in path.read_text() and path.read_bytes().endswith(b"\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("boot", "closed", "seen"),
    [
        ("boot 1", False, False),  # a killed process loses no line
        ("boot 2", False, True),  # a stopped machine may
        ("", False, True),  # unknown counts as another boot
        ("boot 2", True, False),  # closed: all lines were synced
    ],
)
def test_an_open_log_entry_counts_as_drawn_after_a_reboot(tmp_path, key, boot, closed, seen):
    log = DrawLog(tmp_path / "draws.jsonl", key, "boot 1")
    log.open("e")
    assert not log.seen("e")
    if closed:
        log.close("e")
    assert DrawLog(tmp_path / "draws.jsonl", key, boot).seen("e") is seen


def test_an_entry_missing_in_the_draw_log_counts_as_drawn(tmp_path, key):
    """A deleted log must not make a second draw free."""
    assert DrawLog(tmp_path / "draws.jsonl", key, "boot 1").seen("e")


def test_a_forked_process_has_a_nonce_of_its_own(key):
    log = DrawLog(None, key)
    mine = log.nonce
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, log.nonce.encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert len(mine) == 32 and os.read(reading, 100).decode() not in ("", mine)
    assert log.nonce == mine


def refused_in_child(log):
    """Return the refusal message of a draw in a forked child, or ""."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            log.nonce_for("gradient", "e", 1, SUM)
        except LedgerError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as file:
        return file.read()


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_a_forked_child_with_an_equal_process_id_draws_nothing(tmp_path, key, monkeypatch, where):
    """Two sums once got the same noise because the child had its parent's process id."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    log = DrawLog(tmp_path / "draws.jsonl" if where == "disk" else None, key, "boot 1")
    log.open("e")
    mine = log.nonce
    assert "forked, and belongs to the parent" in refused_in_child(log)
    assert log.nonce_for("gradient", "e", 1, OTHER) == mine


def test_a_simulation_in_memory_works_in_a_forked_child_process():
    log = DrawLog(None, NoiseKey.from_seed(0), "boot 1")
    log.open("e")
    assert refused_in_child(log) == ""


def test_a_closed_log_entry_gives_no_nonce_for_a_new_sum(tmp_path, key):
    """So a restored log cannot lack a line of this entry."""
    log = DrawLog(tmp_path / "draws.jsonl", key, "boot 1")
    log.open("e")
    first = log.nonce_for("gradient", "e", 0, SUM)
    log.close("e")
    assert log.nonce_for("gradient", "e", 1, SUM) is None
    assert log.nonce_for("gradient", "e", 0, SUM) == first


def test_a_log_entry_that_was_not_opened_gives_no_nonce(tmp_path, key):
    assert DrawLog(tmp_path / "draws.jsonl", key).nonce_for("gradient", "e", 0, SUM) is None


@pytest.fixture
def written(tmp_path, key):
    """Return the path of a log with a closed and an open entry, and of the outside copy of its
    head.
    """
    path = tmp_path / "private" / "draws.jsonl"
    copy = tmp_path / "state" / "draws.head"
    log = DrawLog(path, key, "boot 1", copies=[copy])
    for entry in ("a", "b"):
        log.open(entry)
        log.nonce_for("gradient", entry, 0, SUM)
        if entry == "a":
            log.close(entry)
    return path, copy


@pytest.mark.parametrize("kept", [None, *range(5)])
@pytest.mark.parametrize("known_to", ["head", "copy", "anchor"])
def test_a_restored_old_draw_log_charges_open_entries_again(written, key, kept, known_to):
    path, copy = written
    lines = path.read_bytes().splitlines(keepends=True)
    head = DrawLog(path, key, "boot 1").head
    path.write_bytes(b"".join(lines[:kept]))
    if kept is None:
        path.unlink()
    beside = path.with_suffix(".head")
    if known_to != "head":
        beside.write_text(read_lines(path, key).head.text())
    if known_to != "copy":
        copy.unlink()
    anchors = [head] if known_to == "anchor" else []
    for _ in range(2):  # the second finds what the first has noted, and adds nothing
        log = DrawLog(path, key, "boot 1", copies=[copy], anchors=anchors)
        assert log.seen("b")
        assert log.seen("a") is (kept is None or kept < 3)
        assert path.read_text().count("lost") == 1


def test_a_draw_log_without_head_charges_open_entries_again(written, key):
    path, copy = written
    path.with_suffix(".head").unlink()
    copy.unlink()
    log = DrawLog(path, key, "boot 1")
    assert log.seen("b") and not log.seen("a")


def test_a_kill_between_draw_log_line_and_head_loses_no_draw(written, key):
    path, copy = written
    before = path.with_suffix(".head").read_bytes()
    log = DrawLog(path, key, "boot 1", copies=[copy])
    nonce = log.nonce_for("gradient", "b", 1, SUM)
    for place in (path.with_suffix(".head"), copy):
        place.write_bytes(before)
    again = DrawLog(path, key, "boot 1", copies=[copy])
    assert again.nonce_for("gradient", "b", 1, SUM) == nonce and not again.seen("b")


def test_opening_a_draw_log_again_stops_the_first_learner(written, key):
    path, _ = written
    first = DrawLog(path, key, "boot 1")
    second = DrawLog(path, key, "boot 1")
    assert second.nonce_for("gradient", "b", 1, SUM)
    with pytest.raises(LedgerError, match="changed, or replaced by an older copy"):
        first.nonce_for("gradient", "b", 2, SUM)


def test_the_draw_log_is_read_again_after_a_new_lock(tmp_path, key):
    path = tmp_path / "private" / "draws.jsonl"
    mine, other = FolderLock(tmp_path), FolderLock(tmp_path)
    mine.acquire()
    first = DrawLog(path, key, "boot 1", lock=mine)
    first.open("e")
    mine.release()
    other.acquire()
    nonce = DrawLog(path, key, "boot 1", lock=other).nonce_for("gradient", "e", 0, SUM)
    other.release()
    mine.acquire()
    assert first.nonce_for("gradient", "e", 0, SUM) == nonce
    assert first.nonce_for("gradient", "e", 0, OTHER) is None


@pytest.mark.parametrize("how", ["edited", "moved", "taken out", "older format"])
def test_an_edited_draw_log_is_refused(written, key, how):
    path, _ = written
    lines = path.read_bytes().splitlines(keepends=True)
    changed = {
        "edited": [lines[0].replace(b"boot 1", b"boot 2"), *lines[1:]],
        "moved": [*lines[:3], lines[4], lines[3]],
        "taken out": [lines[0], *lines[2:]],
        "older format": [b'{"boot": "boot 1", "entry": "e", "kind": "open"}\n'],
    }
    path.write_bytes(b"".join(changed[how]))
    with pytest.raises(
        PrivacyError, match=r"is damaged or edited, or a line before it is missing; delete the file"
    ):
        DrawLog(path, key, "boot 1")


def test_a_noise_draw_opens_no_file_and_does_no_sync(written, key, monkeypatch):
    """The file is read once per draw and synced once per block."""
    path, copy = written
    log = DrawLog(path, key, "boot 1", copies=[copy])
    calls = []
    for name in ("open", "fsync"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, f=real, n=name, **k: calls.append(n) or f(*a, **k))
    log.nonce_for("gradient", "b", 1, SUM)
    assert calls == []
    log.close("b")
    assert calls == ["fsync"]


def test_a_simulated_draw_log_has_no_nonce():
    assert DrawLog(None, NoiseKey.from_seed(0)).nonce == ""


def test_the_draw_log_drops_a_torn_line_and_refuses_other_damage(tmp_path, key):
    path = tmp_path / "draws.jsonl"
    log = DrawLog(path, key, "boot 1")
    log.open("e")
    first = log.nonce_for("gradient", "e", 0, SUM)
    path.write_bytes(path.read_bytes() + b'{"kind": "dr')
    again = DrawLog(path, key, "boot 1")
    assert again.nonce_for("gradient", "e", 0, SUM) == first
    path.write_bytes(b'{"kind": "what"}\n' + path.read_bytes())
    with pytest.raises(PrivacyError, match="line 1 is damaged"):
        DrawLog(path, key, "boot 1")
