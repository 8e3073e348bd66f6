"""L2P: each record picks prompts from a pool by a key, on a frozen transformer.

Wang, Zhang, Lee, Zhang, Sun, Ren, Su, Perot, Dy and Pfister, Learning to Prompt for Continual
Learning, CVPR 2022, section 4, equation 5.

    q(x)    = features of the frozen transformer without prompts
    K_x     = the N keys of the pool with the largest cos(q(x), k)
    loss_i  = CE(x_i, y_i) over the classes of the record's own experience
              + strength * sum over k in K_x of (1 - cos(q(x_i), k))

The prompts of K_x are put before the tokens of x, and the mean of their last states goes to the
head; prompts, keys and head are trained. As in the authors' code, the logits of all other classes
are left out of the loss, so the rows of old classes in the head have no gradient. An optimiser with
momentum, or Adam, can still change these rows, because it keeps averages of earlier gradients;
`Learner(reset_optimizer=True)` starts each experience with a new optimiser.

Two parts of the authors' method are left out, because both depend on several records. First, the
table that counts how often each prompt was picked, which makes frequent prompts less likely
(section 4.2, optional). Second, the option of their code to choose the same prompts for a whole
batch by a vote. Here every record has its own prompts, in training and in prediction.

The model is `perdure.models.prompted(backbone)`.

State: none. Memory cost: the pool. A step and a prediction take two passes through the transformer.
Privacy cost: only the gradient: the prompts of a record depend only on the record and the
parameters.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from perdure.contract import Context, Forward, Plan, Spec, State, Strategy, refuse_single_class
from perdure.data import Batch
from perdure.errors import ConfigError, StrategyError
from perdure.models import prompted, tiny
from perdure.tasks import MultiLabel, Regression, SingleLabel, Task

if TYPE_CHECKING:
    from perdure.data import Experience


@dataclass(frozen=True, kw_only=True)
class L2P(Strategy):
    """Pick prompts from a pool by the similarity of keys and queries.

    Args:
        strength: weight of the loss term that moves keys towards queries (lambda).
    """

    strength: float = 0.5
    tasks: ClassVar[tuple[type[Task], ...]] = (SingleLabel, MultiLabel, Regression)
    tasks_because: ClassVar[str] = "its models give one row of outputs per record"

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ConfigError.of("l2p.strength", self.strength, "a finite number, 0 or more")

    def small_model(self, *, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Build a transformer of one block with a pool of three prompts."""
        return prompted(tiny(input_shape), num_classes=num_classes, pool=3, length=2, chosen=2)

    def init(self, spec: Spec) -> State:
        """Check the model; the state is empty.

        Raises:
            StrategyError: if the model has no pool of prompts.
        """
        if not {"body.prompts.weight", "body.keys.weight"} <= spec.params.keys():
            raise StrategyError(
                "the model has no pool of prompts; L2P needs "
                f"perdure.models.prompted(backbone, num_classes={spec.num_classes})"
            )
        return State()

    def plan(self, experience: "Experience") -> Plan:
        """Return a plan to train the pool and the head.

        Raises:
            StrategyError: if the experience has one class, so that there is nothing to distinguish.
        """
        refuse_single_class(self.name, experience)
        return Plan()

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """(n,) cross entropy over the classes of the record's experience, plus key distance."""
        logits, similarity = forward.method("matched")(batch.inputs)
        own = context.task_classes[batch.tasks]
        losses = context.task.losses(logits, batch.labels, own)
        pull: Tensor = (1 - similarity).sum(1)
        return losses + self.strength * pull
