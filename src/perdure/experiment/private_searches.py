"""Privacy of a search on private records: its cost in advance, and the private selection.

Every training of a search has a ledger of its own. With `charge_all` their charges compose, and
everything may be shown. With `select` only the best training is released; then less is charged, but
the number of trainings and all others stay secret.
"""

import json
import os
import shutil
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from perdure.errors import BudgetError, ConfigError, PrivacyError
from perdure.experiment.config import Arm, Config
from perdure.experiment.federation_table import length_of
from perdure.experiment.results import ledger_files
from perdure.experiment.search_config import SearchConfig
from perdure.experiment.search_space import Values, some_values
from perdure.experiment.search_trials import TrialRuns, name_of
from perdure.experiment.searches import Trial, random_values
from perdure.experiment.spent_charges import own_charges
from perdure.experiment.training_config import TrainingConfig
from perdure.learner.private_setup import declared_records, warn_of_delta
from perdure.planning.budget import planned, scheduled
from perdure.planning.training_plan import TrainingPlan
from perdure.privacy.accounting.calibration import epsilon
from perdure.privacy.accounting.charges import History, bounding, covers, merged
from perdure.privacy.accounting.selection import Selection, selection_epsilon
from perdure.privacy.ledger.account import Statement
from perdure.privacy.ledger.anchors import heads_inside, state_selection
from perdure.privacy.ledger.merged import merge
from perdure.privacy.ledger.storage import SealedHead
from perdure.privacy.noise.key import NoiseKey
from perdure.privacy.settings import Privacy

MOST_ENDS = 64
"""Largest number of combinations of settings whose charges are computed in advance."""
SEED_BITS = 32


def refuse_private(config: Config, arm: Arm, search: SearchConfig) -> None:
    """Refuse a search whose cost in privacy cannot be stated.

    Args:
        config: config of the search, or the one of a trial with its values.
        arm: searched arm of that config.
        search: search of the config.

    Raises:
        ConfigError: if a setting of the search does not fit the privacy of the arm.
        PrivacyError: if private records would be used without a charge.
    """
    if not arm.private:
        if any(each.private for each in config.arms):
            raise PrivacyError(
                f"the arm {arm.name} would be tuned without privacy on records that a private arm "
                "protects; search a private arm, or write a config without private arms"
            )
        if search.privacy is not None:
            raise ConfigError.of(
                "search.privacy", search.privacy, "none, as the arm is not private"
            )
        if "epsilon" in search.goals:
            raise ConfigError.of("search.goals", search.goals, "epsilon for a private arm only")
        return
    privacy = config.privacy
    assert privacy is not None
    if search.privacy is None:
        raise PrivacyError(
            "search.privacy is missing: every trial of a private arm uses its records; allowed: "
            "charge_all (all are charged and shown) or select (the best of a secret number)"
        )
    if config.federation is not None:
        raise ConfigError.of("search", "a federation with privacy", "one learner")
    if privacy.spent:
        raise ConfigError.of(
            "privacy.spent", "charges", "none in a search, where each trial has it"
        )
    if isinstance(privacy.epsilon, tuple):
        raise ConfigError.of("privacy.epsilon", privacy.epsilon, "one number in a search")
    if privacy.diagnostics == "raw":
        raise ConfigError.of("privacy.diagnostics", "raw", "released in a search")
    if config.start is not None and not config.start.public:
        raise ConfigError.of("start.run", config.start.run, "a public start in a private search")
    if "seconds" in search.goals:
        raise ConfigError.of("search.goals", search.goals, "no time, which depends on the records")
    if search.privacy == "select":
        _refuse_selection(search)


def _refuse_selection(search: SearchConfig) -> None:
    if search.sampler != "random":
        raise ConfigError.of(
            "search.sampler",
            search.sampler,
            'random with privacy = "select", whose bound needs trainings that do not depend on '
            "each other's scores",
        )
    if len(search.goals) > 1 or search.goals[0] not in ("accuracy", "robust_accuracy"):
        allowed = 'accuracy or robust_accuracy alone with privacy = "select"'
        raise ConfigError.of("search.goals", search.goals, allowed)
    Selection(mean=search.trials, repeats=search.repeats)


# --------------------------------------------------------------------------- cost in advance


def training_plan(
    config: Config, arm: Arm, runs: TrialRuns, *, whole: bool = False
) -> TrainingPlan:
    """Return the plan of a training of the search, or with `whole` of one on the whole stream."""
    training: TrainingConfig = config.private_training or config.training
    epochs, iterations = length_of(config.federation, training.epochs, training.iterations)
    return TrainingPlan(
        stream=runs.whole if whole else runs.stream,
        strategy=arm.strategy,
        batch_size=training.batch_size,
        epochs=epochs,
        iterations=iterations,
        blocks=training.blocks,
        privacy=config.privacy,
    )


def planned_charges(runs: TrialRuns, values: Mapping[str, Any], *, whole: bool = False) -> History:
    """Return a bound on the charges of one record in the training with some values."""
    config = runs.config(values)
    plan = training_plan(config, runs.arm(config), runs, whole=whole)
    return bounding(planned(plan, scheduled(plan)).values())


def changes_of_charges(runs: TrialRuns) -> list[Values]:
    """Return the combinations of those ends of the space that change the charges of a training.

    The result is empty if all trainings are charged alike.

    Raises:
        ConfigError: if there are too many combinations.
    """
    base = planned_charges(runs, {})
    moving: dict[str, list[Any]] = {}
    for path, given in runs.search.ranges.items():
        ends = some_values(given)
        if any(planned_charges(runs, {path: end}) != base for end in ends):
            moving[path] = ends
    combined = [dict(zip(moving, each, strict=True)) for each in product(*moving.values())]
    if len(combined) > MOST_ENDS:
        raise ConfigError.of(
            "search.space", sorted(moving), f"settings with {MOST_ENDS} combinations of charges"
        )
    return combined if moving else []


def largest_charges(runs: TrialRuns, changes: Sequence[Values], *, whole: bool = False) -> History:
    """Return charges that cover those of every training.

    Args:
        runs: runs of the trials.
        changes: combinations from `changes_of_charges`.
        whole: True for trainings on the whole stream.
    """
    return bounding(planned_charges(runs, values, whole=whole) for values in ({}, *changes))


def refuse_larger(runs: TrialRuns, bound: History, values: Values) -> None:
    """Refuse values whose training would charge more than was announced, or has no bound.

    Raises:
        BudgetError: names the values.
        ConfigError: if the values together make a setting that `refuse_private` refuses.
    """
    config = runs.config(values)
    refuse_private(config, runs.arm(config), runs.search)
    if not covers(bound, planned_charges(runs, values)):
        raise BudgetError(
            f"a training with {values} would charge more than the ends of the space; leave the "
            "settings that change noise, rates or steps out of search.space, or give choices"
        )


def refuse_beyond(runs: TrialRuns, bound: History, names: Collection[str]) -> None:
    """Refuse the next trainings of `charge_all` if the search could exceed its announced epsilon.

    Args:
        runs: runs of the trials.
        bound: charges that cover those of every training.
        names: names of the next trainings; what they have spent so far is inside of `bound`.

    Raises:
        BudgetError: if earlier trainings have spent so much that these do not fit.
        LedgerError: if the ledger of an earlier training is missing.
    """
    places = [place for place in (runs.folder / "arms").glob("*") if place.is_dir()]
    spent = own_charges(place for place in places if place.name not in names)
    most = _times(bound, runs.search.trials + 1)
    total = merged((*spent, *_times(bound, len(names))))
    delta = _delta(runs)
    if not covers(most, total) and epsilon(total, delta=delta) > epsilon(most, delta=delta):
        raise BudgetError(
            f"the trainings in {runs.folder / 'arms'} have spent so much that {', '.join(names)} "
            "would exceed the announced epsilon; begin a new search, and add the charges of this "
            "one"
        )


def _times(bound: History, trainings: int) -> History:
    """Return the charges of several trainings, each charged as `bound`."""
    return tuple(replace(charge, steps=charge.steps * trainings) for charge in bound)


def _delta(runs: TrialRuns) -> float:
    privacy = runs.config({}).privacy
    assert privacy is not None
    return privacy.delta


def announced(
    search: SearchConfig, privacy: Privacy, bound: History, trainings: int, units: int
) -> Statement:
    """Return the statement on the whole search, before its first training.

    Args:
        search: search of the config.
        privacy: privacy of every training.
        bound: charges that cover those of every training.
        trainings: number of trainings with `charge_all`.
        units: declared number of records.
    """
    if search.privacy == "select":
        selection = Selection(mean=search.trials, repeats=search.repeats)
        spent = selection_epsilon(bound, privacy.delta, selection)
        accountant = "rdp"
    else:
        spent = epsilon(_times(bound, trainings), delta=privacy.delta)
        accountant = "pld"
    return Statement(
        epsilon=spent,
        delta=privacy.delta,
        unit=privacy.unit,
        relation=privacy.relation,
        accountant=accountant,
        sampling="no sampling" if privacy.bands else "Poisson sampling",
        trust="trusted curator",
        simulated=privacy.seed is not None,
        units=units,
    )


# --------------------------------------------------------------------------- private selection


def selected(runs: TrialRuns, privacy: Privacy, bound: History) -> Trial | None:
    """Train a secret number of times, and return the best trial; None if the number is 0.

    Guarantee: `announced` of the search with `select`, if only the result is released. The number
    of trainings and their values come from a key in the private folder, so a search that was
    stopped goes on with the same ones; values are drawn before any record is used. Outside of the
    private folder no training leaves a file, and none gives a warning.

    Raises:
        BudgetError: if a training would charge more than `bound`.
        PrivacyError: if a training was charged more than `bound`.
    """
    key = selection_key(runs, privacy)
    selection = Selection(mean=runs.search.trials, repeats=runs.search.repeats)
    drawn = [_values(runs, key, number) for number in range(selection.number(key))]
    for values in drawn:
        refuse_larger(runs, bound, values)
    done = []
    warn_of_delta(privacy.delta, declared_records(runs.stream))
    with heads_inside(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning for each training would tell their number
        for number, values in enumerate(drawn):
            score = runs.score(name_of(number), values)
            refuse_other_charges(runs, bound, name_of(number))
            done.append(Trial(number=number, values=values, score=score))
    higher = runs.higher_is_better(runs.search.goals[0])
    return (max if higher else min)(done, key=lambda t: t.score.values[0], default=None)


def selection_key(runs: TrialRuns, privacy: Privacy, *, begun: bool = True) -> NoiseKey:
    """Return the key of the number of trainings and of their values.

    Args:
        runs: runs of the trials.
        privacy: privacy of every training.
        begun: True if the search has begun, so that its key must be there.

    Raises:
        PrivacyError: if the key of a search that has begun is lost, for another would draw another
            number of trainings.
    """
    if privacy.seed is not None:
        return NoiseKey.from_seed(privacy.seed, "search")
    path = runs.folder / "key"
    if begun and not path.exists():
        raise PrivacyError(
            f"{path} is lost, and with it the secret number of trainings; nothing is released: "
            "restore it, or begin a new search in another folder, and add the epsilon of this one"
        )
    return NoiseKey.from_os(path)


def _values(runs: TrialRuns, key: NoiseKey, number: int) -> Values:
    share = float(key.uniform(1, purpose="values of a trial", entry="", step=number))
    return random_values(runs.search.ranges, int(share * 2**SEED_BITS))


def refuse_other_charges(runs: TrialRuns, bound: History, name: str) -> None:
    """Refuse a finished training whose ledger has more charges than were announced.

    Raises:
        PrivacyError: if there are more, as after an unclean stop of the machine, or for a model
            that carries charges of an earlier training.
    """
    account = merge(ledger_files(runs.folder / "arms" / name))
    for partition in account.partitions:
        if not covers(bound, account.charges(partition)):
            raise PrivacyError(
                "a training of the search was charged more than announced, as after an unclean "
                "stop of the machine, so the announced epsilon does not hold and there is no "
                "result; begin a new search, and add the charges of this one"
            )


def release_best(
    runs: TrialRuns, key: NoiseKey, best: Trial | None, row: Mapping[str, Any], folder: Path
) -> None:
    """Copy the model of the selected training out of the private folder, if this may be released.

    The state directory records what is released before it is. So a folder that was put back from
    before the release, and whose trainings ran again with other noise, releases nothing more.

    Args:
        runs: runs of the trials.
        key: key of the selection.
        best: selected training; None if there was none.
        row: result that will be released.
        folder: folder of the search.

    Raises:
        PrivacyError: if this search has released something else before.
    """
    model = _model(runs, best)
    released = json.dumps(row, sort_keys=True).encode()
    if model:
        released += model.read_bytes()
    head = SealedHead.seal(1, key.mac(released), key)
    record = state_selection(key)
    known = record.read() if record else None
    if known is not None and known.head != head:
        raise PrivacyError(
            f"{known.where} records another release of this search, so {folder} was put back from "
            "before it, and a second release would not be charged; nothing is released: begin a "
            "new search in another folder, and add the epsilon of this one"
        )
    if record:
        record.write(head)
    if model:
        (folder / "best").mkdir(exist_ok=True)
        shutil.copyfile(model, folder / "best" / "model.safetensors")


def _model(runs: TrialRuns, best: Trial | None) -> Path | None:
    """Return the file with the model of a training; None if it has none."""
    if best is None:
        return None
    path = runs.folder / "checkpoint" / name_of(best.number) / "model.safetensors"
    return path if path.exists() else None


def forget_trainings(runs: TrialRuns, folder: Path) -> None:
    """Delete what stays secret, and give all files that are left the same time.

    The times of the first and the last file would tell for how long the search trained.
    """
    if not runs.folder.exists():
        return
    now = time.time()
    for path in folder.rglob("*"):
        if runs.folder not in path.parents:
            os.utime(path, (now, now))
    shutil.rmtree(runs.folder, ignore_errors=True)
