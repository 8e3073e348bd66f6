"""Folder locks: one holder at a time, in all processes, until the holder ends."""

import multiprocessing
import signal

import pytest

from perdure.errors import RunError
from perdure.utils.folder_lock import FolderLock, locked


def holding(folder, ready):
    lock = FolderLock(folder)
    lock.acquire()
    ready.set()
    signal.pause()


def test_a_folder_can_be_locked_only_once(tmp_path):
    first = FolderLock(tmp_path / "new")
    second = FolderLock(tmp_path / "new")
    assert first.acquire() and first.held and not first.acquire()
    with pytest.raises(RunError, match="in use by another process or learner"):
        second.acquire()
    first.release()
    first.release()
    assert not first.held and second.acquire()


def test_a_folder_lock_is_released_when_its_object_is_deleted(tmp_path):
    FolderLock(tmp_path).acquire()
    assert FolderLock(tmp_path).acquire()


def test_a_folder_is_locked_until_the_block_ends_or_fails(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        with pytest.raises(RunError, match="in use"):
            FolderLock(tmp_path).acquire()
        raise KeyError
    assert FolderLock(tmp_path).acquire()
    with locked(None):
        pass


def test_the_folder_lock_of_a_killed_process_is_released(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=holding, args=(tmp_path, ready))
    process.start()
    try:
        assert ready.wait(10)
        with pytest.raises(RunError, match="in use"):
            FolderLock(tmp_path).acquire()
    finally:
        process.kill()
        process.join()
    assert FolderLock(tmp_path).acquire()


def test_locking_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        FolderLock(tmp_path / "file" / "run").acquire()
