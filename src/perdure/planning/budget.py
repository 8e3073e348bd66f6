"""Noise of a training plan, calibrated to a privacy budget from the charges of each partition."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from perdure.data.experience import Experience, partitions_of
from perdure.errors import BudgetError, ConfigError
from perdure.planning.exposure import reference_exposures
from perdure.planning.training_plan import NOBODY, TrainingPlan
from perdure.privacy.accounting.calibration import calibrate, within
from perdure.privacy.accounting.charges import Charge
from perdure.privacy.ledger.entries import Entry, Stated
from perdure.privacy.private_sum import Schedule

Histories = dict[str, list[Charge]]
ELSEWHERE = "spent elsewhere"
"""Purpose of a ledger entry for a charge that was made outside the ledger."""
LOST = "spent in a lost ledger"
"""Purpose of a ledger entry for charges of the same client's earlier ledger, which it lost."""


def planned(training: TrainingPlan, schedule: Schedule) -> Histories:
    """Return all charges of a plan to every partition, after the partition's earlier charges.

    They depend on public facts only, and include later experiences up to the declared horizon.
    """
    privacy = training.privacy
    stages = horizon(training)
    assert privacy is not None
    histories: Histories = {
        stage.train.partition: training.spent_before(stage.train.partition) for stage in stages
    }
    for stage in stages:
        noise = schedule.noise_in(stage.index)
        excluded = schedule.excluded_in(stage.index)
        for partition, new in charges(training, stages[: stage.index + 1], noise, excluded).items():
            histories[partition] += new
    return histories


def charges(
    training: TrainingPlan,
    stages: Sequence[Experience],
    noise_multiplier: float,
    excluded: frozenset[str] = NOBODY,
) -> Histories:
    """Compute the charges of the last of `stages` to every partition that it exposes."""
    privacy = training.privacy
    cost = training.strategy.privacy_cost
    current = stages[-1].train.partition
    assert privacy is not None
    exposed = training.exposure(stages, excluded)
    parts = training.charged_blocks(stages, excluded)
    total = sum(map(len, parts))
    blocks = [exposed.times(len(part)) for part in parts]
    spent: Histories = {
        p: [Charge(rate, noise_multiplier, sum(blocks), "grid-gaussian")]
        for p, rate in exposed.scope.items()
        if total
    }
    for beside in reference_exposures(
        stages, training.of(stages[-1]), batch_size=training.batch_size, excluded=excluded
    ).values():
        for partition, rate in beside.scope.items():
            spent.setdefault(partition, []).extend(
                [Charge(rate, noise_multiplier, total, "grid-gaussian")] if total else []
            )
    noise = noise_multiplier * privacy.release_noise
    for partition in partitions_of(stages) - excluded if cost.memory_releases else ():
        spent.setdefault(partition, []).append(
            Charge(1.0, noise, cost.memory_releases, "grid-gaussian")
        )
    asked = (
        Charge(1.0, noise, cost.releases, "grid-gaussian"),
        Charge(1.0, noise, cost.histograms, "discrete-gaussian"),
        Charge(1.0, noise / 2, cost.selections, "exponential"),
    )
    spent.setdefault(current, []).extend(charge for charge in asked if charge.steps)
    return spent


def scheduled(training: TrainingPlan) -> Schedule:
    """Return noise multipliers that fit the budget, and the partitions to leave out of pools.

    Partitions are left out only if the noise is given, so that the budget is a cap. After a lost
    ledger, the noise is at least that of the lost one.

    Raises:
        BudgetError: if no noise is large enough, or new records could not be used even once.
        ConfigError: if the number of budgets does not match the stream.
    """
    privacy = training.privacy
    assert privacy is not None
    if privacy.noise_multiplier is not None:
        noise = (privacy.noise_multiplier,)
        return Schedule(
            noise=noise, excluded=excluded_by_cap(training, noise[0]) if privacy.epsilons else ()
        )
    if isinstance(privacy.epsilon, tuple):
        return _at_least(training, one_by_one(training, privacy.epsilon))
    (target,) = privacy.epsilons
    noise_multiplier = calibrate(
        lambda sigma: list(planned(training, Schedule(noise=(sigma,))).values()),
        epsilon=target,
        delta=privacy.delta,
    )
    return _at_least(training, (noise_multiplier,))


def _at_least(training: TrainingPlan, noise: tuple[float, ...]) -> Schedule:
    if training.lost is None:
        return Schedule(noise=noise)
    before = Schedule(noise=training.lost.noise)
    return Schedule(noise=tuple(max(each, before.noise_in(i)) for i, each in enumerate(noise)))


def one_by_one(training: TrainingPlan, targets: Sequence[float]) -> tuple[float, ...]:
    """Compute one noise multiplier per experience, for one target epsilon per experience.

    Raises:
        ConfigError: if records are used again in a later experience, or targets are missing.
    """
    privacy = training.privacy
    stages = horizon(training)
    assert privacy is not None
    scopes = [training.exposure(stages[: i + 1]).scope.keys() for i in range(len(stages))]
    alone = all(
        scope == {stage.train.partition} for scope, stage in zip(scopes, stages, strict=True)
    )
    if (
        training.strategy.privacy_cost.reuses_past_records
        or not alone
        or len({s.train.partition for s in stages}) < len(stages)
    ):
        raise ConfigError.of(
            "privacy.epsilon",
            targets,
            f"one number for all, because {training.strategy.name} on {training.stream.name} uses "
            "records again in later experiences",
        )
    if len(targets) != len(stages):
        raise ConfigError.of(
            "privacy.epsilon", targets, f"{len(stages)} numbers, one per experience"
        )

    def history(index: int, sigma: float) -> list[list[Charge]]:
        new = charges(training, stages[: index + 1], sigma)
        own = stages[index].train.partition
        return [[*training.spent_before(own), *new[own]]]

    found = [
        calibrate(partial(history, i), epsilon=e, delta=privacy.delta)
        for i, e in enumerate(targets)
    ]
    return tuple(found)


def targets(training: TrainingPlan, partitions: Iterable[str]) -> float | dict[str, float]:
    """Target epsilon of every partition: one number for all, or one for each experience."""
    assert training.privacy is not None
    epsilons = training.privacy.epsilons
    if len(epsilons) == 1:
        return epsilons[0]
    own = {
        stage.train.partition: epsilon
        for stage, epsilon in zip(training.stream, epsilons, strict=True)
    }
    return {name: own[name] for name in partitions}


def excluded_by_cap(training: TrainingPlan, noise_multiplier: float) -> tuple[frozenset[str], ...]:
    """Return the partitions to leave out of the pools, for each experience.

    With one more use, the epsilon of the records of such a partition would exceed the cap.
    """
    privacy = training.privacy
    stages = horizon(training)
    assert privacy is not None
    (cap,) = privacy.epsilons
    histories: Histories = {
        stage.train.partition: training.spent_before(stage.train.partition) for stage in stages
    }
    out: list[frozenset[str]] = []
    for stage in stages:
        gone = out[-1] if out else NOBODY
        own = stage.train.partition
        while True:
            new = charges(training, stages[: stage.index + 1], noise_multiplier, gone)
            over = {
                p
                for p, c in new.items()
                if not within([*histories[p], *c], cap, delta=privacy.delta)
            }
            if not over:
                break
            if own in over:
                raise BudgetError(
                    f"the records of experience {stage.index} would exceed epsilon {cap:g} at "
                    f"delta {privacy.delta:g} in this experience alone; plan fewer steps, a "
                    "larger noise_multiplier or a "
                    "larger epsilon"
                )
            gone |= over
        for partition, more in new.items():
            histories[partition] += more
        out.append(gone)
    return tuple(out)


def horizon(training: TrainingPlan) -> Sequence[Experience]:
    """Return the experiences that the noise is calibrated for.

    These are all experiences of the stream, and copies of the last one up to the horizon.

    Raises:
        ConfigError: if the stream is longer than the declared horizon.
    """
    stream = training.stream
    known = stream.experiences
    privacy = training.privacy
    asked = privacy.horizon if privacy and privacy.horizon is not None else len(known)
    if asked < len(known):
        raise ConfigError.of(
            "privacy.horizon",
            asked,
            f"at least {len(known)}, the number of experiences in the stream",
        )
    last = known[-1]
    own = known[-1].train.partition
    shared = any(experience.train.partition == own for experience in known[:-1])
    later = [own if shared else f"{own}, {i - last.index} later" for i in range(len(known), asked)]
    to_come = (
        replace(last, index=last.index + i, train=replace(last.train, partition=name))
        for i, name in enumerate(later, 1)
    )
    whole = replace(stream, experiences=(*known, *to_come)) if later else stream
    return whole.upto(len(whole) - 1)


def elsewhere(
    charge: Charge,
    partition: str,
    simulated: bool,
    purpose: str = ELSEWHERE,
    independence: Stated = "",
) -> Entry:
    """Ledger entry for a charge of a partition's records that was made outside this ledger.

    Args:
        charge: the charge.
        partition: name of the partition.
        simulated: True if this ledger's noise is simulated.
        purpose: name of the charge in the ledger.
        independence: reason why the records were known to be independent in that charge.
    """
    sampled = charge.sampling_rate < 1
    return Entry(
        purpose=purpose,
        mechanism="gaussian" if charge.noise == "grid-gaussian" else charge.noise,
        grid={"numbers": 0} if charge.noise == "grid-gaussian" else None,
        noise_multiplier=charge.noise_multiplier,
        clip_norm=1.0,
        first_step=0,
        steps=charge.steps,
        sampling="poisson" if sampled else "none",
        scope={partition: charge.sampling_rate},
        data="",
        start="",
        simulated=simulated,
        independence=independence,
    )
