"""Thread that draws the next noise while the sum that it is added to is still computed."""

import contextlib
from collections.abc import Callable
from threading import Thread

import numpy as np

from perdure.privacy.noise.table import Integers
from perdure.utils.forks import Process, present_process

AHEAD_FROM = 2**16
"""Fewest numbers of a draw for which a thread saves time."""


class DrawAhead:
    """Thread that holds one finished draw of noise; a draw is used at most once.

    A draw that was begun and is not taken is overwritten, and never leaves this object.
    """

    def __init__(self) -> None:
        self._room = np.zeros(0, dtype=np.int64)
        self._name: object = None
        self._process: Process | None = None
        self._drawn = False
        self._thread: Thread | None = None

    def begin(self, name: object, numbers: int, draw: Callable[[Integers], None]) -> None:
        """Start to draw `numbers` integers; `name` identifies the draw completely."""
        if numbers < AHEAD_FROM or self._busy():
            return
        if len(self._room) != numbers:
            self._room = np.empty(numbers, dtype=np.int64)
        self._name = name
        self._process = present_process()
        self._drawn = False
        self._thread = Thread(target=self._run, args=(draw,), name="perdure noise")
        self._thread.start()

    def take(self, name: object) -> Integers | None:
        """Return the integers of a draw, valid until the next one; None if it was not begun."""
        if self._thread is None or self._name != name or self._process != present_process():
            return None
        self._thread.join()
        self._name = None
        return self._room if self._drawn else None

    def _busy(self) -> bool:
        """Return True if an earlier draw of this process is still being written."""
        alive = self._thread is not None and self._thread.is_alive()
        return alive and self._process == present_process()

    def _run(self, draw: Callable[[Integers], None]) -> None:
        # the caller then draws again, and gets the error
        with contextlib.suppress(Exception):
            self._room.fill(0)
            draw(self._room)
            self._drawn = True
