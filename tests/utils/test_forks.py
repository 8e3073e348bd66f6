"""A forked child has a process name of its own, even with its parent's process id."""

import os

import pytest

from perdure.utils.folder_lock import FolderLock
from perdure.utils.forks import present_process

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="without fork there is no child")


def in_child(answer):
    """True if `answer()` is true in a forked child."""
    child = os.fork()
    if child == 0:
        os._exit(0 if answer() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_forked_child_has_another_process_name():
    mine = present_process()
    assert mine == present_process()
    assert in_child(lambda: present_process() != mine)


def test_a_child_with_an_equal_pid_has_another_process_name(monkeypatch):
    """Both processes may have id 1 in two process namespaces."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    mine = present_process()
    assert in_child(lambda: os.getpid() == 1 and present_process() != mine)


def test_a_child_process_does_not_hold_the_lock_of_its_parent(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    lock = FolderLock(tmp_path)
    lock.acquire()

    def left_alone():
        held = lock.held
        lock.release()
        return not held

    assert in_child(left_alone)
    assert lock.held
