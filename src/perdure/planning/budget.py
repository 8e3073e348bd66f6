"""From what a run will do to the noise it needs: exposure of every partition, calibration, ledger and grant."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from perdure.data.records import Batch, Records
from perdure.data.scenarios import Experience
from perdure.errors import BudgetError, ConfigError, GuardError, PrivacyError
from perdure.planning.exposure import pieces, references
from perdure.privacy.accounting.calibration import Charge, calibrate, merged, within
from perdure.privacy.guard.model_checks import (
    check_buffers,
    check_losses,
    check_model,
    check_optimizer,
    check_rows,
    quiet_training,
)
from perdure.privacy.ledger.ledger import Entry, Ledger
from perdure.privacy.noise.key import NoiseKey
from perdure.privacy.private_sum import Mechanism, Schedule
from perdure.utils.seeding import generator

if TYPE_CHECKING:
    from perdure.learner.learner import Learner

Histories = dict[str, list[Charge]]
NOBODY: frozenset[str] = frozenset()


def private_mechanism(learner: "Learner", trace: Callable[[str], None]) -> Mechanism:
    """Check model and strategy, calibrate the noise, open the ledger and reserve the plan in it.

    Raises:
        GuardError: for a model or strategy that breaks the sensitivity bound.
        BudgetError: when the plan does not fit what was granted.
    """
    privacy = learner.privacy
    assert privacy is not None
    inspect(learner)
    schedule = scheduled(learner)
    key = noise_key(learner.folder, privacy.seed, learner.client)
    path = learner.folder / "ledger.jsonl" if learner.folder else None
    ledger = Ledger.open(path, key=key, trace=trace, owner=learner.owner)
    for experience in learner.stream:
        ledger.declare(experience.train.partition, experience.train.declared_size)
        for charge in merged(privacy.spent):
            ledger.charge(elsewhere(charge, experience.train.partition, key.simulated))
    if privacy.epsilons and privacy.diagnostics == "released":
        plan = planned(learner, schedule)
        known = {name: plan[name] for name in ledger.partitions if name in plan}
        ledger.grant(known, epsilon=targets(learner, known), delta=privacy.delta)
    return Mechanism(privacy=privacy, schedule=schedule, ledger=ledger, key=key)


# --------------------------------------------------------------------------- the plan of a whole stream


def planned(learner: "Learner", schedule: Schedule) -> Histories:
    """Charges of every partition over the whole declared stream, spent elsewhere included; from public facts only."""
    privacy, stages = learner.privacy, horizon(learner)
    assert privacy is not None
    histories: Histories = {stage.train.partition: list(privacy.spent) for stage in stages}
    for stage in stages:
        noise, left = schedule.noise_in(stage.index), schedule.left_in(stage.index)
        for partition, new in charges(learner, stages[: stage.index + 1], noise, left).items():
            histories[partition] += new
    return histories


def charges(
    learner: "Learner", stages: Sequence[Experience], noise_multiplier: float, left: frozenset[str] = NOBODY
) -> Histories:
    """What the last of `stages` costs every partition that it exposes."""
    privacy, asks, current = learner.privacy, learner.strategy.asks, stages[-1].train.partition
    assert privacy is not None
    exposed = learner.exposure(stages, left)
    total = learner.steps_of(stages, left)
    blocks = [exposed.times(len(block)) for block in pieces(total, learner.blocks)]
    spent: Histories = {p: [Charge(rate, noise_multiplier, sum(blocks))] for p, rate in exposed.scope.items() if total}
    for beside in references(stages, learner.plan(stages[-1]), batch_size=learner.batch_size, left=left).values():
        for partition, rate in beside.scope.items():
            spent.setdefault(partition, []).extend([Charge(rate, noise_multiplier, total)] if total else [])
    noise = noise_multiplier * privacy.release_noise
    for partition in {stage.train.partition for stage in stages} - left if asks.recalls else ():
        spent.setdefault(partition, []).append(Charge(1.0, noise, asks.recalls))
    asked = (
        Charge(1.0, noise, asks.releases), Charge(1.0, noise, asks.histograms, "discrete-gaussian"),
        Charge(1.0, noise / 2, asks.selections, "exponential"),
    )  # fmt: skip
    spent.setdefault(current, []).extend(charge for charge in asked if charge.steps)
    return spent


def scheduled(learner: "Learner") -> Schedule:
    """Noise multipliers that meet the budget, or who leaves the pools where the noise is given and the budget a cap.

    Raises:
        BudgetError: when no noise is enough, or new records could not be used once.
        ConfigError: for budgets that do not fit the stream.
    """
    privacy = learner.privacy
    assert privacy is not None
    if privacy.noise_multiplier is not None:
        noise = (privacy.noise_multiplier,)
        return Schedule(noise=noise, left=leaving(learner, noise[0]) if privacy.epsilons else ())
    if isinstance(privacy.epsilon, tuple):
        return Schedule(noise=one_by_one(learner, privacy.epsilon))
    (target,) = privacy.epsilons
    noise_multiplier = calibrate(
        lambda sigma: list(planned(learner, Schedule(noise=(sigma,))).values()), epsilon=target, delta=privacy.delta
    )
    return Schedule(noise=(noise_multiplier,))


def one_by_one(learner: "Learner", targets: Sequence[float]) -> tuple[float, ...]:
    """A noise multiplier for every experience, where its records are used in no other one."""
    privacy, stages = learner.privacy, horizon(learner)
    assert privacy is not None
    scopes = [learner.exposure(stages[: i + 1]).scope.keys() for i in range(len(stages))]
    alone = all(scope == {stage.train.partition} for scope, stage in zip(scopes, stages, strict=True))
    if learner.strategy.asks.reuses or not alone or len({s.train.partition for s in stages}) < len(stages):
        raise ConfigError.of(
            "privacy.epsilon",
            targets,
            f"one number with {learner.strategy.name} on {learner.stream.name}, which uses records again later",
        )
    if len(targets) != len(stages):
        raise ConfigError.of("privacy.epsilon", targets, f"{len(stages)} numbers, one an experience")

    def history(index: int, sigma: float) -> list[list[Charge]]:
        new = charges(learner, stages[: index + 1], sigma)
        return [[*privacy.spent, *new[stages[index].train.partition]]]

    found = [calibrate(partial(history, i), epsilon=e, delta=privacy.delta) for i, e in enumerate(targets)]
    return tuple(found)


def targets(learner: "Learner", partitions: Iterable[str]) -> float | dict[str, float]:
    """Epsilon of every partition: one for all, or that of its experience."""
    assert learner.privacy is not None
    epsilons = learner.privacy.epsilons
    if len(epsilons) == 1:
        return epsilons[0]
    own = {stage.train.partition: epsilon for stage, epsilon in zip(learner.stream, epsilons, strict=True)}
    return {name: own[name] for name in partitions}


def leaving(learner: "Learner", noise_multiplier: float) -> tuple[frozenset[str], ...]:
    """Partitions out of the pools in every experience: those whose records would exceed the cap by one more use."""
    privacy, stages = learner.privacy, horizon(learner)
    assert privacy is not None
    (cap,) = privacy.epsilons
    histories: Histories = {stage.train.partition: list(privacy.spent) for stage in stages}
    out: list[frozenset[str]] = []
    for stage in stages:
        gone, own = out[-1] if out else NOBODY, stage.train.partition
        while True:
            new = charges(learner, stages[: stage.index + 1], noise_multiplier, gone)
            over = {p for p, c in new.items() if not within([*histories[p], *c], cap, delta=privacy.delta)}
            if not over:
                break
            if own in over:
                raise BudgetError(
                    f"experience {stage.index} alone would take its records beyond epsilon {cap:g} at delta "
                    f"{privacy.delta:g}; plan fewer steps, a larger noise_multiplier or a larger epsilon"
                )
            gone |= over
        for partition, more in new.items():
            histories[partition] += more
        out.append(gone)
    return tuple(out)


def horizon(learner: "Learner") -> list[Experience]:
    """Experiences to plan for: those of the stream, and as many more like the last as were declared to come.

    Raises:
        ConfigError: when the stream is longer than what was declared.
    """
    known, privacy = list(learner.stream.experiences), learner.privacy
    asked = privacy.horizon if privacy and privacy.horizon is not None else len(known)
    if asked < len(known):
        raise ConfigError.of("privacy.horizon", asked, f"at least {len(known)}, the experiences of the stream")
    last, own = known[-1], known[-1].train.partition
    shared = any(experience.train.partition == own for experience in known[:-1])
    later = [own if shared else f"{own}, {i - last.index} later" for i in range(len(known), asked)]
    return known + [
        replace(last, index=last.index + i, train=replace(last.train, partition=name))
        for i, name in enumerate(later, 1)
    ]


def elsewhere(charge: Charge, partition: str, simulated: bool) -> Entry:
    """Ledger entry of what the records of a partition were exposed to before, outside this ledger."""
    sampled = charge.sampling_rate < 1
    return Entry(
        purpose="spent elsewhere", mechanism=charge.noise, noise_multiplier=charge.noise_multiplier, clip_norm=1.0,
        first_step=0, steps=charge.steps, sampling="poisson" if sampled else "none",
        scope={partition: charge.sampling_rate}, data="", start="", simulated=simulated,
    )  # fmt: skip


# --------------------------------------------------------------------------- checks and keys


def inspect(learner: "Learner") -> None:
    """Guard model, stream and strategy, on synthetic records only.

    Raises:
        GuardError: naming the part that breaks the bound on one record's influence, and the fix.
    """
    strategy, stream, model = learner.strategy, learner.stream, learner.model
    if not stream.assigned_by_record:
        raise GuardError(
            f"stream {stream.name} places records by their position among others, so one record moves others between "
            "experiences; build it with exact=False, or from a split by class"
        )
    if strategy.couples_records:
        raise GuardError(f"{strategy.name} couples the records of a batch in its loss; use a strategy that does not")
    check_model(model)
    inputs, facts = synthetic(learner, records=6)
    check_buffers(model, inputs)
    check_optimizer(learner.optimizer([nn.Parameter(value.detach().clone()) for value in learner.params.values()]))
    for mode in (model.eval, partial(quiet_training, model)):
        mode()
        for index in range(min(2, len(stream))):
            check_losses(partial(_losses, learner, index), inputs, facts[index], f"{strategy.name}.losses()")
    check_rows(model, partial(_losses, learner, 0), inputs, facts[0], f"{strategy.name}.losses()")


def synthetic(learner: "Learner", records: int) -> tuple[Tensor, list[Tensor]]:
    """Random inputs (n, ...) that owe nothing to any record, and for every experience what goes with them (n, 2).

    That is a label of its declared classes and an id, which a row keeps whatever stands beside it.
    """
    stream = learner.stream
    place = generator(learner.seed, "guard")
    inputs = torch.rand(records, *stream.input_shape, generator=place).to(learner.device)
    facts = [torch.tensor([(e.classes[i % len(e.classes)], i) for i in range(records)]) for e in stream]
    return inputs, [fact.to(learner.device) for fact in facts]


def _losses(learner: "Learner", index: int, inputs: Tensor, facts: Tensor) -> Tensor:
    labels, ids = facts.unbind(1)
    batch = Batch.current(Records(inputs=inputs, labels=labels, ids=ids), index)
    return learner.strategy.losses(learner.forward, batch, learner.context(index), learner.state)


def noise_key(folder: Path | None, seed: int | None, client: int) -> NoiseKey:
    """Secret key of this curator, or a simulated one from the seed that the user chose."""
    if seed is not None:
        return NoiseKey.from_seed(seed, "client", client)
    if folder is None:
        raise PrivacyError(
            "secret noise needs a folder to keep its key and ledger in; give Learner(folder=...), or "
            "Privacy(seed=...) for a simulation"
        )
    return NoiseKey.from_os(folder / "private" / "key")
