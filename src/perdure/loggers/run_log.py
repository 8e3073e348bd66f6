"""One run of a logger: which values were written, and those that wait to be written."""

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from perdure.errors import ConfigError, RunError
from perdure.learner.fingerprint import refuse_other_run
from perdure.learner.learner import Learner
from perdure.utils.atomic_files import write_json

PAUSE = 30.0
"""Seconds between two times at which waiting values are written."""
BUSY = 100
"""Processor time between two such times, in multiples of the time that the last one took."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """One number of a curve.

    Args:
        name: name of the curve.
        value: the number; a tensor () is read when the value is written.
        step: number of optimiser steps since the start of the stream.
        seconds: time of the value, in seconds since 1970.
    """

    name: str
    value: float | Tensor
    step: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """One run of a logger, as its package knows it.

    Args:
        folder: folder of the logger.
        project: name of a group of runs.
        name: name of the run in the project.
        key: random name of the run, the same after every resume.
        resumed: True if an earlier process has begun the run.
        settings: settings of the training in words, by name.
    """

    folder: Path
    project: str
    name: str
    key: str
    resumed: bool
    settings: Mapping[str, str]


class Writer(Protocol):
    """Part of a logger that writes to its package."""

    def write(self, values: Sequence[Value]) -> None:
        """Write numbers, in the order of their steps, so that the files have them on return."""

    def describe(self, name: str, text: str, step: int) -> None:
        """Write a text, such as the privacy statement; a later text replaces it.

        Args:
            name: name of the text.
            text: the text, in one line.
            step: number of optimiser steps since the start of the stream.
        """

    def close(self) -> None:
        """Close the files."""


class RunLog:
    """Values of one run, each written once, also over several processes.

    A file beside the run has the last step of every curve. It is written before the values, so
    that a process that is killed in between may lose them, but no process repeats them.

    Args:
        record: path of this file.
        run: the run.
        writer: function that opens the writer.
        written: last step of every curve of earlier processes.
        settings: settings of the learner, by name, to be compared at a resume.
    """

    def __init__(
        self,
        record: Path,
        run: LoggedRun,
        writer: Callable[[LoggedRun], Writer],
        written: Mapping[str, int],
        settings: Mapping[str, Any],
    ) -> None:
        self._record = record
        self._run = run
        self._writer = writer(run)
        self._written = dict(written)
        self._settings = dict(settings)
        self._waiting: list[Value] = []
        self._texts: dict[str, tuple[str, int]] = {}
        self._flushed = time.perf_counter()
        self._due = 0.0

    @classmethod
    def of(
        cls,
        learner: Learner,
        *,
        folder: Path,
        project: str,
        name: str | None,
        kind: str,
        writer: Callable[[LoggedRun], Writer],
    ) -> "RunLog":
        """Begin the run of a learner, or continue it.

        Args:
            learner: learner that is logged.
            folder: folder of the logger.
            project: name of the group of runs.
            name: name of the run; None for the name of the learner's folder, or for the time if
                there is none.
            kind: name of the logger.
            writer: function that opens the writer.

        Raises:
            ConfigError: if the run has values of a training that cannot be resumed.
            RunError: if the run has values of a training with other settings.
        """
        place = folder / project
        if name is None:
            name = learner.folder.name if learner.folder else _unused(place, kind)
        record = place / f"{name}.{kind}.json"
        known = _read(record)
        if known:
            if not learner.fingerprint:
                allowed = "a run without values, because the learner has no folder and starts again"
                raise ConfigError.of("run", name, allowed)
            refuse_other_run(
                learner.fingerprint,
                known["settings"],
                where=record,
                fix="give the logger another run or folder",
            )
        run = LoggedRun(
            folder=folder,
            project=project,
            name=name,
            key=known.get("key") or secrets.token_hex(4),
            resumed=bool(known),
            settings=_settings(learner),
        )
        return cls(record, run, writer, known.get("written", {}), learner.fingerprint)

    @property
    def overdue(self) -> bool:
        """True if it is time to write the waiting values."""
        late = time.perf_counter() > self._flushed + PAUSE
        return bool(self._waiting) and late and time.process_time() >= self._due

    def add(self, values: Mapping[str, float | Tensor], step: int) -> None:
        """Add the values of one step, without those that the run has already.

        Args:
            values: name of the curve to its value, a number or a scalar tensor.
            step: number of optimiser steps since the start of the stream.
        """
        now = time.time()
        for name, value in values.items():
            if step > self._written.get(name, -1):
                self._written[name] = step
                self._waiting.append(Value(name=name, value=value, step=step, seconds=now))

    def describe(self, name: str, text: str, step: int) -> None:
        """Add a text; see `Writer.describe`."""
        self._texts[name] = (text, step)

    def flush(self) -> None:
        """Write all values and texts that wait."""
        waiting = [*self._waiting]
        texts = {**self._texts}
        self._waiting.clear()
        self._texts.clear()
        self._flushed = time.perf_counter()
        if not (waiting or texts):
            return
        start = time.process_time()
        known = {"key": self._run.key, "settings": self._settings, "written": self._written}
        write_json(self._record, known)
        self._writer.write(waiting)
        for name, (text, step) in texts.items():
            self._writer.describe(name, text, step)
        end = time.process_time()
        self._due = end + BUSY * (end - start)

    def close(self) -> None:
        """Write what waits, and close the writer."""
        self.flush()
        self._writer.close()


def _unused(place: Path, kind: str) -> str:
    """Return the present time as the name of a run that does not exist yet."""
    stem = f"{datetime.now().astimezone():%Y-%m-%d-%H-%M-%S}"
    name = stem
    number = 1
    while (place / f"{name}.{kind}.json").exists():
        number += 1
        name = f"{stem}-{number}"
    return name


def _read(record: Path) -> dict[str, Any]:
    """Read the record of a run; {} if there is none."""
    if not record.exists():
        return {}
    try:
        known = json.loads(record.read_text())
        return {"key": known["key"], "settings": known["settings"], "written": known["written"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{record} cannot be read ({error!r}); restore it from a backup, or give the logger "
            "another run"
        ) from None


def _settings(learner: Learner) -> dict[str, str]:
    """Return settings by which runs are told apart, in words."""
    length = ("epochs", "iterations", "batch_size", "seed")
    found = {name: str(getattr(learner, name)) for name in length}
    found["strategy"] = repr(learner.strategy)
    found["optimizer"] = type(learner.current_optimizer).__name__
    found["stream"] = learner.stream.name
    found["privacy"] = repr(learner.privacy)
    return found
