"""Elastic weight consolidation: penalise changes of parameters that past experiences need.

Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017, equation 3
(one penalty per experience); Schwarz et al., Progress & Compress, ICML 2018, section 3.2 (online,
with decay).

    penalty = strength / 2 * sum_t sum_j F_t,j (theta_j - theta*_t,j)^2
    F_t     = 1/n sum_i sum_c w_ic (d log p(c | x_i) / d theta)^2        at theta*_t
    w_ic    = p(c | x_i)             (fisher = "exact": the diagonal of the Fisher information)
              [c = c_i]    (fisher = "sampled": its expectation is the exact one)
              [c = y_i]    (fisher = "empirical": not the Fisher information, unless p is the truth)

c_i is one class drawn from p(. | x_i) by a hash of the record's id, so the row of a record does not
depend on other records. It takes one backward pass instead of one per class. So fisher = "auto",
the default, is "exact" if a record may be predicted as up to 100 classes, and "sampled" for more:
1,000 classes then cost about as much as 10. The three forms are compared in van de Ven, On the
Computation of the Fisher Information in Continual Learning, ICLR Blogposts 2025.

A sum of quadratic penalties is one quadratic penalty, with the summed Fisher information and the
Fisher-weighted mean of the anchors (up to a constant without gradient). So the separate form, too,
needs memory for one experience only.

State: `fisher`; `pull`, the Fisher information times the anchor; and `anchor`, their quotient.
`fisher` and `pull` add up over experiences and are averaged over clients by declared sizes, so a
federation has the same values as one party with all records. Memory cost: three times the
parameters, for any number of experiences. Privacy cost: one release per experience. The row of a
record is its squared gradient. Its L2 norm is at most the square of the gradient's norm, so it is
clipped to C^2. The sum is divided by the declared size, and negative values are set to 0.
"""

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from perdure.contract import Forward, Plan, PrivacyCost, QuadraticPenalty, Spec, State, task_losses
from perdure.data import Batch
from perdure.errors import ConfigError
from perdure.queries import SquaredGradient
from perdure.tasks import SingleLabel, Task
from perdure.types import Params
from perdure.utils import derive, uniforms

if TYPE_CHECKING:
    from perdure.contract import Curator
    from perdure.data import Experience

EXACT_CLASSES = 100
"""Largest number of classes for which `auto` means `exact`, with one backward pass per class."""

Fisher = Literal["auto", "exact", "sampled", "empirical"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EWC(QuadraticPenalty):
    """Quadratic penalty weighted by the diagonal Fisher information.

    Args:
        strength: weight of the penalty (lambda).
        mode: `separate` adds up the Fisher information of all experiences; `online` keeps one
            penalty around the latest parameters, and multiplies the old Fisher information by
            `decay` before the new one is added.
        fisher: `exact`: all classes that may be predicted, weighted by the model's probabilities.
            `sampled`: one class per record, drawn with these probabilities. `empirical`: the
            record's label. `auto`: `exact` if up to 100 classes may be predicted in the experience,
            `sampled` for more, and `empirical` (the squared gradient of the loss) for records of
            other tasks.
        decay: factor of the old Fisher information at each experience in `online` mode (gamma).
    """

    strength: float
    mode: Literal["separate", "online"] = "separate"
    fisher: Fisher = "auto"
    decay: float = 1.0
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(releases=1)
    weighted_by: ClassVar[tuple[str, ...]] = ("fisher",)
    tasks: ClassVar[tuple[type[Task], ...]] = (Task,)

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ConfigError.of("ewc.strength", self.strength, "a finite number, 0 or more")
        if not 0 <= self.decay <= 1:
            raise ConfigError.of("ewc.decay", self.decay, "a number from 0 to 1")
        if self.mode not in ("separate", "online"):
            raise ConfigError.of("ewc.mode", self.mode, ("separate", "online"))
        if self.fisher not in get_args(Fisher):
            raise ConfigError.of("ewc.fisher", self.fisher, get_args(Fisher))

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: a penalty of strength 50.0."""
        return cls(strength=50.0)

    def refuse_task(self, task: Task) -> None:
        """Refuse forms of the Fisher information that need one class per record, for other tasks.

        Raises:
            ConfigError: if the form is `exact` or `sampled` and the task is not single-label.
        """
        super().refuse_task(task)
        if self.fisher in ("exact", "sampled") and not isinstance(task, SingleLabel):
            allowed = f"auto or empirical for {task.name} records, which do not have one class each"
            raise ConfigError.of("ewc.fisher", self.fisher, allowed)

    def init(self, spec: Spec) -> State:
        """Create a state in which all Fisher information is 0."""
        zeros = {name: torch.zeros_like(value) for name, value in spec.params.items()}
        state = State().declare_group("fisher", zeros, "mean").declare_group("pull", zeros, "mean")
        return state.declare_group("anchor", zeros, "local")

    def plan(self, experience: "Experience") -> Plan:
        """Return the plan of an experience; in the first one the penalty is 0 and not computed."""
        return Plan(applies_penalty=experience.index > 0)

    def weight(self, state: State, *groups: Tensor) -> Tensor:
        """Weights of the penalty: strength times the Fisher information."""
        (fisher,) = groups
        return self.strength * fisher

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Release the Fisher information of the experience, and add it to the penalty."""
        context = curator.context
        form = self.form_for(context.task, int(context.allowed.sum()))
        query = SquaredGradient(lambda forward, batch: _terms(form, curator, forward, batch))
        total = curator.release(query, clip_norm=curator.clip_norm**2, purpose="fisher")
        new = {name: (total[name] / curator.declared_size).clamp(min=0) for name in params}
        if self.mode == "online":
            fisher = {name: self.decay * state[f"fisher/{name}"] + new[name] for name in new}
            pull = {name: fisher[name] * params[name] for name in new}
        else:
            fisher = {name: state[f"fisher/{name}"] + new[name] for name in new}
            pull = {name: state[f"pull/{name}"] + new[name] * params[name] for name in new}
        return state.replace_group("fisher", fisher).replace_group("pull", pull)

    def derive(self, state: State) -> State:
        """Compute the anchor of each parameter from the state."""
        return state.replace_group(
            "anchor", {name: anchor(state, name) for name in state.group("fisher")}
        )

    def form_for(self, task: Task, classes: int) -> Fisher:
        """Return the form of the Fisher information; resolve `auto` by task and classes."""
        if self.fisher != "auto":
            return self.fisher
        if not isinstance(task, SingleLabel):
            return "empirical"
        if classes <= EXACT_CLASSES:
            return "exact"
        log.info(
            "ewc: %d classes may be predicted, so Fisher information uses one sampled label per "
            'record; fisher="exact" takes one backward pass per class',
            classes,
        )
        return "sampled"


def _terms(
    fisher: Fisher, curator: "Curator", forward: Forward, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Return the losses and weights (n, k) of the terms c of every record's Fisher information."""
    if not isinstance(curator.context.task, SingleLabel):
        losses = task_losses(forward, batch, curator.context)[:, None]
        return losses, torch.ones_like(losses)
    logits = curator.context.mask(forward(batch.inputs), batch)
    log_p = torch.log_softmax(logits, dim=1)
    if fisher == "exact":
        possible = torch.nonzero(curator.context.allowed).flatten()
        return -log_p[:, possible], log_p[:, possible].exp().detach()
    labels = batch.labels
    if fisher == "sampled":
        labels = drawn(
            log_p.exp(), uniforms(batch.ids, derive("fisher", curator.context.experience))
        )
    return -log_p.gather(1, labels[:, None]), torch.ones_like(log_p[:, :1])


def anchor(state: State, name: str) -> Tensor:
    """Compute the anchor of the parameter `name`.

    It is the Fisher-weighted mean of the anchors of all experiences; 0 if the weights are 0.
    """
    fisher = state[f"fisher/{name}"]
    return state[f"pull/{name}"] / fisher.clamp(min=torch.finfo(fisher.dtype).tiny)


def drawn(p: Tensor, uniform: Tensor) -> Tensor:
    """Return (n,) int64 class for each row of p (n, C), drawn with numbers (n,) uniform in (0, 1).

    A class of probability 0 is never drawn.
    """
    sums = p.detach().cumsum(1)
    return (sums <= uniform[:, None] * sums[:, -1:]).sum(1)
