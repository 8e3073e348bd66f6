"""Trials of `perdure tune`: each is a run of one arm with values of its own, in its own folder."""

import copy
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from perdure.data.experience import Stream
from perdure.data.held_out import hold_out
from perdure.errors import ConfigError
from perdure.experiment.arm import ArmRun, open_stream
from perdure.experiment.config import Arm, Config, from_table
from perdure.experiment.metrics_log import MetricsLog
from perdure.experiment.model_config import make_model
from perdure.experiment.overrides import set_path
from perdure.experiment.result_schema import TrialResult
from perdure.experiment.search_config import GoalName, SearchConfig
from perdure.experiment.search_space import Range, Values, some_values
from perdure.experiment.searches import Asked, Score
from perdure.experiment.tuning import beginning
from perdure.utils.seeding import derive

DEFAULT = "default"
"""Name of the training with the settings of the config itself."""
ROWS: dict[GoalName, str] = {
    "accuracy": "average_accuracy",
    "robust_accuracy": "robust_accuracy",
    "seconds": "seconds",
}
"""Goals that are numbers of a trial's result, and their keys."""
WATCH = 1.0
"""Seconds between two looks of a worker at the process that started it."""


def name_of(number: int) -> str:
    """Return the name of a trial, which is the name of its folder."""
    return f"trial-{number:04d}"


@dataclass(frozen=True, kw_only=True)
class TrialRuns:
    """Runs of the trials of a search.

    Args:
        table: content of the config, without `[search]`.
        source: name of the config's file, for messages.
        folder: folder of the trials; each has its own in `arms/`.
        search: search of the config.
        place: place of the searched arm in the config.
    """

    table: Mapping[str, Any]
    source: str
    folder: Path
    search: SearchConfig
    place: int

    def table_with(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of the config with these values at their paths."""
        changed = copy.deepcopy(dict(self.table))
        for path, value in values.items():
            set_path(changed, path, copy.deepcopy(value))
        return changed

    def config(self, values: Mapping[str, Any], name: str = DEFAULT) -> Config:
        """Return the config of a trial: one seed and process, no explanation and no loggers.

        With a seed of simulated noise every trial has another one, so that noise is independent.
        """
        config = from_table(self.table_with(values), self.source)
        seed = config.all_seeds[0]
        privacy = config.privacy
        if privacy is not None and privacy.seed is not None:
            privacy = replace(privacy, seed=derive(privacy.seed, name) % 2**31)
        return replace(
            config, seed=seed, seeds=(), processes=1, explain=None, loggers=(), privacy=privacy
        )

    def arm(self, config: Config) -> Arm:
        """Return the searched arm of the config of a trial."""
        return config.arms[self.place]

    @cached_property
    def private(self) -> bool:
        """True if the searched arm is private."""
        return self.arm(self.config({})).private

    @cached_property
    def whole(self) -> Stream:
        """Stream of the config."""
        return open_stream(self.config({}))

    @cached_property
    def experiences(self) -> int:
        """Number of experiences to search on."""
        most = max(1, len(self.whole) - 1)
        if self.search.privacy == "select":
            most = len(self.whole)  # the selected model is a result of its own
        asked = self.search.experiences
        if asked is None:
            return min(2, most)
        if asked > most:
            raise ConfigError.of("search.experiences", asked, f"1 to {most} for this stream")
        return asked

    @cached_property
    def stream(self) -> Stream:
        """First experiences, with the records that give the score as test records.

        These are held-out training records, or under privacy public test records.
        """
        held_out = self.search.held_out
        if not self.private:
            return beginning(self.whole, self.experiences, held_out, self.search.seed)
        first = self.whole.experiences[: self.experiences]
        tests = [replace(each, train=each.test) for each in first]
        parts = hold_out(tests, held_out, self.search.seed, "held out")
        scored = [replace(each, test=held) for each, (_, held) in zip(first, parts, strict=True)]
        return replace(self.whole, experiences=tuple(scored))

    def check(
        self,
        ranges: Mapping[str, Range | list[Any]],
        refuse: Callable[[Config, Arm, SearchConfig], None],
    ) -> None:
        """Refuse paths and values that the config does not allow, before any training.

        Args:
            ranges: paths of settings and their values.
            refuse: function that refuses a changed config with its arm.

        Raises:
            ConfigError: names the path and the value.
        """
        for path, given in ranges.items():
            for value in some_values(given):
                try:
                    changed = self.config({path: value})
                    refuse(changed, self.arm(changed), self.search)
                except (ConfigError, IndexError) as error:
                    raise ConfigError(f'search.space: "{path}" with {value!r}: {error}') from None

    def run(self, name: str, values: Mapping[str, Any]) -> TrialResult:
        """Train with some values, unless it was done before, and return the result."""
        config = self.config(values, name)
        torch.set_num_threads(config.threads)
        log = MetricsLog(self.folder / "arms" / name / "metrics.jsonl")
        return ArmRun(config, self.arm(config), self.stream, self.folder, log, name=name).run()

    def score(self, name: str, values: Mapping[str, Any]) -> Score:
        """Train with some values, and return the scores of the goals."""
        row = self.run(name, values)
        failed = row["failure"] is not None
        return Score(
            values=tuple(self._number(goal, row, values) for goal in self.search.goals),
            failed=failed,
        )

    def higher_is_better(self, goal: GoalName) -> bool:
        """Return True if a higher number is a better one for a goal."""
        measured = goal in ("accuracy", "robust_accuracy")
        return measured and self.whole.task.metric.higher_is_better

    def _number(self, goal: GoalName, row: TrialResult, values: Mapping[str, Any]) -> float:
        if goal == "parameters":
            config = self.config(values)
            model = make_model(config.model, self.stream, config.seed)
            return float(sum(parameter.numel() for parameter in model.parameters()))
        if goal == "epsilon":
            epsilon = row["epsilon"]
            return epsilon["value"] if epsilon else 0.0
        if row["failure"] is not None and goal != "seconds":
            return 0.0 if self.higher_is_better(goal) else math.inf
        value = row[ROWS[goal]]  # type: ignore[literal-required]
        if value is None:
            allowed = "accuracy, or a config with the table [attack]"
            raise ConfigError.of("search.goals", goal, allowed)
        return float(value)


# --------------------------------------------------------------------------- several processes


@contextmanager
def trial_workers(runs: TrialRuns, count: int) -> Iterator[Callable[[Asked], Iterable[Score]]]:
    """Context manager with a function that trains for some trials, and yields scores in order.

    Args:
        runs: runs of the trials.
        count: number of processes; 1 for this one.
    """
    if count == 1:
        yield lambda asked: (runs.score(name_of(number), values) for number, values in asked)
        return
    # fresh processes: a fork would copy torch's threads in an unknown state
    with ProcessPoolExecutor(
        count, get_context("spawn"), _begin, (replace(runs), os.getpid())
    ) as pool:
        yield lambda asked: pool.map(_scored, *zip(*asked, strict=True))


_RUNS: list[TrialRuns] = []
"""Runs of this worker process."""


def _begin(runs: TrialRuns, parent: int) -> None:
    """Prepare a worker process, which ends when the process that started it is gone."""
    _RUNS[:] = [runs]
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH)
    os._exit(1)


def _scored(number: int, values: Values) -> Score:
    (runs,) = _RUNS
    return runs.score(name_of(number), values)
