"""Settings of a party: the fields of `Session`, without its optimiser."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from perdure.adversarial.base import Attack
from perdure.adversarial.defences.base import Defence
from perdure.contract.strategy import Strategy
from perdure.data.augmentation import Views
from perdure.data.experience import Stream
from perdure.data.groups import GroupWeights
from perdure.data.mixing import Mixing
from perdure.learner.averaging import EMA, SWA
from perdure.learner.checkpoint import Position
from perdure.learner.step_changes import SAM
from perdure.learner.trained_parameters import Train
from perdure.planning.training_plan import LostLedgers, Participation
from perdure.privacy.private_sum import MakePrivateSum, PrivateSum
from perdure.privacy.settings import Privacy
from perdure.tasks.losses import Loss
from perdure.utils.processes import Processes

OWNER = "curator"
"""Default name of the party in its ledger; a federation uses client-N instead."""


OPTIONS = (
    "averaging",
    "sharpness",
    "l1",
    "l2",
    "gradient_noise",
    "weight_noise",
    "max_grad_norm",
    "mixing",
    "defence",
    "group_weights",
    "fine_tune",
)
"""Options of the steps; the ones that are not given are in no fingerprint and no noise digest."""


def _silent(point: str) -> None:
    """Default callback, which does nothing."""


@dataclass(kw_only=True, eq=False)
class PartySettings:
    """Model, strategy, stream and settings of one party; `Session` describes the fields."""

    model: nn.Module
    strategy: Strategy
    stream: Stream
    epochs: int | None = None
    iterations: int | None = None
    blocks: int = 1
    batch_size: int = 128
    privacy: Privacy | None = None
    seed: int = 0
    client: int = 0
    owner: str = OWNER
    folder: Path | None = None
    device: str | torch.device = "cpu"
    micro_batch_size: int | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    adversary: Attack | None = None
    views: Views | None = None
    initial: Mapping[str, Tensor] | None = None
    notify: Callable[[str], None] = _silent
    warm_start: bool = False
    trained_by: str = ""
    make_private_sum: MakePrivateSum = PrivateSum
    position: Position = field(default_factory=Position)
    averaging: EMA | SWA | None = None
    sharpness: SAM | None = None
    l1: float = 0.0
    l2: float = 0.0
    gradient_noise: float = 0.0
    weight_noise: float = 0.0
    loss: Loss | None = None
    max_grad_norm: float | None = None
    group: Processes | None = None
    mixing: Mixing | None = None
    group_weights: GroupWeights | None = None
    fine_tune: Train | None = None
    defence: Defence | None = None
    participation: Participation | None = None
    lost: LostLedgers | None = None

    @property
    def options(self) -> dict[str, object]:
        """Options of the steps that are not at their defaults, by name."""
        given = {name: getattr(self, name) for name in OPTIONS}
        return {name: value for name, value in given.items() if value}
