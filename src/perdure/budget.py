"""From what a run will do to the noise it needs: exposure of every partition, calibration, ledger and grant."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perdure.curator import exposure
from perdure.errors import GuardError, PrivacyError
from perdure.privacy.accounting import Charge, calibrate
from perdure.privacy.guard import check_buffers, check_losses, check_model, quiet_training
from perdure.privacy.ledger import Ledger
from perdure.privacy.mechanism import Mechanism
from perdure.privacy.noise import NoiseKey
from perdure.records import Batch, Records
from perdure.seeds import generator

if TYPE_CHECKING:
    from perdure.learner import Learner

Histories = dict[str, list[Charge]]


def planned(learner: "Learner", noise_multiplier: float) -> Histories:
    """Charges of every partition over the whole declared stream, from public facts only."""
    privacy, asks, stream = learner.privacy, learner.strategy.asks, learner.stream
    assert privacy is not None
    histories: Histories = {e.train.partition: [] for e in stream}
    for experience in stream:
        past = stream.experiences[: experience.index + 1]
        exposed = exposure(past, learner.plan(experience), batch_size=learner.batch_size, rate=privacy.sampling_rate)
        for partition, rate in exposed.scope.items():
            histories[partition].append(Charge(rate, noise_multiplier, learner.steps(experience.index)))
        if asks.releases:
            charge = Charge(1.0, noise_multiplier * privacy.release_noise, asks.releases)
            histories[experience.train.partition].append(charge)
    return histories


def private_mechanism(learner: "Learner", trace: Callable[[str], None]) -> Mechanism:
    """Check model and strategy, calibrate the noise, open the ledger and reserve the plan in it.

    Raises:
        GuardError: for a model or strategy that breaks the sensitivity bound.
        BudgetError: when the plan does not fit what was granted.
    """
    privacy = learner.privacy
    assert privacy is not None
    inspect(learner)
    if learner.strategy.asks.references:
        raise PrivacyError(
            f"{learner.strategy.name} asks for reference gradients at every step, which are not accounted yet; "
            "use Naive, EWC, LwF or Replay under privacy"
        )
    multiplier = privacy.noise_multiplier
    if multiplier is None:
        assert privacy.epsilon is not None
        multiplier = calibrate(
            lambda sigma: list(planned(learner, sigma).values()), epsilon=privacy.epsilon, delta=privacy.delta
        )
    key = noise_key(learner.folder, privacy.seed, learner.client)
    path = learner.folder / "ledger.jsonl" if learner.folder else None
    ledger = Ledger.open(path, key=key, trace=trace, owner=learner.owner)
    for experience in learner.stream:
        ledger.declare(experience.train.partition, experience.train.declared_size)
    if privacy.epsilon is not None:
        ledger.grant(planned(learner, multiplier), epsilon=privacy.epsilon, delta=privacy.delta)
    return Mechanism(privacy=privacy, noise_multiplier=multiplier, ledger=ledger, key=key)


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
    inputs, labels = synthetic(learner, records=6)
    check_buffers(model, inputs)
    for mode in (model.eval, partial(quiet_training, model)):
        mode()
        for index in range(min(2, len(stream))):
            check_losses(partial(_losses, learner, index), inputs, labels[index], f"{strategy.name}.losses()")


def synthetic(learner: "Learner", records: int) -> tuple[Tensor, list[Tensor]]:
    """Random inputs, and labels of every experience's declared classes, that owe nothing to any record."""
    stream = learner.stream
    place = generator(learner.seed, "guard")
    inputs = torch.rand(records, *stream.input_shape, generator=place).to(learner.device)
    labels = [torch.tensor([e.classes[i % len(e.classes)] for i in range(records)]) for e in stream]
    return inputs, [label.to(learner.device) for label in labels]


def _losses(learner: "Learner", index: int, inputs: Tensor, labels: Tensor) -> Tensor:
    batch = Batch.current(Records(inputs=inputs, labels=labels), index)
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
