"""CODA-Prompt: prompts are sums of components weighted by attention, on a frozen transformer.

Smith, Karlinsky, Gutta, Cascante-Bonilla, Kim, Arbelle, Panda, Feris and Kira, CODA-Prompt:
COntinual Decomposed Attention-based Prompting for Rehearsal-Free Continual Learning, CVPR 2023,
sections 4.1 to 4.3.

    q(x)    = features of the frozen transformer without prompts
    for each block with prompts
    p(x)    = sum over m of alpha_m P_m,    alpha_m = cos(q(x) * A_m, K_m)
    loss_i  = CE(x_i, y_i) over the classes of the record's own experience
    penalty = strength * sum over blocks of |P P^T - I|^2 + |K K^T - I|^2 + |A A^T - I|^2

Every experience has its own components. In experience t the components of experience t and the head
are trained. Components of earlier experiences are frozen, but still used in the prompts and in the
penalty. Components of later experiences are not used. p is a prefix: one half goes before the keys
of the block's attention, the other half before its values. A row of P is the whole prompt vector of
a component. The penalty is the sum of squares, as in the paper; the authors' code has the mean over
the entries of each matrix, so its strength is larger.

As in the paper, the logits of all other classes are left out of the loss, so the rows of old
classes in the head have no gradient. An optimiser with momentum, or Adam, can still change these
rows, because it keeps averages of earlier gradients; `Learner(reset_optimizer=True)` starts each
experience with a new optimiser.

In task-incremental streams, a record of experience k is predicted with the components up to k; in
other streams, with the components of all experiences so far. The model alone uses all components,
also untrained ones, so use `predict` of the strategy.

The model is `perdure.models.composed(backbone, experiences=...)`.

State: `done`, the number of finished experiences. Memory cost: components * (2 * length + 2) *
width numbers per block and experience. A step and a prediction take two passes through the
transformer. Privacy cost: only the gradient, and only the gradient of the experience's own
components and of the head. The weights alpha of a record depend only on the record and the
parameters, and the penalty uses no data.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from perdure.contract import (
    Context,
    Forward,
    Plan,
    Spec,
    State,
    Strategy,
    refuse_single_class,
)
from perdure.data import Batch
from perdure.errors import ConfigError, StrategyError
from perdure.models import composed, tiny
from perdure.tasks import MASKED, MultiLabel, Regression, SingleLabel, Task
from perdure.types import Params

if TYPE_CHECKING:
    from perdure.contract import Curator
    from perdure.data import Experience

COMPONENTS = "body.components."
HEAD = "head."


@dataclass(frozen=True, kw_only=True)
class CODAPrompt(Strategy):
    """Train prompt components for each experience, and freeze the components of earlier ones.

    Args:
        strength: weight of the orthogonality penalty (lambda).
    """

    strength: float = 0.1
    tasks: ClassVar[tuple[type[Task], ...]] = (SingleLabel, MultiLabel, Regression)
    tasks_because: ClassVar[str] = "its models give one row of outputs per record"

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ConfigError.of(
                "coda_prompt.strength", self.strength, "a finite number, 0 or more"
            )

    def small_model(self, *, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Build a transformer of one block with one component for each of 8 experiences."""
        return composed(
            tiny(input_shape), num_classes=num_classes, experiences=8, components=1, length=1
        )

    def init(self, spec: Spec) -> State:
        """Create the state, with 0 finished experiences.

        Raises:
            StrategyError: if the model does not have components for every experience.
        """
        wanted = {
            f"{COMPONENTS}{number}.0.attention.weight" for number in range(spec.num_experiences)
        }
        if not wanted <= spec.params.keys():
            raise StrategyError(
                f"the model has no {sorted(wanted - spec.params.keys())[0]}; CODAPrompt "
                "needs perdure.models.composed("
                f"backbone, num_classes={spec.num_classes}, experiences={spec.num_experiences})"
            )
        return State().declare(
            "done", torch.zeros((), device=next(iter(spec.params.values())).device), "mean"
        )

    def plan(self, experience: "Experience") -> Plan:
        """Return a plan to train the experience's own components, and the head.

        Raises:
            StrategyError: if the experience has one class, so that there is nothing to distinguish.
        """
        refuse_single_class(self.name, experience)
        return Plan(trainable=(f"{COMPONENTS}{experience.index}.", HEAD))

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """Return (n,) cross entropy over the classes of the record's own experience (its task)."""
        logits = forward.method("upto")(batch.inputs, context.experience)
        own = context.task_classes[batch.tasks]
        return context.task.losses(logits, batch.labels, own)

    def penalty(self, params: Params, state: State) -> Tensor:
        """Strength times the deviation of the components so far from orthonormality, a scalar."""
        parts = [correlation(sets, state["done"]) for sets in rows(params)]
        return self.strength * torch.stack(parts).sum()

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Count the finished experience in the state."""
        return state.replace({"done": state["done"] + 1})

    def predict(self, forward: Forward, x: Tensor, context: Context, state: State) -> Tensor:
        """Compute logits (n, C) with the components up to the experience."""
        return torch.where(context.allowed, forward.method("upto")(x, context.experience), MASKED)


def rows(params: Params) -> list[Tensor]:
    """Return what the penalty makes orthonormal: prompts, keys and attention vectors per block.

    Each tensor is (experiences, components, size).
    """
    found: dict[str, dict[int, Tensor]] = {}
    for name, value in params.items():
        if name.startswith(COMPONENTS):
            number, _, part = name.removeprefix(COMPONENTS).partition(".")
            found.setdefault(part, {})[int(number)] = (
                value.T if part.endswith("prompts.weight") else value
            )
    return [torch.stack([sets[number] for number in sorted(sets)]) for sets in found.values()]


def correlation(sets: Tensor, now: Tensor) -> Tensor:
    """Compute |B B^T - I|^2 for the rows B of experiences 0 to t.

    Args:
        sets: (experiences, components, size) rows of all experiences.
        now: (), the number t.
    """
    known = (torch.arange(len(sets), device=sets.device) <= now).repeat_interleave(sets.shape[1])
    own = torch.where(known[:, None], sets.flatten(0, 1), 0.0)
    identity = torch.eye(len(own), dtype=own.dtype, device=own.device)
    return torch.where(known[:, None] & known, own @ own.mT - identity, 0.0).square().sum()
