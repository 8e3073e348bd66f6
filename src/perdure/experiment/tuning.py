"""Search for hyper-parameters on the first experiences of a stream only.

Test records are never used.

A learner that sees experiences one after another cannot go back, so hyper-parameters that are tuned
on the whole stream would use data from the future. Here only the first experiences are used for
tuning; their training records are split into a part for training and a part for evaluation. Later
experiences and all test records are not used.

Chaudhry, Ranzato, Rohrbach and Elhoseiny, Efficient Lifelong Learning with A-GEM, ICLR 2019,
section 2.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from perdure.data.experience import Experience, Stream
from perdure.data.records import Records
from perdure.errors import ConfigError, PrivacyError, RunawayError
from perdure.learner.learner import Learner
from perdure.metrics import average_accuracy
from perdure.utils.seeding import generator

Values = dict[str, float]
"""Hyper-parameters by name."""
Space = Mapping[str, tuple[float, float]]
"""Name of a hyper-parameter to its lowest and highest value, both above 0, on a logarithmic scale.
"""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """Result of a search for hyper-parameters.

    Args:
        values: best hyper-parameters.
        score: average accuracy with these values, in percent, on held-out records; for other tasks,
            average of the task's metric.
        experiences: number of experiences used, from the start of the stream.
        trials: all tried values with their scores.
    """

    values: Values
    score: float
    experiences: int
    trials: tuple[tuple[Values, float], ...]

    def row(self) -> dict[str, object]:
        """Return the facts that a benchmark stores with a result."""
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
    seed: int = 0,
) -> Tuned:
    """Search for hyper-parameters on the first experiences of a stream.

    The search uses Optuna's tree-structured Parzen estimator.

    Args:
        make: function from hyper-parameters to a new learner; a learner that diverges gets the
            score 0, or infinity if lower is better.
        space: names of hyper-parameters and their ranges.
        stream: stream to search on; only the training records of its first `experiences` are used.
        experiences: number of experiences to search on.
        trials: number of learners to train.
        held_out: share of the training records that is held out to compute the score.
        seed: seed of the held-out choice and of the search.

    Raises:
        ConfigError: if a search with these arguments is impossible.
        PrivacyError: if the learner is private: every trial would cost privacy, and the chosen
            values would be a release without noise.
    """
    _check(space, stream, experiences, trials, held_out)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    first = beginning(stream, experiences, held_out, seed)
    tried = []

    def score(trial: optuna.Trial) -> float:
        values = {
            name: trial.suggest_float(name, *bounds, log=True) for name, bounds in space.items()
        }
        learner = make(values)
        if learner.privacy is not None:
            raise PrivacyError(
                "hyper-parameters cannot be tuned on private records, because every trial and the "
                "choice itself cost privacy; tune on public records, or use published settings"
            )
        tried.append((values, _score(learner, first)))
        return tried[-1][1]

    higher = stream.task.metric.higher_is_better
    direction: Literal["maximize", "minimize"] = "maximize" if higher else "minimize"
    study = optuna.create_study(direction=direction, sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(score, n_trials=trials)
    best, found = (max if higher else min)(tried, key=lambda pair: pair[1])
    return Tuned(values=best, score=found, experiences=experiences, trials=tuple(tried))


def _score(learner: Learner, stream: Stream) -> float:
    metric = stream.task.metric
    try:
        return average_accuracy(learner.fit(stream), metric=metric)
    except RunawayError:
        return 0.0 if metric.higher_is_better else math.inf


def beginning(stream: Stream, experiences: int, held_out: float, seed: int) -> Stream:
    """Return the first experiences; a share of their training records replaces the test records."""
    return replace(
        stream, experiences=tuple(_cut(e, held_out, seed) for e in stream.experiences[:experiences])
    )


def _cut(experience: Experience, held_out: float, seed: int) -> Experience:
    train = experience.train
    order = torch.randperm(len(train), generator=generator(seed, "held out", experience.index))
    size = max(1, round(held_out * len(train)))
    measured = _rows(train, order[:size])
    learnt = _rows(train, order[size:])
    return replace(experience, train=learnt, test=measured)


def _rows(records: Records, places: torch.Tensor) -> Records:
    return records.take(places.sort().values.to(records.inputs.device))


def _check(space: Space, stream: Stream, experiences: int, trials: int, held_out: float) -> None:
    if not space or any(not 0 < low < high for low, high in space.values()):
        raise ConfigError.of(
            "space", dict(space), "names, each with a lowest and a higher value, both above 0"
        )
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
