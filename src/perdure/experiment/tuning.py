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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from perdure.data.experience import Stream
from perdure.data.held_out import hold_out
from perdure.errors import ConfigError, PrivacyError, RunawayError, RunError
from perdure.learner.learner import Learner
from perdure.metrics import average_accuracy
from perdure.utils.seeding import derive

if TYPE_CHECKING:
    import optuna

Values = dict[str, Any]
"""Hyper-parameters by name."""
Space = Mapping[str, tuple[float, float] | list[Any]]
"""Name of a hyper-parameter to the values that are searched:

    {"rate": (1e-4, 0.1)}              numbers on a logarithmic scale: the lowest is above 0
    {"momentum": (0.0, 0.9)}           numbers on a linear scale: the lowest is 0 or below
    {"epochs": (1, 8)}                 whole numbers, where both ends are whole
    {"optimizer": ["sgd", "adam"]}     a list of choices: text, numbers, True, False or None
"""
STUDY = "perdure"
"""Name of Optuna's study inside the SQLite file."""
SEARCH = "search"
FAILED = "failed"


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
    seed: int = 0,
    study: Path | str | None = None,
) -> Tuned:
    """Search for hyper-parameters on the first experiences of a stream.

    The search uses Optuna's tree-structured Parzen estimator. With a file for the study, a search
    that was stopped at any moment, `kill -9` included, goes on after its last finished trial, to
    the same result.

    Args:
        make: function from hyper-parameters to a new learner with a new model, in no folder; a
            learner that diverges gets the score 0, or infinity if lower is better.
        space: names of hyper-parameters and their ranges or choices; see `Space`.
        stream: stream to search on; only the training records of its first `experiences` are used.
        experiences: number of experiences to search on.
        trials: number of learners to train, those of an earlier part of the search included.
        held_out: share of the training records that is held out to compute the score; all copies of
            a record are on one side.
        seed: seed of the held-out choice and of the search.
        study: SQLite file that keeps the finished trials; None to keep nothing.

    Raises:
        ConfigError: if a search with these arguments is impossible, or a learner is not a new one.
        PrivacyError: if the learner is private: every trial would cost privacy, and the chosen
            values would be a release without noise.
        RunawayError: if every trial diverged.
        RunError: if the file has another search, or cannot be read.
    """
    _check(space, stream, experiences, trials, held_out)
    first = beginning(stream, experiences, held_out, seed)
    metric = stream.task.metric
    direction: Literal["maximize", "minimize"] = (
        "maximize" if metric.higher_is_better else "minimize"
    )
    search = {
        "space": {name: list(values) for name, values in space.items()},
        "stream": stream.name,
        "metric": metric.name,
        "experiences": experiences,
        "held_out": held_out,
        "seed": seed,
    }
    fresh = _FreshLearners()
    with _opened(study, direction, search) as opened:
        for number in range(len(_finished(opened)), trials):
            _run_trial(opened, lambda values: fresh.check(make(values)), space, first, seed, number)
        done = _finished(opened)
    tried = tuple((dict(trial.params), float(trial.value or 0.0)) for trial in done)
    if all(trial.user_attrs[FAILED] for trial in done):
        raise RunawayError(
            f"the training of all {len(done)} trials diverged (parameters were NaN or infinite); "
            "search smaller learning rates, or normalise the inputs"
        )
    best, found = (max if metric.higher_is_better else min)(tried, key=lambda pair: pair[1])
    return Tuned(values=best, score=found, experiences=experiences, trials=tried)


def _run_trial(
    study: "optuna.Study",
    make: Callable[[Values], Learner],
    space: Space,
    stream: Stream,
    seed: int,
    number: int,
) -> None:
    """Run one trial of a search: draw values, train a learner with them, and store the score.

    The sampler is new for every trial, so that a search that goes on draws as one that never
    stopped.
    """
    import optuna

    study.sampler = optuna.samplers.TPESampler(seed=derive(seed, "trial", number) % 2**32)
    trial = study.ask()
    values = {name: _suggested(trial, name, given) for name, given in space.items()}
    try:
        score, failed = _score(make(values), stream)
    except Exception:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        raise
    trial.set_user_attr(FAILED, failed)
    study.tell(trial, score)


def _suggested(trial: "optuna.Trial", name: str, given: tuple[float, float] | list[Any]) -> Any:
    if isinstance(given, list):
        return trial.suggest_categorical(name, given)
    low, high = given
    if _are_whole(low, high):
        return trial.suggest_int(name, int(low), int(high))
    return trial.suggest_float(name, low, high, log=low > 0)


def _are_whole(*ends: object) -> bool:
    return all(isinstance(end, int) and not isinstance(end, bool) for end in ends)


def _score(learner: Learner, stream: Stream) -> tuple[float, bool]:
    """Train a learner on the stream; return its score, and True if training diverged."""
    metric = stream.task.metric
    try:
        return average_accuracy(learner.fit(stream), metric=metric), False
    except RunawayError:
        return (0.0 if metric.higher_is_better else math.inf), True


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
                "choice itself cost privacy; tune on public records, or use published settings"
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


# --------------------------------------------------------------------------- the study


@contextmanager
def _opened(
    path: Path | str | None, direction: Literal["maximize", "minimize"], search: Values
) -> Iterator["optuna.Study"]:
    """Open Optuna's study of a search, in memory or in its file, without unfinished trials.

    Raises:
        RunError: for a file with another search, or one that cannot be read.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if path is None:
        yield optuna.create_study(direction=direction)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = " ".join(str(error).split())[:120]
        raise RunError(
            f"{path} cannot be read ({reason}); give the SQLite file of a search, or a new name"
        ) from None
    try:
        study = optuna.create_study(
            storage=storage, study_name=STUDY, direction=direction, load_if_exists=True
        )
        stored = study.user_attrs.setdefault(SEARCH, search)
        if stored != search:
            apart = [name for name, value in search.items() if stored.get(name) != value]
            raise RunError(
                f"{path} has a search with another {', '.join(apart)}; give another file, or "
                "delete it"
            )
        study.set_user_attr(SEARCH, search)
        for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        yield study
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _finished(study: "optuna.Study") -> list["optuna.trial.FrozenTrial"]:
    import optuna

    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))


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


def _check(space: Space, stream: Stream, experiences: int, trials: int, held_out: float) -> None:
    for name, given in space.items():
        _check_values(name, given)
    if not space:
        raise ConfigError.of("space", dict(space), "one or more names, each with its values")
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


def _check_values(name: str, given: object) -> None:
    """Refuse values of a hyper-parameter that are neither a range nor a list of choices."""
    if isinstance(given, list):
        good = bool(given) and all(isinstance(v, str | int | float | bool | None) for v in given)
    else:
        good = (
            isinstance(given, tuple)
            and len(given) == 2
            and all(isinstance(v, int | float) and math.isfinite(v) for v in given)
            and given[0] < given[1]
        )
    if not good:
        allowed = "a tuple (lowest, highest) of numbers, or a list of choices"
        raise ConfigError.of(f"space[{name!r}]", given, allowed)
