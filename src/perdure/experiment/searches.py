"""Searches for hyper-parameters by Optuna: samplers, trials in an order, and the file of a search.

The file keeps finished trials only. A search that goes on draws all trials again from the start,
with the stored scores instead of trainings. So the sampler is in the state of a search that never
stopped, for every sampler, and the file needs no state of a sampler.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from perdure.errors import ConfigError, RunError
from perdure.experiment.search_space import Range, Values, suggested
from perdure.utils.seeding import derive

if TYPE_CHECKING:
    import optuna

Sampler = Literal["tpe", "cmaes", "nsga2", "random"]
Direction = Literal["minimize", "maximize"]
SAMPLERS: tuple[Sampler, ...] = ("tpe", "cmaes", "nsga2", "random")
STUDY = "perdure"
"""Name of Optuna's study inside the SQLite file."""
SEARCH = "search"
FAILED = "failed"
POPULATION = 10
"""Trials in a generation of NSGA-II."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Scores of one training.

    Args:
        values: one number for each goal of the search.
        failed: True if the training diverged.
    """

    values: tuple[float, ...]
    failed: bool


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One finished trial of a search.

    Args:
        number: place in the search, from 0.
        values: hyper-parameters.
        score: scores of the training with them.
    """

    number: int
    values: Values
    score: Score


Asked = Sequence[tuple[int, Values]]
"""Numbers and values of trials that are trained next."""
Evaluate = Callable[[Asked], Iterable[Score]]
"""Function that trains with the values of each trial, and yields their scores in order."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """Settings that decide which values a search tries.

    Args:
        space: names of hyper-parameters, and their ranges or choices.
        higher_is_better: for each goal, True if higher scores are better.
        sampler: `tpe` (tree-structured Parzen estimator), `cmaes` (covariance matrix adaptation),
            `nsga2` (NSGA-II, for several goals) or `random`.
        seed: seed of the sampler.
        batch: number of trials that are drawn together, before any of them is trained.
    """

    space: Mapping[str, Range | list[Any]]
    higher_is_better: tuple[bool, ...] = (True,)
    sampler: Sampler = "tpe"
    seed: int = 0
    batch: int = 1

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ConfigError.of("sampler", self.sampler, SAMPLERS)
        if len(self.higher_is_better) > 1 and self.sampler != "nsga2":
            raise ConfigError.of("sampler", self.sampler, "nsga2 for several goals")
        for module in ("optuna", "cmaes") if self.sampler == "cmaes" else ("optuna",):
            if find_spec(module) is None:
                allowed = f"a search with {module}; pip install 'perdure[tuning]'"
                raise ConfigError.of("sampler", self.sampler, allowed)
        if self.batch < 1:
            raise ConfigError.of("workers", self.batch, "1 or more")
        ranges = [each for each in self.space.values() if isinstance(each, Range)]
        if self.sampler == "cmaes" and len(ranges) < 2:
            allowed = "tpe or random, because cmaes needs two ranges or more in the space"
            raise ConfigError.of("sampler", self.sampler, allowed)

    def run(
        self, trials: int, evaluate: Evaluate, *, file: Path | None, identity: Mapping[str, Any]
    ) -> tuple[Trial, ...]:
        """Draw values and train with them until the search has this many trials.

        Args:
            trials: number of trials, those of earlier processes included.
            evaluate: function that trains with the values of some trials.
            file: SQLite file that keeps the finished trials; None to keep nothing.
            identity: facts that must be equal when the search of a file goes on.

        Raises:
            RunError: if the file has another search, or cannot be read.
        """
        with _opened(file, self._directions, identity) as stored:
            return tuple(self._trials(trials, evaluate, stored))

    def _trials(self, trials: int, evaluate: Evaluate, stored: "optuna.Study") -> Iterator[Trial]:
        import optuna

        replayed = optuna.create_study(directions=self._directions, sampler=self._made_sampler())
        known = _finished(stored)
        for first in range(0, trials, self.batch):
            asked = [replayed.ask() for _ in range(min(self.batch, trials - first))]
            drawn = [
                {name: suggested(each, name, given) for name, given in self.space.items()}
                for each in asked
            ]
            new = [(first + i, values) for i, values in enumerate(drawn)][
                max(0, len(known) - first) :
            ]
            scores = iter(evaluate(new) if new else ())
            for i, (each, values) in enumerate(zip(asked, drawn, strict=True)):
                if first + i < len(known):
                    score = _stored_score(known[first + i], each)
                else:
                    score = next(scores)
                    stored.add_trial(_frozen(each, score))
                replayed.tell(each, score.values)
                yield Trial(number=first + i, values=values, score=score)

    @property
    def _directions(self) -> list[Direction]:
        return ["maximize" if higher else "minimize" for higher in self.higher_is_better]

    def _made_sampler(self) -> "optuna.samplers.BaseSampler":
        from optuna import samplers

        seed = derive(self.seed, "sampler") % 2**32
        if self.sampler == "cmaes":
            return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        if self.sampler == "nsga2":
            return samplers.NSGAIISampler(seed=seed, population_size=POPULATION)
        if self.sampler == "random":
            return samplers.RandomSampler(seed=seed)
        return samplers.TPESampler(seed=seed)


def random_values(space: Mapping[str, Range | list[Any]], seed: int) -> Values:
    """Draw one point of a space at random, from a seed below 2^32."""
    import optuna

    # a line for each study would tell the number of secret trials
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    trial = study.ask()
    return {name: suggested(trial, name, given) for name, given in space.items()}


def _frozen(trial: "optuna.Trial", score: Score) -> "optuna.trial.FrozenTrial":
    """Return a finished trial for the file, without the state of the sampler."""
    import optuna

    return optuna.trial.create_trial(
        params=trial.params,
        distributions=trial.distributions,
        values=list(score.values),
        user_attrs={FAILED: score.failed},
    )


def _stored_score(stored: "optuna.trial.FrozenTrial", drawn: "optuna.Trial") -> Score:
    """Return the stored score of a trial, after the check that its values are drawn again.

    Raises:
        RunError: if other values are drawn, such as by another version of Optuna.
    """
    if stored.params != drawn.params:
        raise RunError(
            f"trial {drawn.number} of the stored search has the values {stored.params}, but this "
            f"installation draws {drawn.params}; go on with the version of optuna that began it, "
            "or delete the file"
        )
    return Score(values=tuple(stored.values), failed=bool(stored.user_attrs.get(FAILED)))


def _finished(study: "optuna.Study") -> list["optuna.trial.FrozenTrial"]:
    import optuna

    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))


@contextmanager
def _opened(
    path: Path | None, directions: list[Direction], identity: Mapping[str, Any]
) -> Iterator["optuna.Study"]:
    """Open the study of a search, in memory or in its file.

    Raises:
        RunError: for a file with another search, or one that cannot be read.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if path is None:
        yield optuna.create_study(directions=directions)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = " ".join(str(error).split())[:120]
        raise RunError(
            f"{path} cannot be read ({reason}); give the SQLite file of a search, or a new name"
        ) from None
    try:
        try:
            study = optuna.create_study(
                storage=storage, study_name=STUDY, directions=directions, load_if_exists=True
            )
        except ValueError:  # another number of goals
            raise RunError(f"{path} has a search with other goals; give another file") from None
        stored = study.user_attrs.get(SEARCH, identity)
        apart = [name for name, value in identity.items() if stored.get(name) != value]
        if apart:
            raise RunError(
                f"{path} has a search with another {', '.join(apart)}; give another file, or "
                "delete it"
            )
        study.set_user_attr(SEARCH, dict(identity))
        yield study
    finally:
        storage.remove_session()
        storage.engine.dispose()
