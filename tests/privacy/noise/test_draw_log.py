"""Sums that noise was drawn for: what is replayed, what is charged again."""

import os
import stat

import numpy as np
import pytest

from perdure.errors import PrivacyError
from perdure.privacy.noise.draw_log import DrawLog
from perdure.privacy.noise.key import NoiseKey

SUM = np.array([1, 2, 3])
OTHER = np.array([1, 2, 4])


@pytest.fixture
def key():
    return NoiseKey(bytes(range(32)), simulated=False)


def test_an_equal_sum_is_replayed_under_its_nonce(tmp_path, key):
    log = DrawLog(tmp_path / "draws.jsonl", key, "boot 1")
    first = log.nonce_for("gradient e 0", SUM)
    later = DrawLog(tmp_path / "draws.jsonl", key, "boot 1")
    assert later.nonce != log.nonce
    assert later.nonce_for("gradient e 0", SUM) == first
    assert later.nonce_for("gradient e 1", SUM) == later.nonce


def test_another_sum_gets_no_nonce_and_is_not_noted(tmp_path, key):
    log = DrawLog(tmp_path / "draws.jsonl", key, "boot 1")
    log.nonce_for("gradient e 0", SUM)
    before = (tmp_path / "draws.jsonl").read_bytes()
    assert log.nonce_for("gradient e 0", OTHER) is None
    assert (tmp_path / "draws.jsonl").read_bytes() == before


def test_a_line_is_in_the_file_before_the_nonce_is_given(tmp_path, key):
    path = tmp_path / "draws.jsonl"
    log = DrawLog(path, key, "boot 1")
    log.nonce_for("gradient e 0", SUM)
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
def test_an_open_entry_counts_as_seen_after_another_boot(tmp_path, key, boot, closed, seen):
    log = DrawLog(tmp_path / "draws.jsonl", key, "boot 1")
    log.open("e")
    assert not log.seen("e")
    if closed:
        log.close("e")
    assert DrawLog(tmp_path / "draws.jsonl", key, boot).seen("e") is seen


def test_an_entry_that_no_log_knows_counts_as_seen(tmp_path, key):
    """A deleted log must not make a second look free."""
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


def test_a_simulation_has_no_nonce():
    assert DrawLog(None, NoiseKey.from_seed(0)).nonce == ""


def test_a_torn_last_line_is_dropped_and_other_damage_refused(tmp_path, key):
    path = tmp_path / "draws.jsonl"
    log = DrawLog(path, key, "boot 1")
    log.open("e")
    first = log.nonce_for("gradient e 0", SUM)
    path.write_bytes(path.read_bytes() + b'{"kind": "dr')
    again = DrawLog(path, key, "boot 1")
    assert again.nonce_for("gradient e 0", SUM) == first
    path.write_bytes(b'{"kind": "what"}\n' + path.read_bytes())
    with pytest.raises(PrivacyError, match="line 1 is damaged"):
        DrawLog(path, key, "boot 1")
