"""LoRA: learn each experience in its own orthogonal low-rank adapters on a frozen transformer.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, section 4.1; one set of
adapters per experience, and the penalty, are from Wang et al., Orthogonal Subspace Learning for
Language Model Continual Learning (O-LoRA), Findings of EMNLP 2023, section 3.

    projection  W x + sum over experiences i of B_i A_i x
                with A_i (rank, width), and B_i = 0 until it is trained
    loss_i      = CE(x_i, y_i) over the classes of the record's own experience
    penalty     = strength * sum over projections and earlier i of |A_i A_t^T|^2

In experience t only A_t, B_t and the head are trained. The output of an earlier set depends on A_i
x only. If the rows of A_t are orthogonal to those of A_i, the new set therefore reacts to other
directions of x than the earlier sets. The sum over all experiences is the merged model, so a
prediction needs no task. The square is from the paper; the authors' code sums |A_i A_t^T|.

The papers adapt language models, which have no head. Here the logits of all other classes are left
out of the loss, as in L2P and CODA-Prompt, so the rows of old classes in the head have no gradient.
An optimiser with momentum, or Adam, can still change these rows, because it keeps averages of
earlier gradients; `Learner(reset_optimizer=True)` starts each experience with a new optimiser.

The model is `perdure.models.adapted(backbone, experiences=...)`.

State: `done`, the number of finished experiences. Memory cost: 2 * rank * width numbers per
projection and experience; a block has two projections. Privacy cost: only the gradient, and only
the gradient of the trained set and of the head; the penalty uses no data. A federation averages A_t
and B_t separately. The product of the means is not the mean of the products B_t A_t.
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
    """Train adapters for each experience, and freeze the adapters of earlier ones.

    Args:
        strength: weight of the orthogonality penalty (lambda_1); 0 for plain LoRA with one set per
            experience.
        adapters: prefix of the names of the adapters' parameters.
        head: prefix of the names of the head's parameters.
    """

    strength: float = 0.5
    adapters: str = "body.adapters."
    head: str = "head."
    tasks: ClassVar[tuple[type[Task], ...]] = (SingleLabel, MultiLabel, Regression)
    tasks_because: ClassVar[str] = "its models give one row of outputs per record"

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ConfigError.of("lora.strength", self.strength, "a finite number, 0 or more")

    def small_model(self, *, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Build a transformer of one block with adapters of rank 2 for up to eight experiences."""
        return adapted(tiny(input_shape), num_classes=num_classes, experiences=8, rank=2)

    def init(self, spec: Spec) -> State:
        """Create the state, with 0 finished experiences.

        Raises:
            StrategyError: if the model does not have adapters for every experience.
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
        """Return a plan to train the experience's own adapters, and the head.

        Raises:
            StrategyError: if the experience has one class, so that there is nothing to distinguish.
        """
        refuse_single_class(self.name, experience)
        return Plan(trainable=(f"{self.adapters}{experience.index}.", self.head))

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """Return (n,) cross entropy over the classes of the record's experience."""
        own = context.task_classes[batch.tasks]
        return context.task.losses(forward(batch.inputs), batch.labels, own)

    def penalty(self, params: Params, state: State) -> Tensor:
        """Strength times squared inner products of rows of A_t and of each earlier A_i."""
        return (
            self.strength
            * torch.stack([overlap(sets, state["done"]) for sets in self._downs(params)]).sum()
        )

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Count the finished experience in the state."""
        return state.replace({"done": state["done"] + 1})

    def _downs(self, params: Params) -> list[Tensor]:
        """Matrices A (experiences, rank, width) of all experiences, one tensor per projection."""
        found: dict[str, dict[int, Tensor]] = {}
        for name, value in params.items():
            if name.startswith(self.adapters) and name.endswith(".down.weight"):
                number, _, projection = name.removeprefix(self.adapters).partition(".")
                found.setdefault(projection, {})[int(number)] = value
        return [torch.stack([sets[number] for number in sorted(sets)]) for sets in found.values()]


def overlap(sets: Tensor, now: Tensor) -> Tensor:
    """Compute the sum over i < t of |A_i A_t^T|^2.

    Args:
        sets: (experiences, rank, width) matrices A of all experiences.
        now: (), the number t.
    """
    numbers = torch.arange(len(sets), device=sets.device)
    present = torch.where((numbers == now)[:, None, None], sets, 0.0).sum(0)
    earlier = torch.where((numbers < now)[:, None, None], sets, 0.0).flatten(0, 1)
    return (earlier @ present.mT).square().sum()
