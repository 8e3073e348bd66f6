"""Lock that gives one object of one process exclusive use of a folder."""

import gc
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perdure.errors import RunError
from perdure.utils.forks import Process, present_process

LOCK = ".lock"


class FolderLock:
    """Exclusive lock of a folder, for all objects and processes.

    Guarantee: while it is held, no second `FolderLock` of the folder can be acquired, also not in a
    forked child. The operating system releases it when the process ends in any way, and it is
    released with the object that holds it. If the lock file is deleted, `held` becomes False.

    >>> lock = FolderLock(Path("runs/mine"))   # doctest: +SKIP
    >>> lock.acquire()                         # doctest: +SKIP
    True

    Args:
        folder: folder to lock; it is created if it does not exist.

    Attributes:
        taken: number of times that this object acquired the lock; data read before the last time
            may
           have been changed by others since.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.taken = 0
        self._descriptor: int | None = None
        self._process: Process | None = None
        self._file = (0, 0)

    @property
    def held(self) -> bool:
        """True if this object holds the lock, in this process."""
        if self._descriptor is None or self._process != present_process():
            return False
        return self._file == _identity(self.folder / LOCK)

    def acquire(self) -> bool:
        """Acquire the lock; return True if this object did not hold it before.

        Raises:
            RunError: if another process or object holds the lock, or the folder cannot be written.
        """
        if self.held:
            return False
        self._drop()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = _open(self.folder / LOCK)
        except OSError as error:
            raise RunError(
                f"{self.folder} cannot be written ({error.strerror}); give another folder"
            ) from None
        try:
            if not _taken(descriptor):
                gc.collect()  # an unused holder may not be freed yet because of a reference cycle
                if not _taken(descriptor):
                    raise RunError(
                        f"{self.folder} is in use by another process or learner; let it finish or "
                        "close it, or give another folder"
                    )
            found = os.fstat(descriptor)
            self._file = (found.st_dev, found.st_ino)
            if self._file != _identity(self.folder / LOCK):
                raise RunError(
                    f"{self.folder / LOCK} was deleted while this process locked it; do not "
                    "delete it, and try again"
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
        self._process = present_process()
        self._closing = weakref.finalize(self, os.close, descriptor)
        self.taken += 1
        return True

    def release(self) -> None:
        """Release the lock; nothing happens if it is not held."""
        import fcntl

        if self._descriptor is None:
            return
        if self._process == present_process():
            # a forked child shares the lock, and would keep it if the file were only closed
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._drop()

    def _drop(self) -> None:
        """Close the lock file if it is not locked any more, or belongs to the parent of a fork."""
        if self._descriptor is not None:
            self._descriptor = None
            self._closing()


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)


def _identity(path: Path) -> tuple[int, int]:
    """Device and inode of a file; zeros if it does not exist."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_dev, found.st_ino)


def _taken(descriptor: int) -> bool:
    """Lock a file; return False if another descriptor holds the lock."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Context manager that locks a folder for this process; None locks nothing.

    Raises:
        RunError: if the folder is in use, or cannot be written.
    """
    lock = FolderLock(folder) if folder else None
    if lock is not None:
        lock.acquire()
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
