"""Search for the best settings of a config, by `perdure tune`.

runs/NAME-search/config.toml   the config
runs/NAME-search/search.json   facts of the search; under privacy its epsilon, before any training
runs/NAME-search/study.db      the finished trials, as Optuna reads them
runs/NAME-search/arms/         the training of each trial, with its ledger
runs/NAME-search/ledger.jsonl  the ledgers of all trainings, if these are charged alike
runs/NAME-search/result.json   the result
runs/NAME-search/best.toml     the config with the best values; for several goals front-N.toml, too

With `privacy = "select"` the trainings are in `private/`, which is deleted at the end. The folder
then has the selected model in `best/`, and neither a study nor `best.toml`: a run of it would use
the records again without counting the search.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from perdure.data.experience import declared_size_of
from perdure.errors import ConfigError, RunawayError, RunError
from perdure.experiment.config import Config, from_table, table_of
from perdure.experiment.overrides import set_path, short_values, toml_text
from perdure.experiment.private_searches import (
    announced,
    changes_of_charges,
    forget_trainings,
    largest_charges,
    refuse_beyond,
    refuse_larger,
    refuse_other_charges,
    refuse_private,
    release_best,
    selected,
    selection_key,
    training_plan,
)
from perdure.experiment.results import epsilon_of_all_arms, ledger_files
from perdure.experiment.search_config import SearchConfig
from perdure.experiment.search_space import Values, described_space
from perdure.experiment.search_trials import DEFAULT, TrialRuns, name_of, trial_workers
from perdure.experiment.searches import Asked, Sampler, Score, Search, Trial
from perdure.experiment.spent_charges import charge_table, own_charges
from perdure.planning.budget import scheduled
from perdure.privacy.accounting.charges import History, merged
from perdure.privacy.ledger.merged import merge
from perdure.utils.atomic_files import private_folder, write_atomically, write_json
from perdure.utils.checked_arguments import checked_arguments
from perdure.utils.environment import machine, versions
from perdure.utils.folder_lock import locked

Shown = Callable[[str], None]
"""Function that is called with a line for the user."""
PRIVATE = "private"


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Result of a search for the best settings of a config.

    Args:
        folder: folder of the search.
        arm: name of the searched arm.
        goals: goal to True if a higher number is better, in their order.
        unit: unit of the accuracies.
        tuned_on: records that gave the scores, in words.
        trials: all trials in their order; empty with `privacy = "select"`.
        default: scores with the settings of the config itself; None with `privacy = "select"`.
        best: trial with the best first goal; None if a selection had no training.
        front: trials that no other one beats in all goals.
        announced: privacy statement before the first training; "" without privacy.
        epsilon: privacy statement on the whole search; "" without privacy.
    """

    folder: Path
    arm: str
    goals: Mapping[str, bool]
    unit: str
    tuned_on: str
    trials: tuple[Trial, ...]
    default: Score | None
    best: Trial | None
    front: tuple[Trial, ...]
    announced: str = ""
    epsilon: str = ""

    @property
    def improved(self) -> bool:
        """True if the best trial is better than the settings of the config, in the first goal."""
        if self.best is None or self.default is None:
            return False
        gain = self.best.score.values[0] - self.default.values[0]
        return gain > 0 if next(iter(self.goals.values())) else gain < 0

    @property
    def remarks(self) -> list[str]:
        """Remarks for the user: records, trials that diverged, gain, and epsilon."""
        told = [f"scores: {self.tuned_on}"]
        lost = sum(trial.score.failed for trial in self.trials)
        if lost:
            told.append(f"{lost} of {len(self.trials)} trials diverged")
        if self.default is not None and not self.improved:
            told.append("no trial is better than the settings of the config; keep them")
        if self.best is None:
            told.append("the secret number of trainings was 0, so nothing was selected")
        if self.epsilon:
            told.append(f"search, in all: {self.epsilon}")
        return told

    def row(self) -> dict[str, Any]:
        """Return the result as JSON can hold it; the place of a selected trial is left out."""
        secret = not self.trials
        best = asdict(self.best) if self.best else None
        if best and secret:
            del best["number"]
        return {
            "arm": self.arm,
            "goals": dict(self.goals),
            "unit": self.unit,
            "tuned_on": self.tuned_on,
            "default": asdict(self.default) if self.default else None,
            "best": best,
            "front": [] if secret else [trial.number for trial in self.front],
            "trials": [asdict(trial) for trial in self.trials],
            "announced": self.announced,
            "epsilon": self.epsilon,
        }


@checked_arguments
def tune_run(
    text: str,
    folder: Path | str,
    *,
    source: str = "",
    trials: int | None = None,
    sampler: Sampler | None = None,
    seed: int | None = None,
    workers: int = 1,
    told: Shown = lambda line: None,
) -> Tuning:
    """Search for the best settings of an arm of a config, as its table `[search]` says.

    Every trial is a run of the arm with other values, on the first experiences of the stream. A
    search that was stopped at any moment, `kill -9` included, goes on to the result of a search
    that never stopped. Several workers train several trials at once; these are drawn together, so
    that the result depends on the number of workers, and not on their speed.

    Guarantee: for a private arm, `epsilon` of the result covers all trainings (`charge_all`), or
    the release of the best one (`select`), for records and the relation of `[privacy]`. Test
    records are declared public: they give the scores.

    Args:
        text: TOML text of the config.
        folder: folder of the search.
        source: name of the config's file, for messages.
        trials: number of trials; None for `search.trials`.
        sampler: sampler; None for `search.sampler`.
        seed: seed of the search; None for `search.seed`.
        workers: number of processes that train.
        told: function that is called with a line about each step of the search.

    Raises:
        BudgetError: if a training would charge more than the ends of the space.
        ConfigError: if the config has no search, or a path or value of its space is not allowed.
        PrivacyError: if the cost of a search on private records cannot be stated.
        RunawayError: if every trial diverged.
        RunError: if the folder has another search, or is in use.
    """
    table = table_of(text, source)
    config = from_table(table, source)
    asked = config.search
    if asked is None:
        allowed = "a config with the tables [search] and [search.space]"
        raise ConfigError.of("search", f"none in {source or 'the config'}", allowed)
    search = replace(
        asked,
        trials=asked.trials if trials is None else trials,
        sampler=asked.sampler if sampler is None else sampler,
        seed=asked.seed if seed is None else seed,
    )
    place = _place(config, search)
    refuse_private(config, config.arms[place], search)
    runs = TrialRuns(
        table={name: each for name, each in table.items() if name != "search"},
        source=source,
        folder=Path(folder) / PRIVATE if search.privacy == "select" else Path(folder),
        search=search,
        place=place,
    )
    runs.check(search.ranges, refuse_private)
    if "robust_accuracy" in search.goals and config.attack is None:
        raise ConfigError.of("search.goals", search.goals, "robust_accuracy with [attack] only")
    drawing = Search(
        space=search.ranges,
        higher_is_better=tuple(map(runs.higher_is_better, search.goals)),
        sampler=search.sampler,
        seed=search.seed,
        batch=workers,
    )
    with locked(Path(folder)):
        return _Tuner(runs=runs, search=drawing, text=text, folder=Path(folder), told=told).run()


def _place(config: Config, search: SearchConfig) -> int:
    """Return the place of the searched arm."""
    names = [arm.name for arm in config.arms]
    if search.arm is None and len(names) == 1:
        return 0
    if search.arm not in names:
        raise ConfigError.of("search.arm", search.arm, names)
    return names.index(search.arm)


@dataclass(frozen=True, kw_only=True)
class _Tuner:
    """One search in its folder."""

    runs: TrialRuns
    search: Search
    text: str
    folder: Path
    told: Shown

    def run(self) -> Tuning:
        privacy = self.runs.config({}).privacy
        if self._asked.privacy == "select" and privacy and not self._finished:
            private_folder(self.runs.folder)
            # before the first statement, so that a lost key can be told from a new search
            selection_key(self.runs, privacy, begun=(self.folder / "search.json").exists())
        bound = largest_charges(self.runs, self._changes) if self.runs.private else ()
        statement = self._begin(bound)
        if self._asked.privacy == "select":
            return self._select(bound, statement)
        return self._search(bound, statement)

    @cached_property
    def _changes(self) -> list[Values]:
        """Combinations of settings that change the charges; empty if trials are charged alike."""
        return changes_of_charges(self.runs) if self.runs.private else []

    @property
    def _finished(self) -> bool:
        return (self.folder / "result.json").exists()

    @property
    def _asked(self) -> SearchConfig:
        return self.runs.search

    def _begin(self, bound: History) -> str:
        """Store the facts of the search, and its epsilon, before any training; return the epsilon.

        Raises:
            RunError: if the folder has another search.
        """
        path = self.folder / "search.json"
        statement = self._announcement(bound)
        facts = self._identity()
        stored = json.loads(path.read_text()) if path.exists() else facts
        apart = [name for name in facts if stored.get(name) != facts[name]]
        if apart:
            raise RunError(
                f"{self.folder} has a search with another {', '.join(apart)}; give another folder "
                "with --out, or delete it"
            )
        write_json(path, {**facts, "announced": statement})
        write_atomically(self.folder / "config.toml", self.text.encode())
        if statement:
            self.told(f"search, in advance: {statement}")
        return statement

    def _announcement(self, bound: History) -> str:
        privacy = self.runs.config({}).privacy
        if not self.runs.private or privacy is None:
            return ""
        units = declared_size_of(self.runs.stream.experiences)
        trainings = self._asked.trials + 1
        stated = announced(self._asked, privacy, bound, trainings, units)
        if self._asked.privacy == "select":
            return (
                f"{stated}, for the release of the best of a secret number of trainings "
                f"({self._asked.repeats}, mean {self._asked.trials})"
            )
        return f"at most {stated}, for {trainings} trainings"

    def _identity(self) -> dict[str, Any]:
        asked = self._asked
        table = {name: each for name, each in self.runs.table.items() if name != "loggers"}
        return {
            "config": toml_text(table),
            "space": described_space(asked.ranges),
            "goals": list(asked.goals),
            "sampler": asked.sampler,
            "seed": asked.seed,
            "arm": self.runs.place,
            "experiences": self.runs.experiences,
            "held_out": asked.held_out,
            "workers": self.search.batch,
            "privacy": asked.privacy,
            "repeats": asked.repeats,
            # under privacy the number of trainings is part of the plan that was announced
            "trials": asked.trials if asked.privacy else None,
        }

    # -------------------------------------------------------------- all trials are shown

    def _search(self, bound: History, statement: str) -> Tuning:
        self._refuse_before(bound, {DEFAULT: {}})
        default = self.runs.score(DEFAULT, {})
        self._refuse_after(bound, DEFAULT)
        self.told(f"default: {self._in_words(default)}")
        with trial_workers(self.runs, self.search.batch) as scores:

            def evaluate(asked: Asked) -> Iterator[Score]:
                self._refuse_before(bound, {name_of(n): values for n, values in asked})
                for (number, values), score in zip(asked, scores(asked), strict=True):
                    self._refuse_after(bound, name_of(number))
                    told = f"trial {number + 1}/{self._asked.trials}: {self._in_words(score)}"
                    self.told(f"{told}; {short_values(values)}")
                    yield score

            trials = self.search.run(
                self._asked.trials,
                evaluate,
                file=self.folder / "study.db",
                identity={"search": self._identity() | {"config": None}},
            )
        if all(trial.score.failed for trial in trials):
            raise RunawayError(
                f"the training of all {len(trials)} trials diverged; search smaller learning "
                "rates, or normalise the inputs"
            )
        front = _front(trials, self.search.higher_is_better)
        first = self.search.higher_is_better[0]
        best = (max if first else min)(front, key=lambda trial: trial.score.values[0])
        result = self._result(statement, trials, default, best, front)
        self._write_configs(bound, trials, best, front)
        write_json(self.folder / "result.json", result.row() | self._environment())
        return result

    def _refuse_before(self, bound: History, next_ones: Mapping[str, Values]) -> None:
        """Refuse trainings that could spend more than was announced, before they begin."""
        if self.runs.private:
            for values in next_ones.values():
                refuse_larger(self.runs, bound, values)
            refuse_beyond(self.runs, bound, next_ones)

    def _refuse_after(self, bound: History, name: str) -> None:
        """Refuse to go on after a training that spent more than was announced."""
        if self.runs.private:
            refuse_other_charges(self.runs, bound, name)

    def _in_words(self, score: Score) -> str:
        numbers = zip(self._asked.goals, score.values, strict=True)
        told = ", ".join(f"{goal.replace('_', ' ')} {value:.4g}" for goal, value in numbers)
        return f"diverged ({told})" if score.failed else told

    def _result(
        self,
        statement: str,
        trials: tuple[Trial, ...],
        default: Score | None,
        best: Trial | None,
        front: tuple[Trial, ...],
        epsilon: str = "",
    ) -> Tuning:
        asked = self._asked
        records = "public test" if self.runs.private else "training"
        count = self.runs.experiences
        first = "first experience" if count == 1 else f"first {count} experiences"
        share = f"{100 * asked.held_out:g} %"
        return Tuning(
            folder=self.folder,
            arm=self.runs.arm(self.runs.config({})).name,
            goals={goal: self.runs.higher_is_better(goal) for goal in asked.goals},
            unit=self.runs.whole.task.metric.unit,
            tuned_on=f"held-out {share} of the {records} records of the {first}",
            trials=trials,
            default=default,
            best=best,
            front=front,
            announced=statement,
            epsilon=epsilon or self._total(statement, trials),
        )

    def _folders(self, trials: Sequence[Trial]) -> list[Path]:
        names = [DEFAULT, *(name_of(trial.number) for trial in trials)]
        return [self.folder / "arms" / name for name in names]

    def _total(self, statement: str, trials: Sequence[Trial]) -> str:
        """Return the statement on all trainings, and store their ledgers in one file.

        Where trials are charged differently, it is the statement from before the search.
        """
        privacy = self.runs.config({}).privacy
        if not self.runs.private or privacy is None:
            return ""
        if self._changes:  # later charges depend on earlier scores, so their sum is no bound
            return statement
        ledgers = [path for each in self._folders(trials) for path in ledger_files(each)]
        account = merge(ledgers)
        account.export(self.folder / "ledger.jsonl")
        return epsilon_of_all_arms(account, privacy.delta)["text"]

    def _write_configs(
        self, bound: History, trials: Sequence[Trial], best: Trial, front: Sequence[Trial]
    ) -> None:
        """Write the config with the best values, and with several goals those of the front."""
        spent = self._spent(bound, trials) if self.runs.private else ()
        chosen = {"best.toml": best}
        if len(self._asked.goals) > 1:
            chosen |= {f"front-{trial.number:04d}.toml": trial for trial in front}
        for name, trial in chosen.items():
            write_atomically(self.folder / name, self._config(trial.values, spent).encode())

    def _spent(self, bound: History, trials: Sequence[Trial]) -> History:
        """Return the charges of the search for the config of a later run.

        Where trials are charged differently, the charges of later ones and of the run depend on
        earlier scores, and their sum is no valid bound. Then every training counts as the largest
        one, and one on the whole stream is added: the choice of the run is among such ones.
        """
        if not self._changes:
            return own_charges(self._folders(trials))
        full = largest_charges(self.runs, self._changes, whole=True)
        return merged((*bound * (len(trials) + 1), *full))

    def _config(self, values: Values, spent: History) -> str:
        """Return the text of the config with some values, and with the charges of the search.

        Under privacy a run has the noise that it would have without the search, so that its epsilon
        covers the search and its own training together.
        """
        table = self.runs.table_with(values)
        table["name"] = f"{table['name']}-tuned"
        if spent:
            config = from_table(table)
            plan = training_plan(config, self.runs.arm(config), self.runs, whole=True)
            set_path(table, "privacy.noise_multiplier", max(scheduled(plan).noise))
            if config.privacy is not None and config.privacy.noise_multiplier is None:
                del table["privacy"]["epsilon"]
            set_path(table, "privacy.spent", list(map(charge_table, spent)))
        return toml_text(table)

    def _environment(self) -> dict[str, Any]:
        known = {name: each for name, each in machine().items() if each is not None}
        return {"environment": versions() | known}

    # -------------------------------------------------------------- only the best one is shown

    def _select(self, bound: History, statement: str) -> Tuning:
        path = self.folder / "result.json"
        if not self._finished:
            self.told("the trainings run; their number, values and scores stay secret")
            privacy = self.runs.config({}).privacy
            assert privacy is not None
            best = selected(self.runs, privacy, bound)
            result = self._result(statement, (), None, best, (), statement)
            key = selection_key(self.runs, privacy)
            release_best(self.runs, key, best, result.row(), self.folder)
            write_json(path, result.row() | self._environment())
        # what stays secret is not kept; a stop before this line leaves it for the next call
        forget_trainings(self.runs, self.folder)
        row = json.loads(path.read_text())["best"]
        best = _trial(row) if row else None
        return self._result(statement, (), None, best, (), statement)


def _trial(row: Mapping[str, Any]) -> Trial:
    score = Score(values=tuple(row["score"]["values"]), failed=row["score"]["failed"])
    return Trial(number=-1, values=dict(row["values"]), score=score)


def _front(trials: Sequence[Trial], higher: Sequence[bool]) -> tuple[Trial, ...]:
    """Return the trials that no other one beats in all goals, without those that diverged."""

    def costs(trial: Trial) -> list[float]:
        return [-v if up else v for v, up in zip(trial.score.values, higher, strict=True)]

    known = [trial for trial in trials if not trial.score.failed]
    return tuple(
        each
        for each in known
        if not any(
            costs(other) != costs(each)
            and all(a <= b for a, b in zip(costs(other), costs(each), strict=True))
            for other in known
        )
    )
