"""Files that cannot be written: one error line, nothing lost, and a bit-identical resume.

The operating system refuses the writes: by its limit on the size of files, or as a full device.
"""

import errno
import os
import resource
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.learners import SIMULATED, bits, same_bits
from perdure.errors import RunError, StorageError
from perdure.privacy.answers import Answers
from perdure.privacy.noise.draw_lines import head_file
from perdure.privacy.noise.draw_log import DrawLog
from perdure.privacy.noise.key import NoiseKey
from perdure.strategies import Replay
from perdure.utils.atomic_files import write_atomically, write_json, writing

FULL = Path("/dev/full")
also = pytest.mark.deep(reason="chaos: other files of a run that cannot be written")


@contextmanager
def no_file_longer_than(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def result_of(learner_of, toy_stream):
    """Return the result of a run in a folder, with no disk space from a point of the loop on."""

    def run(folder, privacy, full_from=None):
        left = [full_from[1]] if full_from else []
        with no_file_longer_than(resource.RLIM_INFINITY):  # puts the limit back

            def fill(point, learner):
                if left and point == full_from[0]:
                    left[0] -= 1
                    if left[0] == 0:
                        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                        resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))

            learner = learner_of(
                Replay(memory_size=12), folder=folder, privacy=privacy, blocks=2, callbacks=[fill]
            )
            matrix = learner.fit(toy_stream())
        return matrix.tolist(), bits(learner.snapshot().tensors)

    return run


@pytest.mark.parametrize(
    ("point", "private"),
    [
        ("checkpoint.begin", False),
        ("ledger.before-append", True),
        pytest.param("step.sampled", True, marks=also),
        pytest.param("checkpoint.begin", True, marks=also),
    ],
)
def test_a_run_on_a_full_disk_stops_and_can_resume(result_of, tmp_path, point, private):
    privacy = replace(SIMULATED) if private else None
    whole = result_of(tmp_path / "whole", privacy)
    with pytest.raises(StorageError) as caught:
        result_of(tmp_path / "cut", privacy, full_from=(point, 2))
    told = str(caught.value)
    assert "\n" not in told and str(tmp_path / "cut") in told
    assert "cannot be written: File too large" in told and "ulimit -f" in told
    assert "nothing that was stored is lost" in told and "continues from its last" in told
    again = result_of(tmp_path / "cut", privacy)
    assert again[0] == whole[0] and same_bits(again[1], whole[1])


def test_a_write_that_fails_leaves_the_old_file_unchanged(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"value": 1})
    before = path.read_bytes()
    with no_file_longer_than(100), pytest.raises(StorageError, match=r"result\.json cannot"):
        write_atomically(path, bytes(200))
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["result.json"]  # no draft


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "No space left on device; .*free some space"),
        (errno.EDQUOT, "quota exceeded; .*free some space"),
        (errno.EROFS, "Read-only file system; .*make its folder writable"),
        (errno.EACCES, "Permission denied; .*make its folder writable"),
    ],
)
def test_every_storage_error_message_names_a_fix(number, fix):
    error = StorageError.of(Path("run/x.json"), OSError(number, os.strerror(number)))
    assert isinstance(error, RunError) and isinstance(error, OSError)
    with pytest.raises(StorageError, match=f"^run/x.json cannot be written: .*{fix}"):
        raise error


def test_the_error_of_a_full_disk_names_disk_space(tmp_path):
    with (
        pytest.raises(StorageError, match=r"No space left on device; .*free some space"),
        writing(tmp_path / "ledger.jsonl"),
        FULL.open("wb", buffering=0) as file,
    ):
        file.write(b"a line")


def test_the_error_names_a_folder_path_that_runs_through_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/x\.json cannot be written: .*or give another"):
        write_json(tmp_path / "file" / "x.json", {})


def test_the_error_names_a_stored_release_it_cannot_delete(tmp_path):
    key = NoiseKey.from_os(tmp_path / "key")
    answers = Answers(tmp_path / "answers", key)
    (tmp_path / "answers" / "000000-aaaaaaaa.safetensors").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"000000-aaaaaaaa\.safetensors cannot"):
        answers.keep("b" * 8, {"value": torch.zeros(1)}, experience=5)
    assert answers.find("b" * 8) is not None


def test_the_error_names_a_draw_log_head_it_cannot_write(tmp_path):
    path = tmp_path / "draws.jsonl"
    head_file(path).mkdir()
    with pytest.raises(StorageError, match=f"{head_file(path).name} cannot be written: "):
        DrawLog(path, NoiseKey.from_os(tmp_path / "key"))
