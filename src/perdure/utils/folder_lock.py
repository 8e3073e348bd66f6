"""A lock that keeps a folder to one object of one process."""

import gc
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perdure.errors import RunError

LOCK = ".lock"


class FolderLock:
    """Keep a folder to one holder at a time, in this process and in every other one.

    Guarantee: while it is held, no second `FolderLock` of the folder can be taken. The system gives
    it up however the process ends, and it goes with the object that holds it.

    >>> lock = FolderLock(Path("runs/mine"))   # doctest: +SKIP
    >>> lock.acquire()                         # doctest: +SKIP
    True

    Args:
        folder: made where it is not there yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None
        self._process = 0

    @property
    def held(self) -> bool:
        """Whether this object holds the folder."""
        return self._descriptor is not None

    def acquire(self) -> bool:
        """Take the folder; return whether it was not held before.

        Raises:
            RunError: when another process or object works in it, or it cannot be written.
        """
        if self.held:
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunError(
                f"{self.folder} cannot be written ({error.strerror}); give another folder"
            ) from None
        try:
            if not _taken(descriptor):
                gc.collect()  # a holder that was dropped may wait in a circle of references
                if not _taken(descriptor):
                    raise RunError(
                        f"{self.folder} is in use by another process or learner; let it finish or "
                        "close it, or give another folder"
                    )
        except OSError as error:
            os.close(descriptor)
            raise RunError(
                f"{self.folder} cannot be locked ({error.strerror}); give a folder on a disk with "
                "file locks"
            ) from None
        except RunError:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        self._process = os.getpid()
        self._closing = weakref.finalize(self, os.close, descriptor)
        return True

    def release(self) -> None:
        """Give the folder up; nothing happens where it is not held."""
        import fcntl

        if self._descriptor is None:
            return
        if self._process == os.getpid():
            # a forked child shares the lock: closing the file would leave it with the child
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._descriptor = None
        self._closing()


def _taken(descriptor: int) -> bool:
    """Lock a file unless another descriptor holds it."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Keep a folder to this process while something runs in it; None locks nothing.

    Raises:
        RunError: when it is in use, or cannot be written.
    """
    lock = FolderLock(folder) if folder else None
    if lock is not None:
        lock.acquire()
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
