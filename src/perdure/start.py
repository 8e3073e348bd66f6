"""What determines a block of steps apart from the records: the noise of the block is keyed by it.

If anything here changes, a block that is run again draws fresh noise and is charged again. Otherwise two sums could
meet the same noise, and their difference would be free of it.
"""

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perdure.privacy.mechanism import digest
from perdure.records import Batch, Params
from perdure.seeds import generator

if TYPE_CHECKING:
    from perdure.learner import Learner


def start(learner: "Learner") -> str:
    """SHA-256 of model, state, optimiser, position and settings, and of what the code does to synthetic records."""
    snapshot, stream = learner.snapshot(), learner.stream
    facts = {name: value for name, value in snapshot.facts.items() if name != "matrix"}  # what was, not what comes
    settings = (
        repr(learner.strategy), repr(learner.plan(stream[learner.position.experience])),
        repr(learner.curator.exposures), repr(learner.model), repr(learner.adversary), repr(learner._optimizer),
        learner.seed,
        learner.precision, learner.micro_batch_size, str(learner.device), torch.__version__,
        type(learner._scheduler).__name__, learning_rates(learner), json.dumps(facts, default=str), stream.scenario,
        [experience.classes for experience in stream],
    )  # fmt: skip
    shown = digest({**snapshot.tensors, **behaviour(learner)})
    return hashlib.sha256(repr(settings).encode() + shown).hexdigest()


def learning_rates(learner: "Learner") -> list[float]:
    """Rates of all steps so far and of this experience under the schedule, which may be a function no state holds."""
    if learner.scheduler is None:
        return []
    optimizer = learner.optimizer([torch.nn.Parameter(torch.zeros(1))])
    scheduler, rates = learner.scheduler(optimizer), []
    for _ in range(sum(learner.steps(index) for index in range(learner.position.experience + 1))):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


def behaviour(learner: "Learner") -> dict[str, Tensor]:
    """What views, model and strategy make of synthetic records: other code under the same names shows here."""
    batch = learner.curator.synthetic(4)
    batch = learner.views.attach(batch, 0) if learner.views else batch
    learner.model.eval()
    params = {name: value.detach().clone() for name, value in learner._trained.items()}
    shown = {**batch.stored}
    for role, rows in (("new", batch), ("stored", stored_like(learner, batch))):
        losses = learner._losses(learner.forward, rows)
        leaves = list(learner._trained.values())
        pulls = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
        shown |= {f"{role} losses": losses.detach()} | {f"{role} pull {i}": pull for i, pull in enumerate(pulls)}
    with torch.no_grad():
        return shown | hooks(learner, params)


def stored_like(learner: "Learner", batch: Batch) -> Batch:
    """The same synthetic rows in the role of stored ones, with something stored beside them."""
    place = generator(learner.seed, "stored beside synthetic rows")
    stored = {
        name: torch.rand(value.shape, generator=place).to(value) if value.is_floating_point() else value
        for name, value in batch.stored.items()
    }
    return replace(batch, from_memory=torch.ones_like(batch.from_memory), stored=stored)


def hooks(learner: "Learner", params: Params) -> dict[str, Tensor]:
    """What the strategy makes of parameters and of a gradient, where it does anything."""
    strategy, state, shown = learner.strategy, learner.state, {}
    later = {name: value + 1 for name, value in params.items()}
    whole = {name: value.detach() for name, value in learner.params.items()}
    if strategy.uses("penalty") and (penalty := strategy.penalty(whole, state)) is not None:
        shown["penalty"] = penalty
    if strategy.uses("project"):
        against = {name: -value for name, value in later.items()}
        for references in ((params,), (against, params), (against,)) if strategy.uses("references") else ((),):
            answer = strategy.project(later, references, state)
            shown |= {f"projected {len(shown)} {name}": value for name, value in answer.items()}
    if strategy.uses("after_step"):
        shown |= {f"followed {name}": value for name, value in strategy.after_step(params, later, later, state).items()}
    return shown
