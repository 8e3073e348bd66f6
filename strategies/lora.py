"""LoRA: learn each experience in its own orthogonal low-rank adapters on a frozen transformer.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, section 4.1; one set an
experience and the penalty are those of Wang et al., Orthogonal Subspace Learning for Language Model
Continual Learning (O-LoRA), Findings of EMNLP 2023, section 3.

    projection  W x + sum over experiences i of B_i A_i x
                with A_i (rank, width), and B_i = 0 until it is trained
    loss_i      = CE(x_i, y_i) over the classes of the record's own experience
    penalty     = strength * sum over projections and earlier i of |A_i A_t^T|^2

In experience t only A_t, B_t and the head are trained. The addition of earlier sets depends on A_i
x alone, so that a set orthogonal to them changes what the model does with other directions of x.
The sum over all experiences is the merged model: tasks are not told apart when it predicts. The
square is the paper's; the authors' code sums |A_i A_t^T|.

The papers adapt language models, which have no head. Here the logits of all other classes are left
out of the loss, as L2P and CODA-Prompt do, so that the rows of old classes in the head have no
gradient; what an optimiser remembers moves them still, unless it starts afresh with every
experience (`Learner(reset_optimizer=True)`).

The model is `perdure.models.adapted(backbone, experiences=...)`.

State: `done`, the number of experiences that are over.
Memory cost: 2 * rank * width numbers a projection and experience; two projections a block. Privacy
cost: none beyond the gradient, and that is of the trained set and the head alone; the penalty
touches no data. In a federation A_t and B_t are averaged each by itself, which is not the mean of
their products.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from perdure.contract import Context, Forward, Plan, Spec, State, Strategy, refuse_single_class
from perdure.data import Batch
from perdure.errors import ConfigError, StrategyError
from perdure.models import adapted, tiny
from perdure.tasks import MultiLabel, Regression, SingleLabel, Task
from perdure.types import Params

if TYPE_CHECKING:
    from perdure.contract import Curator
    from perdure.data import Experience


@dataclass(frozen=True, kw_only=True)
class LoRA(Strategy):
    """Adapters for every experience, the earlier ones frozen.

    Args:
        strength: weight of the orthogonality penalty (lambda_1); 0 for plain LoRA, one set an
            experience.
        adapters: prefix of the names of the adapters' parameters.
        head: prefix of the names of the head's parameters.
    """

    strength: float = 0.5
    adapters: str = "body.adapters."
    head: str = "head."
    tasks: ClassVar[tuple[type[Task], ...]] = (SingleLabel, MultiLabel, Regression)
    tasks_because: ClassVar[str] = "its models give one row of outputs a record"

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ConfigError.of("lora.strength", self.strength, "a finite number, 0 or more")

    def small_model(self, *, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """A set of rank 2 for each of up to eight experiences, on a transformer of one block."""
        return adapted(tiny(input_shape), num_classes=num_classes, experiences=8, rank=2)

    def init(self, spec: Spec) -> State:
        """Start with no experience over.

        Raises:
            StrategyError: where the model has no set of adapters for every experience.
        """
        sets = spec.num_experiences
        builder = "perdure.models.adapted"
        for prefix in (*(f"{self.adapters}{number}." for number in range(sets)), self.head):
            if not any(name.startswith(prefix) for name in spec.params):
                raise StrategyError(
                    f"the model has no parameters {prefix!r}; LoRA needs adapters for each "
                    f"of {sets} experiences: "
                    f"{builder}(backbone, num_classes={spec.num_classes}, experiences={sets})"
                )
        return State().declare(
            "done", torch.zeros((), device=next(iter(spec.params.values())).device), "mean"
        )

    def plan(self, experience: "Experience") -> Plan:
        """Train the experience's own set, and the head.

        Raises:
            StrategyError: for an experience of one class, which has nothing to be told from.
        """
        refuse_single_class(self.name, experience)
        return Plan(trainable=(f"{self.adapters}{experience.index}.", self.head))

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """Cross entropy over the classes of the record's experience."""
        own = context.task_classes[batch.tasks]
        return context.task.losses(forward(batch.inputs), batch.labels, own)

    def penalty(self, params: Params, state: State) -> Tensor:
        """Strength times squared inner products of rows of A_t and of each earlier A_i."""
        return (
            self.strength
            * torch.stack([overlap(sets, state["done"]) for sets in self._downs(params)]).sum()
        )

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Count the experience."""
        return state.replace({"done": state["done"] + 1})

    def _downs(self, params: Params) -> list[Tensor]:
        """(experiences, rank, width), the A of all experiences, for each projection."""
        found: dict[str, dict[int, Tensor]] = {}
        for name, value in params.items():
            if name.startswith(self.adapters) and name.endswith(".down.weight"):
                number, _, projection = name.removeprefix(self.adapters).partition(".")
                found.setdefault(projection, {})[int(number)] = value
        return [torch.stack([sets[number] for number in sorted(sets)]) for sets in found.values()]


def overlap(sets: Tensor, now: Tensor) -> Tensor:
    """Sum over i < t of |A_i A_t^T|^2.

    Args:
        sets: (experiences, rank, width).
        now: (), the number t.
    """
    numbers = torch.arange(len(sets), device=sets.device)
    present = torch.where((numbers == now)[:, None, None], sets, 0.0).sum(0)
    earlier = torch.where((numbers < now)[:, None, None], sets, 0.0).flatten(0, 1)
    return (earlier @ present.mT).square().sum()
