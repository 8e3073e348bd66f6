"""What determines a block of steps apart from the records: the noise of the block is keyed by it.

If anything here changes, a block that is run again draws fresh noise and is charged again. Otherwise two sums could
meet the same noise, and their difference would be free of it.
"""

import hashlib
import json
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perdure.privacy.mechanism import digest
from perdure.records import Params

if TYPE_CHECKING:
    from perdure.learner import Learner


def start(learner: "Learner") -> str:
    """SHA-256 of model, state, optimiser, position and settings, and of what the code does to synthetic records."""
    snapshot, stream = learner.snapshot(), learner.stream
    facts = {name: value for name, value in snapshot.facts.items() if name != "matrix"}  # what was, not what comes
    settings = (
        repr(learner.strategy), repr(learner.model), repr(learner.adversary), repr(learner._optimizer), learner.seed,
        learner.precision, learner.micro_batch_size, str(learner.device), torch.__version__,
        type(learner._scheduler).__name__, learning_rates(learner), json.dumps(facts, default=str), stream.scenario,
        [experience.classes for experience in stream],
    )  # fmt: skip
    shown = digest({**snapshot.tensors, **behaviour(learner)})
    return hashlib.sha256(repr(settings).encode() + shown).hexdigest()


def learning_rates(learner: "Learner", steps: int = 1000) -> list[float]:
    """Rates of the first steps under the schedule, which may be a function that no state holds."""
    if learner.scheduler is None:
        return []
    optimizer = learner.optimizer([torch.nn.Parameter(torch.zeros(1))])
    scheduler, rates = learner.scheduler(optimizer), []
    for _ in range(steps):
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
    with torch.no_grad():
        shown = {**batch.stored, "losses": learner._losses(learner.forward, batch)}
        return shown | hooks(learner, params)


def hooks(learner: "Learner", params: Params) -> dict[str, Tensor]:
    """What the strategy makes of parameters and of a gradient, where it does anything."""
    strategy, state, shown = learner.strategy, learner.state, {}
    later = {name: value + 1 for name, value in params.items()}
    if strategy.uses("penalty") and (penalty := strategy.penalty(params, state)) is not None:
        shown["penalty"] = penalty
    if strategy.uses("project"):
        references = (params,) if strategy.uses("references") else ()
        shown |= {f"projected {name}": value for name, value in strategy.project(later, references, state).items()}
    if strategy.uses("after_step"):
        shown |= {f"followed {name}": value for name, value in strategy.after_step(params, later, later, state).items()}
    return shown
