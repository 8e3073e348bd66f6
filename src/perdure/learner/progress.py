"""Progress of a training: read at the points of the loop, and shown as a bar or as lines.

`Learner.fit`, federations and configured runs use the same display.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

from perdure.curator.local_curator import LocalCurator
from perdure.data.experience import Stream
from perdure.learner.checkpoint import Position
from perdure.planning.training_plan import TrainingPlan
from perdure.privacy.settings import Privacy

if TYPE_CHECKING:
    from rich.console import Console

Show = Callable[[str, float, str], None]
"""Function that is called as show(name, share done, state in words)."""
P = ParamSpec("P")
R = TypeVar("R")

PAUSE = 0.25
"""Most seconds between two reports of a training."""
BUSY = 200
"""Processor time between two drawings of a bar, in multiples of the time that one takes."""
LATEST = 10.0
"""Seconds after which a bar is drawn, however little processor time was used."""
SHARE = 0.01
"""Share of a training after which it is reported, however short the time is."""
MOST = 0.99
"""Largest share that is reported before the training has returned."""
WIDE = 100
"""Columns of a terminal below which a bar is shorter, so that the state has room beside it."""
BAR, NARROW_BAR = 20, 6
"""Columns of a bar."""
LINES = 4
"""Number of lines for a whole training, where there is no terminal."""


class Trained(Protocol):
    """Parts of a learner from which its progress is read."""

    callbacks: Sequence[Callable[[str, Any], None]]
    show_progress: bool | None
    privacy: Privacy | None
    matrix: list[list[float]]
    progress: list[tuple[int, list[float]]]

    @property
    def stream(self) -> Stream:
        """Stream that the learner is trained on."""

    @property
    def training(self) -> TrainingPlan:
        """Plan of the training."""

    @property
    def position(self) -> Position:
        """Position in the stream."""

    @property
    def curator(self) -> LocalCurator:
        """Curator, which knows the loss of the last step."""


T = TypeVar("T", bound=Trained)


class Watch:
    """Callback of a learner that reports how far the training is.

    Guarantee: under privacy it reads the position and released accuracies only; with raw
    diagnostics the loss, too.

    Args:
        show: called as show(share done, state in words), with a rising share up to `MOST`.
    """

    def __init__(self, show: Callable[[float, str], None]) -> None:
        self._show = show
        self._shown = 0.0
        self._reported = time.perf_counter()
        self._steps = 0
        self._length = 1
        self._found = ""

    def __call__(self, point: str, learner: Trained) -> None:
        """Report the state of the learner, if enough was done since the last report."""
        if point == "step.done":
            self._steps += 1
            share = self._share(learner)
            now = time.perf_counter()
            if share >= self._shown + SHARE or now >= self._reported + PAUSE:
                self._report(learner, share, now)
        elif point == "experience.begin":
            self._length = max(1, learner.training.steps(learner.position.experience))
        elif point == "evaluated":
            self._found = accuracy_text(learner)
            self._report(learner, self._share(learner), time.perf_counter())

    def _share(self, learner: Trained) -> float:
        here = learner.position
        return (here.experience + here.step / self._length) / len(learner.stream)

    def _report(self, learner: Trained, share: float, now: float) -> None:
        if not self._shown < share <= MOST:
            return
        here = learner.position
        if self._steps:
            rate = self._steps / max(1e-9, now - self._reported)
            words = [
                experience_text(here.experience, len(learner.stream)),
                f"step {here.step}/{self._length}",
                f"{rate:.3g} steps/s" if rate < 100 else f"{rate:.0f} steps/s",
            ]
        else:
            words = [f"{here.experience}/{len(learner.stream)} experiences"]
        loss = training_loss(learner)
        # a narrow terminal cuts the end
        words = [self._found, *words] if self._found else words
        words += [] if loss is None else [f"loss {loss:.3g}"]
        self._shown = share
        self._reported = now
        self._steps = 0
        self._show(share, ", ".join(words))


def experience_text(index: int, experiences: int) -> str:
    """Return the place of an experience in its stream, in words."""
    return f"experience {index + 1}/{experiences}"


def training_loss(learner: Trained) -> float | None:
    """Return the mean loss of the last step's rows; None under privacy, and before the first step.

    With raw diagnostics the loss is there, too. The value is copied from the device of the model.
    """
    if learner.privacy is not None and learner.privacy.diagnostics != "raw":
        return None
    last = learner.curator.diagnostics
    return None if last is None else float(last.loss)


def last_accuracies(learner: Trained) -> list[float]:
    """Return the accuracies of the last evaluation for the stages so far; [] before the first."""
    ended = learner.position.experience - 1
    if ended < 0 or not (learner.matrix or learner.progress):
        return []
    stage = learner.stream.stage_of(ended)
    inside = learner.progress and (
        learner.progress[-1][0] > stage.first or len(learner.matrix) <= stage.number
    )
    row = learner.progress[-1][1] if inside and ended != stage.last else learner.matrix[-1]
    return row[: stage.number + 1]


def accuracy_text(learner: Trained) -> str:
    """Return the mean accuracy of the last evaluation over the stages so far, in words."""
    known = [value for value in last_accuracies(learner) if not math.isnan(value)]
    metric = learner.stream.task.metric
    if not known:
        return ""
    return f"{metric.name} {sum(known) / len(known):.4g} {metric.unit}".strip()


def watched(fit: Callable[Concatenate[T, P], R]) -> Callable[Concatenate[T, P], R]:
    """Decorate the method of a learner that trains: show progress, and close callbacks at the end.

    A callback with a method `close`, such as a logger, is closed after an error, too.
    """

    @wraps(fit)
    def shown(self: T, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with shown_progress(self.show_progress) as show:
            watch = None if show is None else Watch(partial(show, "training"))
            if watch is not None:
                self.callbacks = (*self.callbacks, watch)
            try:
                result = fit(self, *args, **kwargs)
            finally:
                if watch is not None:
                    self.callbacks = [each for each in self.callbacks if each is not watch]
                for callback in self.callbacks:
                    getattr(callback, "close", _nothing)()
            if show is not None:
                show("training", 1.0, accuracy_text(self))
            return result

    return shown


def _nothing() -> None:
    """Do nothing, for a callback without `close`."""


@contextmanager
def shown_progress(wanted: bool | None) -> Iterator[Show | None]:
    """Context manager that gives the function to show progress on standard error.

    It gives None if nothing is to be shown.

    Args:
        wanted: False to show nothing; True for a bar in a terminal and lines elsewhere; None for a
            bar in a terminal only.
    """
    if wanted is False:
        yield None
        return
    from rich.console import Console

    console = Console(stderr=True)
    if wanted or console.is_interactive:
        with display(console) as show:
            yield show
    else:
        yield None


@contextmanager
def display(console: "Console") -> Iterator[Show]:
    """Context manager with a progress bar for each name; gives the function that sets its share.

    Without a terminal, a line is printed at each quarter instead.
    """
    if console.is_interactive:
        with _bars(console) as show:
            yield show
    else:
        yield _lines(console)


@contextmanager
def _bars(console: "Console") -> Iterator[Show]:
    from rich.progress import (
        BarColumn,
        Progress,
        TaskID,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    narrow = console.width < WIDE
    columns = (
        TextColumn("{task.description:16}"),
        BarColumn(bar_width=NARROW_BAR if narrow else BAR),
        TaskProgressColumn(),
        *(() if narrow else (TimeElapsedColumn(),)),
        TimeRemainingColumn(),
        # cut instead of wrapped, so that a bar stays one line in a narrow terminal
        TextColumn("{task.fields[state]}", table_column=Column(no_wrap=True, ratio=1)),
    )
    tasks: dict[str, TaskID] = {}
    due = overdue = -math.inf
    # drawn by the training itself: a thread that draws would slow its steps down
    with Progress(*columns, console=console, auto_refresh=False, expand=True) as bars:

        def show(name: str, share: float, state: str) -> None:
            nonlocal due, overdue
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=1.0, state=state)
            bars.update(tasks[name], completed=share, state=state)
            start = time.process_time()
            if share >= 1 or start >= due or time.perf_counter() >= overdue:
                bars.refresh()
                spent = time.process_time() - start
                due = start + BUSY * spent
                overdue = time.perf_counter() + LATEST

        yield show


def _lines(console: "Console") -> Show:
    """Return a function that prints a line when the next quarter of a training is done."""
    told: dict[str, int] = {}
    began: dict[str, tuple[float, float]] = {}

    def show(name: str, share: float, state: str) -> None:
        at, first = began.setdefault(name, (time.perf_counter(), share))
        quarter = int(LINES * share)
        if quarter <= told.get(name, 0):
            return
        told[name] = quarter
        words = [f"{name} {100 * quarter // LINES} %", state]
        if first < share < 1:
            left = (time.perf_counter() - at) * (1 - share) / (share - first)
            words.append(f"{left:.0f} s left")
        # one line each, however wide the console is
        console.print(", ".join(filter(None, words)), highlight=False, markup=False, soft_wrap=True)

    return show
