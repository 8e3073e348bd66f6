"""Prepare a private learner: check model and strategy, calibrate noise, open the ledger."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from perdure.data.records import Batch, Records
from perdure.errors import GuardError
from perdure.planning.budget import elsewhere, planned, scheduled, targets
from perdure.privacy.accounting.charges import merged
from perdure.privacy.guard.loss_checks import check_losses, check_rows, quiet_training
from perdure.privacy.guard.model_checks import check_buffers, check_model, check_optimizer
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.noise.key import noise_key
from perdure.privacy.private_sum import PrivateSum
from perdure.utils.seeding import generator

if TYPE_CHECKING:
    from perdure.learner.learner import Learner


def private_mechanism(learner: "Learner", trace: Callable[[str], None]) -> PrivateSum:
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
    return PrivateSum(privacy=privacy, schedule=schedule, ledger=ledger, key=key)


def inspect(learner: "Learner") -> None:
    """Guard model, stream and strategy, on synthetic records only.

    Raises:
        GuardError: naming the part that breaks the bound on one record's influence, and the fix.
    """
    strategy = learner.strategy
    stream = learner.stream
    model = learner.model
    if not stream.assigned_by_record:
        raise GuardError(
            f"stream {stream.name} places records by their position among others, so one "
            "record moves others between "
            "experiences; build it with exact=False, or from a split by class"
        )
    if strategy.couples_records:
        raise GuardError(
            f"{strategy.name} couples the records of a batch in its loss; use a strategy "
            "that does not"
        )
    check_model(model)
    inputs, facts = synthetic(learner, records=6)
    check_buffers(model, inputs)
    check_optimizer(
        learner.optimizer(
            [nn.Parameter(value.detach().clone()) for value in learner.params.values()]
        )
    )
    for mode in (model.eval, partial(quiet_training, model)):
        mode()
        for index in range(min(2, len(stream))):
            check_losses(
                partial(_losses, learner, index), inputs, facts[index], f"{strategy.name}.losses()"
            )
    check_rows(model, partial(_losses, learner, 0), inputs, facts[0], f"{strategy.name}.losses()")


def synthetic(learner: "Learner", records: int) -> tuple[Tensor, list[Tensor]]:
    """Random inputs (n, ...), independent of the data, and what goes with them (n, 2).

    There is one pair of numbers for every experience.

    That is a label of its declared classes and an id, which a row keeps whatever stands beside it.
    """
    stream = learner.stream
    place = generator(learner.seed, "guard")
    inputs = torch.rand(records, *stream.input_shape, generator=place).to(learner.device)
    facts = [
        torch.tensor([(e.classes[i % len(e.classes)], i) for i in range(records)]) for e in stream
    ]
    return inputs, [fact.to(learner.device) for fact in facts]


def _losses(learner: "Learner", index: int, inputs: Tensor, facts: Tensor) -> Tensor:
    labels, ids = facts.unbind(1)
    batch = Batch.current(Records(inputs=inputs, labels=labels, ids=ids), index)
    return learner.strategy.losses(learner.forward, batch, learner.context(index), learner.state)
