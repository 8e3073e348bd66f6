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
from perdure.seeds import generator

if TYPE_CHECKING:
    from perdure.learner import Learner


def start(learner: "Learner") -> str:
    """SHA-256 of model, state, optimiser, position and settings, and of what the code does to synthetic records."""
    snapshot, stream = learner.snapshot(), learner.stream
    facts = {name: value for name, value in snapshot.facts.items() if name != "matrix"}  # what was, not what comes
    settings = (
        repr(learner.strategy), repr(learner.model), repr(learner.adversary), repr(learner._optimizer), learner.seed,
        learner.precision, type(learner._scheduler).__name__, json.dumps(facts, default=str), stream.scenario,
        [experience.classes for experience in stream],
    )  # fmt: skip
    shown = digest({**snapshot.tensors, **behaviour(learner)})
    return hashlib.sha256(repr(settings).encode() + shown).hexdigest()


def behaviour(learner: "Learner") -> dict[str, Tensor]:
    """What views, model and strategy make of synthetic records: other code under the same names shows here."""
    batch = learner.curator.synthetic(generator(learner.seed, "behaviour"))
    batch = learner.views.attach(batch, 0) if learner.views else batch
    learner.model.eval()
    with torch.no_grad():
        return {**batch.stored, "losses": learner._losses(learner.forward, batch)}
