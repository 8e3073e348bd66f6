"""Attacks on the models of a finished run, for `perdure attack`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from perdure.adversarial import (
    PGD,
    Attack,
    MaskingCheck,
    ThreatModelCard,
    check_masking,
    measure_robustness,
)
from perdure.data.records import Records
from perdure.errors import ConfigError
from perdure.experiment.arm import open_stream
from perdure.experiment.attack_config import AttackConfig
from perdure.experiment.config import read
from perdure.experiment.run import load
from perdure.experiment.trained_models import trials
from perdure.learner.learner import Learner
from perdure.tasks import SingleLabel, refuse_other_tasks
from perdure.utils.seeding import generator


@dataclass(frozen=True, kw_only=True)
class AttackedModel:
    """Robustness of a model of a run.

    Args:
        trial: name of the arm, with its seed where the run has several.
        experiences: card of each experience, on its test records, in order.
        checked: index of the experience whose records are the most robust ones, which is checked
            for hidden gradients; None if no check was asked for.
        checks: checks for hidden gradients on its test records; () if they were not asked for.
    """

    trial: str
    experiences: tuple[ThreatModelCard, ...]
    checked: int | None = None
    checks: tuple[MaskingCheck, ...] = ()

    @property
    def robust_accuracy(self) -> float:
        """Mean of the robust accuracies of the experiences, in percent."""
        return sum(card.robust_accuracy for card in self.experiences) / len(self.experiences)

    @property
    def clean_accuracy(self) -> float:
        """Mean of the accuracies without the attack, in percent."""
        return sum(card.clean_accuracy for card in self.experiences) / len(self.experiences)


def attack_models(
    run: Path | str,
    attack: Attack,
    *,
    arm: str | None = None,
    seed: int | None = None,
    records: int | None = None,
    checks: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> list[AttackedModel]:
    """Attack the final models of a finished run on the test records of all experiences.

    Guarantee: none is needed. Test records are public, and models are releases.

    Args:
        run: folder of the run.
        attack: attack; its bounds must include the test records.
        arm: name of an arm or trial; None for all.
        seed: seed of the models; None for all.
        records: number of test records of each experience; None for all.
        checks: True to look for hidden gradients; the attack must be PGD.
        progress: function that is called with a line of text for each model.

    Raises:
        ConfigError: if the task has no classes, or the attack does not fit.
        RunError: if the run is not finished, or has no such model.
    """
    if records is not None and records < 1:
        raise ConfigError.of("records", records, "1 or more")
    if checks and not isinstance(attack, PGD):
        raise ConfigError.of("attack", type(attack).__name__, "PGD, for checks of hidden gradients")
    folder = Path(run)
    config = read(folder / "config.toml")
    stream = open_stream(config)
    refuse_other_tasks(stream.task, (SingleLabel,), "attack", "it asks for the class of a record")
    chosen = [
        trial
        for trial, (each, its_seed) in trials(config).items()
        if arm in (None, each.name, trial) and seed in (None, its_seed)
    ]
    if not chosen:
        name, given = ("arm", arm) if arm is not None else ("seed", seed)
        raise ConfigError.of(name, given, "a model of the run: " + ", ".join(trials(config)))
    found = []
    for trial in chosen:
        progress(trial)
        found.append(_attacked(load(folder, trial), trial, attack, records, checks=checks))
    return found


def _attacked(
    learner: Learner, trial: str, attack: Attack, records: int | None, *, checks: bool
) -> AttackedModel:
    stages = learner.stream.to(learner.device).stages
    last = len(learner.stream) - 1
    cards = []
    tests = [_first(stage.test, records) for stage in stages]
    for stage, test in zip(stages, tests, strict=True):
        card = measure_robustness(
            learner.predictor(stage.last, after=last),
            test.inputs,
            test.labels,
            attack,
            generator=generator(learner.seed, "attack", stage.number),
        )
        cards.append(card)
    if not checks:
        return AttackedModel(trial=trial, experiences=tuple(cards))
    assert isinstance(attack, PGD)
    # where nothing is left of the accuracy, a stronger attack can show nothing
    best = max(range(len(cards)), key=lambda number: cards[number].robust_accuracy)
    signs = check_masking(
        learner.predictor(stages[best].last, after=last),
        tests[best].inputs,
        tests[best].labels,
        attack,
        generator=generator(learner.seed, "masking"),
    )
    return AttackedModel(trial=trial, experiences=tuple(cards), checked=best, checks=signs)


def _first(records: Records, count: int | None) -> Records:
    return records if count is None else records.take(torch.arange(min(count, len(records))))


def unit_bounds(run: Path | str, attack: Attack) -> Attack:
    """Return an attack with bounds 0 to 1, or without bounds if test records lie outside them.

    Args:
        run: folder of the run.
        attack: attack with default bounds.
    """
    stream = open_stream(read(Path(run) / "config.toml"))
    chosen = AttackConfig(name="attack", attack=replace(attack), bounds_given=False)
    return chosen.on(stream)
