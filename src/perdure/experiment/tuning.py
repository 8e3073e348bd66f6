"""Search for hyper-parameters on the first experiences of a stream only.

Test records are never used.

A learner that sees experiences one after another cannot go back, so hyper-parameters that are tuned
on the whole stream would use data from the future. Here only the first experiences are used for
tuning; their training records are split into a part for training and a part for evaluation. Later
experiences and all test records are not used. All copies of a record, such as its rotations in
several experiences, are on the same side of the split.

Chaudhry, Ranzato, Rohrbach and Elhoseiny, Efficient Lifelong Learning with A-GEM, ICLR 2019,
section 2.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from perdure.data.experience import Stream
from perdure.data.held_out import hold_out
from perdure.errors import ConfigError, PrivacyError, RunawayError
from perdure.experiment.search_space import Space, Values, checked_space, described_space
from perdure.experiment.searches import Asked, Sampler, Score, Search
from perdure.learner.learner import Learner
from perdure.metrics import average_accuracy


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """Result of a search for hyper-parameters.

    Args:
        values: best hyper-parameters.
        score: average accuracy with these values, in percent, on held-out records; for other tasks,
            average of the task's metric.
        experiences: number of experiences used, from the start of the stream.
        trials: all tried values with their scores; a trial that diverged has the score 0, or
            infinity if lower is better.
    """

    values: Values
    score: float
    experiences: int
    trials: tuple[tuple[Values, float], ...]

    def row(self) -> dict[str, object]:
        """Return values, score and trials of the search as a dict for a benchmark's result file."""
        return {
            "tuned_on": "held-out training records of the first "
            f"{self.experiences} experiences; no test "
            "record",
            "values": self.values,
            "score": self.score,
            "trials": [{"values": values, "score": score} for values, score in self.trials],
        }


def tune(
    make: Callable[[Values], Learner],
    space: Space,
    stream: Stream,
    *,
    experiences: int = 3,
    trials: int = 20,
    held_out: float = 0.2,
    sampler: Sampler = "tpe",
    seed: int = 0,
    study: Path | str | None = None,
) -> Tuned:
    """Search for hyper-parameters on the first experiences of a stream, with Optuna.

    With a file for the study, a search that was stopped at any moment, `kill -9` included, goes on
    after its last finished trial, to the same result. `tune_run` searches the settings of a config
    instead, for several goals, with several processes and under privacy.

    Args:
        make: function from hyper-parameters to a new learner with a new model, in no folder; a
            learner that diverges gets the score 0, or infinity if lower is better.
        space: names of hyper-parameters and their ranges or choices; see `Space`.
        stream: stream to search on; only the training records of its first `experiences` are used.
        experiences: number of experiences to search on.
        trials: number of learners to train, those of an earlier part of the search included.
        held_out: share of the training records that is held out to compute the score; all copies of
            a record are on one side.
        sampler: `tpe` (tree-structured Parzen estimator), `cmaes` (evolution strategy with
            covariance matrix adaptation, for two ranges or more), `nsga2` or `random`.
        seed: seed of the held-out choice and of the search.
        study: SQLite file that keeps the finished trials; None to keep nothing.

    Raises:
        ConfigError: if a search with these arguments is impossible, or a learner is not a new one.
        PrivacyError: if the learner is private: every trial would cost privacy, and the chosen
            values would be a release without noise.
        RunawayError: if every trial diverged.
        RunError: if the file has another search, or cannot be read.
    """
    checked = checked_space(space)
    _check(stream, experiences, trials, held_out)
    metric = stream.task.metric
    search = Search(
        space=checked, higher_is_better=(metric.higher_is_better,), sampler=sampler, seed=seed
    )
    identity = {
        "space": described_space(checked),
        "stream": stream.name,
        "metric": metric.name,
        "experiences": experiences,
        "held_out": held_out,
        "sampler": sampler,
        "seed": seed,
    }
    first = beginning(stream, experiences, held_out, seed)
    fresh = _FreshLearners()

    def evaluate(asked: Asked) -> Iterator[Score]:
        for _, values in asked:
            yield _score(fresh.check(make(values)), first)

    done = search.run(trials, evaluate, file=Path(study) if study else None, identity=identity)
    if all(trial.score.failed for trial in done):
        raise RunawayError(
            f"the training of all {len(done)} trials diverged (parameters were NaN or infinite); "
            "search smaller learning rates, or normalise the inputs"
        )
    tried = tuple((trial.values, trial.score.values[0]) for trial in done)
    best, found = (max if metric.higher_is_better else min)(tried, key=lambda pair: pair[1])
    return Tuned(values=best, score=found, experiences=experiences, trials=tried)


def _score(learner: Learner, stream: Stream) -> Score:
    """Train a learner on the stream, and return its score."""
    metric = stream.task.metric
    try:
        return Score(values=(average_accuracy(learner.fit(stream), metric=metric),), failed=False)
    except RunawayError:
        return Score(values=(0.0 if metric.higher_is_better else math.inf,), failed=True)


class _FreshLearners:
    """Check that each trial of a search gets a new learner, untouched by earlier trials."""

    def __init__(self) -> None:
        self._models: list[weakref.ref[nn.Module]] = []

    def check(self, learner: Learner) -> Learner:
        """Return the learner of a trial unchanged, after the check that it is new.

        Raises:
            ConfigError: for a model of an earlier trial, a learner that was fitted, or a folder.
            PrivacyError: for a private learner.
        """
        if learner.privacy is not None:
            raise PrivacyError(
                "hyper-parameters cannot be tuned on private records, because every trial and the "
                "choice itself cost privacy; tune on public records, or write a config with the "
                "table [search] and run perdure tune, which counts the cost"
            )
        known = any(model() is learner.model for model in self._models)
        if known or learner.position.experience or learner.position.step:
            raise ConfigError(
                "make returned a learner or a model of an earlier trial; allowed: a new learner "
                "and a new model in each trial; build both inside the function"
            )
        if learner.folder is not None:
            raise ConfigError.of(
                "folder", str(learner.folder), "None, because a trial would resume another one"
            )
        self._models.append(weakref.ref(learner.model))
        return learner


# --------------------------------------------------------------------------- held-out records


def beginning(stream: Stream, experiences: int, held_out: float, seed: int) -> Stream:
    """Return the first experiences, with a held-out share of training records as test records.

    All records of one id are on the same side, training or test, in every experience.

    Args:
        stream: whole stream.
        experiences: number of experiences to keep.
        held_out: share of the ids of each experience that is held out, among those that no earlier
            experience has.
        seed: seed of the choice.

    Raises:
        ConfigError: if an experience would have no record on one of the sides.
    """
    first = stream.experiences[:experiences]
    parts = hold_out(first, held_out, seed, "held out")
    return replace(
        stream,
        experiences=tuple(
            replace(experience, train=train, test=held)
            for experience, (train, held) in zip(first, parts, strict=True)
        ),
    )


def _check(stream: Stream, experiences: int, trials: int, held_out: float) -> None:
    if not 1 <= experiences < len(stream):
        raise ConfigError.of(
            "experiences",
            experiences,
            f"1 to {len(stream) - 1}, less than the number of experiences in the stream",
        )
    if trials < 1:
        raise ConfigError.of("trials", trials, "1 or more")
    if not 0 < held_out < 1:
        raise ConfigError.of("held_out", held_out, "a share between 0 and 1")
