"""Base class of loggers: the values that are written, and the points of the loop to write them."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.learner.learner import Learner
from perdure.learner.progress import last_accuracies
from perdure.loggers.run_log import LoggedRun, RunLog, Writer
from perdure.metrics import summarise
from perdure.privacy.ledger.account import Statement
from perdure.utils.checked_fields import CheckedFields

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ALLOWED_NAMES = "letters, digits, . - _, at most 100"


class _Open:
    """The open run of a logger, if there is one."""

    log: RunLog | None = None


@dataclass(frozen=True, kw_only=True)
class Logger(CheckedFields, ABC):
    """Callback of a learner that writes curves for a program that shows them.

    Subclasses implement `open`, in one file for each program.

    These values are written, over the number of optimiser steps since the start of the stream:

    - at every step whose number is a multiple of `every`, and at the last one of a block:
      `learning_rate`; without privacy `loss`, the mean loss of the batch, without the strategy's
      penalty; under privacy `clip_norm` and `signal_to_noise`, which are functions of releases;
    - after every evaluation: the metric of every stage so far, as `accuracy/stage_000`, at the end
      of a stage also `average_accuracy`, `forgetting` and the other fields of
      `perdure.metrics.Summary`; under privacy `epsilon`, and a text with the privacy statement.

    A run of simulated noise writes `simulated/epsilon` instead. With raw diagnostics, which end the
    guarantee, `raw/loss` and `raw/clipped` are written, too.

    Guarantee: under privacy only releases, functions of releases and public facts are written, and
    not before the block of their steps is closed.

    Values wait in memory for half a minute or more, under privacy until the end of their block, and
    are written before every checkpoint. A learner with a folder that is resumed continues its run,
    and repeats no value.

    >>> Learner(..., callbacks=[TensorBoard(folder="runs/curves")])  # doctest: +SKIP

    Args:
        folder: folder of the files; None for `loggers` in the folder of the learner.
        project: name of a group of runs; None for `perdure`, or for the name of a configured run.
        run: name of the run; None for the name of the learner's folder, or for the time if the
            learner has none. In a configured run the name of the training is added.
        every: number of steps between two values of the curves over steps.
    """

    folder: Path | str | None = None
    project: str | None = None
    run: str | None = None
    every: int = 50
    _open: _Open = field(default_factory=_Open, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("project", "run"):
            value = getattr(self, name)
            if value is not None and not PLAIN_NAME.fullmatch(value):
                raise ConfigError.of(name, value, ALLOWED_NAMES)
        if self.every < 1:
            raise ConfigError.of("every", self.every, "a whole number, 1 or more")

    @abstractmethod
    def open(self, run: LoggedRun) -> Writer:
        """Open the files of a run, to write its next values.

        Raises:
            ConfigError: if the package of the program is not installed.
        """

    def __call__(self, point: str, learner: Learner) -> None:
        """Write the values of a point of the loop; see `perdure.learner.POINTS`."""
        if point == "step.done":
            if learner.position.step % self.every == 0:
                self._note_step(learner)
        elif point == "block.end":
            self._note_step(learner)
            if self._log(learner).overdue:
                self.flush()
        elif point == "evaluated":
            self._note_evaluation(learner)
            self.flush()
            if learner.position.experience == len(learner.stream):
                self.close()
        elif point == "checkpoint.begin":
            self.flush()
        elif point == "experience.begin" and step_of(learner) == 0:
            self.close()  # the run of an earlier training

    def log(self, values: Mapping[str, float | Tensor], learner: Learner) -> None:
        """Write values of your own at the present step of the learner.

        Guarantee: none; under privacy give functions of releases and public facts only.

        Args:
            values: name of the curve to its value, a number or a scalar tensor.
            learner: learner that is logged.
        """
        self._log(learner).add(values, step_of(learner))

    def log_privacy(self, statement: Statement, learner: Learner, *, raw: bool = False) -> None:
        """Write epsilon, and as a text everything that it needs to be understood.

        Args:
            statement: privacy statement of the training so far.
            learner: learner that is logged.
            raw: True if raw diagnostics were shown, so that the training is not private.
        """
        warning = "; raw diagnostics were shown: not private" if raw else ""
        self.log(
            {"simulated/epsilon" if statement.simulated else "epsilon": statement.epsilon}, learner
        )
        self._log(learner).describe("privacy", f"{statement}{warning}", step_of(learner))

    def flush(self) -> None:
        """Write all values that wait."""
        if self._open.log is not None:
            self._open.log.flush()

    def close(self) -> None:
        """Write all values that wait, and close the files; the next value opens them again."""
        if self._open.log is not None:
            log = self._open.log
            self._open.log = None
            log.close()

    def _log(self, learner: Learner) -> RunLog:
        """Return the open run; it is opened at the first value."""
        if self._open.log is None:
            folder = self.folder
            if folder is None:
                if learner.folder is None:
                    allowed = 'a path, such as "runs/curves", if the learner has no folder'
                    raise ConfigError.of("folder", folder, allowed)
                folder = learner.folder / "loggers"
            self._open.log = RunLog.of(
                learner,
                folder=Path(folder),
                project=self.project or "perdure",
                name=self.run,
                kind=type(self).__name__.lower(),
                writer=self.open,
            )
        return self._open.log

    def _note_step(self, learner: Learner) -> None:
        values: dict[str, float | Tensor] = {
            "learning_rate": float(learner.current_optimizer.param_groups[0]["lr"])
        }
        privacy = learner.privacy
        if privacy is not None:
            values["clip_norm"] = learner.curator.clip_norm
            values["signal_to_noise"] = learner.curator.signal_to_noise
        if privacy is None or privacy.diagnostics == "raw":
            found = learner.curator.diagnostics
            if found is not None:
                # a copy on the device, which is read when it is written: no step waits for it
                loss = found.loss.clone()
                values |= {"loss": loss} if privacy is None else {"raw/loss": loss}
            if found is not None and privacy is not None:
                values["raw/clipped"] = found.clipped
        log = self._log(learner)
        log.add(values, step_of(learner))
        if privacy is None and log.overdue:
            log.flush()

    def _note_evaluation(self, learner: Learner) -> None:
        metric = learner.stream.task.metric
        ended = learner.position.experience - 1
        stage = learner.stream.stage_of(ended)
        name = metric.name.replace(" ", "_")
        values: dict[str, float | Tensor] = {
            f"{name}/stage_{number:03d}": value
            for number, value in enumerate(last_accuracies(learner))
        }
        if ended == stage.last and any(map(math.isfinite, values.values())):
            rows = torch.tensor(learner.matrix, dtype=torch.float64)
            found = vars(summarise(rows, metric=metric))
            values |= {key: value for key, value in found.items() if value is not None}
        self.log({key: value for key, value in values.items() if math.isfinite(value)}, learner)
        if learner.private_sum is not None and learner.privacy is not None:
            statement = learner.private_sum.ledger.statement(learner.privacy.delta)
            self.log_privacy(statement, learner, raw=learner.privacy.diagnostics == "raw")


def step_of(learner: Learner) -> int:
    """Return the number of optimiser steps of a learner since the start of its stream.

    An experience without steps counts as one step.
    """
    here = learner.position
    return learner.training.steps_before(here.experience) + here.step
