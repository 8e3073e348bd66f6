"""CWR*: merge the temporary heads of all experiences into one head on a frozen body.

Lomonaco, Maltoni and Pellegrini, Rehearsal-free continual learning over small non-i.i.d. batches,
CVPR Workshops 2020, algorithm 1 (CWR*); the mean shift is from Maltoni and Lomonaco, Continuous
learning in single-incremental-task scenarios, Neural Networks 2019, section 3.2 (CWR+).

    start      tw_c = cw_c for the classes of the experience, 0 for all others
    train      loss_i = CE(x_i, y_i; tw); of the first experience body and tw, later tw alone
    end        cw_c <- (w_c cw_c + tw_c - mean(tw)) / (w_c + 1),    w_c = sqrt(past_c / now_c)
    predict    with cw

for the classes c of the experience. mean(tw) is one number over their weights (and one over their
biases). past_c and now_c are the numbers of records of c in earlier experiences and in this one. A
class in one experience only has w_c = 0. Counts of classes that are not in the experience are set
to 0, also if noise changes them.

A strategy cannot write parameters. So tw is computed as the model's head plus a shift that is
constant during an experience. The shift is chosen so that tw starts at the values above; its
gradient is the gradient of the head. Weight decay pulls the model's head, not tw, towards 0.
Running statistics of BatchNorm are not parameters, so they still change in the frozen body.

State: `base`, the model's head at the end of the previous experience, and for the formula `kept`,
`trained`, `totals`, `before` and `latest`. The latter are combined over clients, and `cw` is
computed from them, so a federation has the same `cw` as one party with all records and the same
model. Memory cost: four times the head. Privacy cost: one histogram of classes per experience, with
integer noise.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.contract import (
    Context,
    Forward,
    Plan,
    PrivacyCost,
    Spec,
    State,
    Strategy,
    refuse_single_class,
)
from perdure.data import Batch
from perdure.errors import StrategyError
from perdure.tasks import MASKED
from perdure.types import Params

if TYPE_CHECKING:
    from perdure.contract import Curator
    from perdure.data import Experience


@dataclass(frozen=True, kw_only=True)
class CWRStar(Strategy):
    """Copy weights with re-initialisation; only the first experience trains the features.

    Args:
        head: prefix of the names of the head's parameters.
    """

    head: str = "head."
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(histograms=1)
    tasks_because: ClassVar[str] = "it keeps one row of the head per class"

    def init(self, spec: Spec) -> State:
        """Create a state in which no class is consolidated.

        Raises:
            StrategyError: if the head is not one linear layer over the features.
        """
        own = {name: value for name, value in spec.params.items() if name.startswith(self.head)}
        if {value.shape for value in own.values()} - {(spec.num_classes,)} != {
            (spec.num_classes, spec.feature_size)
        }:
            raise StrategyError(
                f"the parameters {self.head!r} are not one linear layer; give CWRStar(head=...) "
                "the prefix of the head's parameters"
            )
        zeros = {name: torch.zeros_like(value) for name, value in own.items()}
        none = next(iter(zeros.values())).new_zeros(spec.num_classes, dtype=torch.float64)
        state = State().declare_group("base", own, "local").declare_group("cw", zeros, "local")
        state = state.declare_group("kept", zeros, "mean").declare_group("trained", zeros, "mean")
        return (
            state.declare("totals", none, "sum")
            .declare("before", none, "mean")
            .declare("latest", none, "mean")
        )

    def plan(self, experience: "Experience") -> Plan:
        """Return a plan to train all parameters in the first experience, and later the head only.

        Raises:
            StrategyError: if the first experience has one class, so that no feature would be
                learnt.
        """
        if experience.index == 0:
            refuse_single_class(self.name, experience)
        return Plan(trainable=(self.head,) if experience.index else None)

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """Return (n,) cross entropy of the temporary head."""
        shift = {
            n: start(value, context.current) - state[f"base/{n}"]
            for n, value in state.group("cw").items()
        }
        logits, features = forward.with_features(batch.inputs)
        logits = logits + linear(features, shift)
        return context.losses(logits, batch)

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Subtract the mean from the trained rows of the head, and count the records per class."""
        now = curator.count(
            lambda batch: batch.labels, bins=len(state["totals"]), purpose="class counts"
        )
        current = curator.context.current
        kept = state.group("cw")
        now = torch.where(current, now, 0)
        base = {name: params[name] for name in kept}
        trained = {
            name: base[name] - state[f"base/{name}"] + start(kept[name], current) for name in kept
        }
        trained = {
            name: start(value - value[current].mean(), current) for name, value in trained.items()
        }
        state = (
            state.replace_group("base", base)
            .replace_group("kept", kept)
            .replace_group("trained", trained)
        )
        return state.replace(
            {
                "before": state["totals"],
                "totals": state["totals"] + now,
                "latest": current.to(state["latest"]),
            }
        )

    def derive(self, state: State) -> State:
        """Merge the temporary head into the consolidated head for the last classes."""
        now = (state["totals"] - state["before"]).clamp(min=1)
        before = state["before"].clamp(min=0)
        weight = (before / now).sqrt()
        latest = state["latest"] > 0
        cw = {
            name: torch.where(
                by_row(latest, kept), merged(kept, state[f"trained/{name}"], weight), kept
            )
            for name, kept in state.group("kept").items()
        }
        return state.replace_group("cw", cw)

    def predict(self, forward: Forward, x: Tensor, context: Context, state: State) -> Tensor:
        """Compute logits (n, C) with the consolidated head."""
        return torch.where(context.allowed, linear(forward.features(x), state.group("cw")), MASKED)


def linear(features: Tensor, head: Params) -> Tensor:
    """Compute logits (n, C) of a linear layer, given by its parameters.

    The parameters are a weight (C, f) and, if there is one, a bias (C,).
    """
    by_dim = {value.dim(): value for value in head.values()}
    return F.linear(features, by_dim[2], by_dim.get(1))


def by_row(values: Tensor, like: Tensor) -> Tensor:
    """Reshape one value per class (C,) so that it multiplies the class's row of `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def start(value: Tensor, classes: Tensor) -> Tensor:
    """Return initial rows of the temporary head: `value` for `classes` (C,) bool, 0 for others."""
    return torch.where(by_row(classes, value), value, 0.0)


def merged(kept: Tensor, trained: Tensor, weight: Tensor) -> Tensor:
    """Return the mean of a kept and a trained head; kept row c counts `weight[c]` times."""
    share = by_row(weight, kept).to(kept.dtype)
    return (share * kept + trained) / (share + 1)
