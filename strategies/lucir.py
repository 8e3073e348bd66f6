"""LUCIR: rehearse, classify by cosines, keep feature directions, separate new from old classes.

Hou, Pan, Loy, Wang and Lin, Learning a Unified Classifier Incrementally via Rebalancing, CVPR 2019,
section 3, equations 4 and 6 to 10.

    s_c(x) = <f(x) / |f(x)|, w_c / |w_c|>,  logits eta s_c(x)
             w_c of old classes is fixed
    loss_i = CE(eta s(x_i), y_i) + lambda (1 - <f(x_i) / |f(x_i)|, f*(x_i) / |f*(x_i)|>)
             + ranking * r * sum over k of max(0, margin - s_y(x_i) + s_k(x_i))
               where y = y_i is an old class
    lambda = less_forget * sqrt(old classes / new classes),  f* the features before this experience
    k      = the `negatives` new classes of largest s_k(x_i)

Lambda is defined as in the authors' code: it grows with the number of old classes; equation 7 has
the inverse ratio. The paper averages the last term over the old rows of a batch. Here the loss of a
row may not depend on other rows, so r = number of records in the pool / number of stored records,
both from declared sizes; this gives the same expectation. Herded exemplars and new records are one
pool.

After the experience of class c, its embedding w_c is fixed exactly, as in PackNet. So the model
alone is not the classifier; use `predict` of the strategy. The paper removes the last ReLU of the
body, so that features have both signs; here the user builds the body, and `activation="tanh"` gives
both signs. Two additions of the authors' code are left out: fine-tuning on equally many records of
every class, and new embeddings that start from class means.

State: `teacher`, the model at the end of the last experience; `held`, the embeddings; `records`,
the declared number of records so far. Embeddings are averaged over clients; they are equal on all
clients, so this does not change them. Memory cost: the stored records, once the parameters and once
the head. Privacy cost: records that may be stored are used again in later experiences. Under
differential privacy exemplars are chosen at random, independently of each other, instead of by
herding. The factor r of a stored row is large if few records are stored, but does not change its
clip norm. Gradients are computed record by record, because the embeddings are used outside the
head.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn

from perdure.contract import (
    Context,
    Forward,
    MemoryPlan,
    Plan,
    PrivacyCost,
    Spec,
    State,
    Strategy,
)
from perdure.data import Batch
from perdure.errors import ConfigError, StrategyError
from perdure.models import cosines, directions, mlp
from perdure.tasks import MASKED
from perdure.types import Params

if TYPE_CHECKING:
    from perdure.contract import Curator
    from perdure.data import Experience

WEIGHT = "head.weight"
SCALE = "head.scale"


@dataclass(frozen=True, kw_only=True)
class LUCIR(Strategy):
    """Train a cosine head with a less-forget constraint and a margin ranking loss.

    The model must be built with `head="cosine"`.

    Args:
        memory_size: total number of exemplars.
        less_forget: weight of the constraint for equal numbers of new and old classes
            (lambda_base).
        ranking: weight of the margin ranking loss; 1 in the paper.
        margin: wanted difference between the cosine of the true class and the cosines of new
            classes (m).
        negatives: number of new classes in this comparison (K).
    """

    memory_size: int
    less_forget: float = 5.0
    ranking: float = 1.0
    margin: float = 0.5
    negatives: int = 2
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(reuses_past_records=True)
    tasks_because: ClassVar[str] = "its margins are between the logits of one class and the others"

    def __post_init__(self) -> None:
        for name in ("less_forget", "ranking"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError.of(
                    f"lucir.{name}", getattr(self, name), "a finite number, 0 or more"
                )
        if not 0 <= self.margin <= 2:
            raise ConfigError.of(
                "lucir.margin", self.margin, "a difference of two cosines, from 0 to 2"
            )
        for name in ("memory_size", "negatives"):
            if getattr(self, name) < 1:
                raise ConfigError.of(f"lucir.{name}", getattr(self, name), "1 or more")

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: a memory of 16 records."""
        return cls(memory_size=16)

    def small_model(self, *, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Build a perceptron with a cosine head."""
        return mlp(
            input_shape=input_shape,
            num_classes=num_classes,
            hidden=(8,),
            seed=0,
            activation="tanh",
            head="cosine",
        )

    def init(self, spec: Spec) -> State:
        """Create the state with teacher and embeddings.

        Raises:
            StrategyError: if the stream is not class-incremental, or the model has no cosine head.
        """
        if spec.scenario != "class":
            raise StrategyError(
                "LUCIR works on class-incremental streams only; use Replay for this stream"
            )
        if {name for name in spec.params if name.startswith("head.")} != {WEIGHT, SCALE}:
            raise StrategyError(
                'LUCIR needs a cosine head; build the model with head="cosine", as '
                'mlp(head="cosine")'
            )
        held = torch.zeros_like(spec.params[WEIGHT])
        state = (
            State().declare_group("teacher", spec.teacher, "local").declare("held", held, "mean")
        )
        return state.declare("records", held.new_zeros(()), "local")

    def plan(self, experience: "Experience") -> Plan:
        """Return a plan with a memory of exemplars that forms one pool with the new records."""
        return Plan(memory=MemoryPlan(capacity=self.memory_size, selection="herding", use="pooled"))

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """Return (n,) cross entropy of scaled cosines, less-forget constraint, and ranking loss."""
        old = before(context)
        features = forward.features(batch.inputs)
        cosine, scale = self._scaled_cosines(forward, features, old, state)
        losses = context.losses(scale * cosine, batch)
        if context.experience == 0:
            return losses
        new = context.current & ~old
        then = directions(forward.at(state.group("teacher")).features(batch.inputs))
        turned = 1 - (directions(features) * then).sum(1)
        strength = self.less_forget * (old.sum() / new.sum().clamp(min=1)).sqrt()
        stored = state["records"].clamp(1, self.memory_size)
        rate = self.ranking * (context.declared_size + stored) / stored
        ranked = self._ranking_losses(cosine, batch.labels, old, new)
        return losses + strength * turned + rate * ranked

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Store the current model as the next teacher.

        The embeddings of the experience's new classes are fixed from now on.
        """
        new = curator.context.current & ~before(curator.context)
        held = torch.where(new[:, None], params[WEIGHT], state["held"])
        found = {"held": held, "records": state["records"] + curator.declared_size}
        return state.replace_group("teacher", params | curator.statistics).replace(found)

    def predict(self, forward: Forward, x: Tensor, context: Context, state: State) -> Tensor:
        """Compute scaled cosines (n, C) with the embeddings.

        Embeddings of old classes are fixed.
        """
        features = forward.features(x)
        cosine, scale = self._scaled_cosines(forward, features, before(context), state)
        return torch.where(context.allowed, scale * cosine, MASKED)

    def _scaled_cosines(
        self, forward: Forward, features: Tensor, old: Tensor, state: State
    ) -> tuple[Tensor, Tensor]:
        """Return (n, C) cosines of features (n, f) with all class embeddings, and their scale eta.

        The embeddings of the old classes, a mask (C,), are the fixed ones.
        """
        live = {**dict(forward.module.named_parameters()), **(forward.params or {})}
        return cosines(features, torch.where(old[:, None], state["held"], live[WEIGHT])), live[
            SCALE
        ]

    def _ranking_losses(self, cosine: Tensor, labels: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """Return (n,) margin ranking loss for records of old classes; 0 for other records.

        Args:
            cosine: (n, C) cosines of the features with every class embedding.
            labels: (n,) labels.
            old: (C,) bool, the classes of earlier experiences.
            new: (C,) bool, the classes of this experience.
        """
        count = min(self.negatives, len(new))
        rivals = torch.where(new, cosine, MASKED).topk(count, dim=1).values
        true = cosine.gather(1, labels[:, None])
        shortfall = (self.margin - true + rivals).clamp(min=0).sum(1)
        return torch.where(old[labels], shortfall, 0.0)


def before(context: Context) -> Tensor:
    """Return (C,) bool, True for the declared classes of earlier experiences (old classes)."""
    return context.task_classes[: context.experience].any(0)
