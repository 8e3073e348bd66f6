"""Orthogonal gradient descent: take steps that, to first order, do not change earlier logits.

Farajtabar, Azizan, Mott and Li, Orthogonal Gradient Descent for Continual Learning, AISTATS 2020,
algorithm 1.

    g' = g - V^T (V V^T)^+ V g
         the rows of V: mean of grad f(x) over a group of records, for every group

f is the logit of the record's own class (OGD-GTL, the choice of the paper) or the mean of the
logits that may be predicted (OGD-AVE). V has `directions` rows for every finished experience,
computed with the parameters at its end.

The paper keeps the gradients of 200 single records of a task and makes them orthonormal one by one
(Gram-Schmidt). Here a direction is a mean, because a curator releases only sums over records. The
class and the id of a record decide its group: every class has an equal share of the directions, and
a hash of the id chooses one of them. So V spans the mean gradient of every class; with more groups
it also spans differences between records of a class. With one record per group it is the method of
the paper with all records. The pseudo-inverse projects on the same complement as Gram-Schmidt, and
leaves out rows of 0 and rows that depend on others up to `DEPENDENT`. OGD-ALL, with a direction for
every logit, is left out, because a record would contribute to one direction per class.

The method needs steps along g': plain SGD with a small learning rate. Adam rescales every number of
g'; weight decay and earlier momentum add to it. In task-incremental streams the loss has no
gradient in the heads of other tasks, but g' has: it compensates the effect of the changed body on
their logits. (Directions without the head had the same accuracy.) In class-incremental streams
nothing keeps the logits of new classes low for old records, so the method forgets as much as SGD.

State: `directions`, averaged over clients by declared sizes, so a federation has the same
directions as one party with all records and the same model; `inverse`, the pseudo-inverse of their
inner products; and `filled`, the number of directions so far. Their sizes depend on the length of
the stream, so a state does not fit a stream that has grown. Memory cost: experiences x `directions`
times the parameters; every number of the directions so far is read twice per step. The release
takes `directions` times the parameters, because a whole row of a record is never formed
(`perdure.queries.GroupedGradient`). Privacy cost: one release per experience. A record adds the
gradient of one number to one direction, clipped as its gradient is. Other computations cost no
privacy. The noise of a direction has the length noise multiplier x clip norm x sqrt(parameters),
but the sum has at most clip norm x records of the group. So use few groups of many records. A
direction of pure noise protects nothing, but also changes g' very little.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from torch import Tensor

from perdure.contract import Context, Forward, PrivacyCost, Spec, State, Strategy
from perdure.data import Batch
from perdure.errors import ConfigError, StrategyError
from perdure.queries import GroupedGradient
from perdure.types import Params
from perdure.utils import derive, number_unless_vmapped, uniforms

if TYPE_CHECKING:
    from perdure.contract import Curator

DEPENDENT = 1e-6
"""Eigenvalue of the Gram matrix of unit directions below which it counts as 0, far above the
rounding errors of float32.
"""


@dataclass(frozen=True, kw_only=True)
class OGD(Strategy):
    """Project the gradient so that it is orthogonal to the logit gradients of earlier experiences.

    Args:
        directions: number of directions that are kept per experience. More directions protect more,
            but leave fewer directions for training.
        logit: `true` for the logit of the record's class (OGD-GTL), or `mean` for the mean over the
            classes that may be predicted (OGD-AVE).
    """

    directions: int = 20
    logit: Literal["true", "mean"] = "true"
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(releases=1)
    tasks_because: ClassVar[str] = "it stores gradients of the logit of a record's class"

    def __post_init__(self) -> None:
        if not self.directions >= 1:
            raise ConfigError.of("ogd.directions", self.directions, "1 or more")
        if self.logit not in ("true", "mean"):
            raise ConfigError.of("ogd.logit", self.logit, ("true", "mean"))

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: 4 directions per experience."""
        return cls(directions=4)

    def init(self, spec: Spec) -> State:
        """Create the state, with no directions."""
        rows = spec.num_experiences * self.directions
        zeros = {name: value.new_zeros(rows, *value.shape) for name, value in spec.params.items()}
        inverse = next(iter(zeros.values())).new_zeros(rows, rows, dtype=torch.float64)
        state = State().declare_group("directions", zeros, "mean")
        state = state.declare("inverse", inverse, "local")
        return state.declare("filled", inverse.new_zeros((), dtype=torch.int64), "local")

    def project(self, gradient: Params, references: tuple[Params, ...], state: State) -> Params:
        """Remove the part of the gradient in the span of the directions.

        Raises:
            StrategyError: if only some of the parameters are trained.
        """
        rows = filled_rows(state, state["filled"])
        if rows.keys() != gradient.keys():
            raise StrategyError(
                "OGD needs gradients of all parameters, but another strategy trains only some of "
                "them; do not combine OGD with a strategy that freezes parameters"
            )
        count = len(next(iter(rows.values())))
        if not count:
            return gradient
        along = torch.stack([rows[name] @ value.flatten() for name, value in gradient.items()]).sum(
            0
        )
        shares = (state["inverse"][:count, :count] @ along.double()).to(along)
        return {
            name: value - (shares @ rows[name]).view_as(value) for name, value in gradient.items()
        }

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Release the directions of the experience, as one sum over its records."""
        at = curator.context
        k = self.directions
        query = GroupedGradient(
            terms=lambda forward, batch: self._logits(at, forward, batch),
            group=lambda batch: group_of(batch, at, k),
            groups=k,
        )
        total = curator.release(query, clip_norm=curator.clip_norm, purpose="logit gradients")
        first = at.experience * k
        changes = {
            name: torch.cat([rows[:first], total[name] / curator.declared_size, rows[first + k :]])
            for name, rows in state.group("directions").items()
        }
        return state.replace_group("directions", changes)

    def derive(self, state: State) -> State:
        """Compute the pseudo-inverse of the directions' inner products; count directions."""
        rows = [value.flatten(1) for value in state.group("directions").values()]
        present = torch.stack([torch.linalg.vector_norm(part, dim=1) for part in rows]).sum(0) != 0
        places = torch.arange(1, len(present) + 1, device=present.device)
        filled = torch.where(present, places, 0).amax()
        wide = [part.double() for part in filled_rows(state, filled).values()]
        inverse = inverse_of(torch.stack([part @ part.T for part in wide]).sum(0))
        beyond = len(present) - len(inverse)
        padded = torch.nn.functional.pad(inverse, (0, beyond, 0, beyond))
        return state.replace({"inverse": padded, "filled": filled})

    def _logits(self, context: Context, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = forward(batch.inputs)
        if self.logit == "true":
            chosen = logits.gather(1, batch.labels[:, None])
        else:
            chosen = (logits * context.allowed).sum(1, keepdim=True) / context.allowed.sum()
        return chosen, torch.ones_like(chosen)


def filled_rows(state: State, filled: Tensor) -> Params:
    """Return the stored directions (k, numbers) by parameter: the first `filled` () rows.

    Later rows are 0. Under vmap all rows are returned, because batched states may have different
    numbers of directions.
    """
    count = number_unless_vmapped(filled)
    rows = {name: value.flatten(1) for name, value in state.group("directions").items()}
    return rows if count is None else {name: value[: int(count)] for name, value in rows.items()}


def group_of(batch: Batch, context: Context, groups: int) -> Tensor:
    """Return (n,) group of each record, decided by its class and its id only.

    Every class of the experience has an equal share of the groups.

    If there are fewer groups than classes, classes share groups.
    """
    share = max(1, groups // len(torch.nonzero(context.current)))
    rank = context.current.cumsum(0)[batch.labels] - 1
    return (rank * share + scattered(batch.ids, share)) % groups


def scattered(ids: Tensor, into: int) -> Tensor:
    """Return (n,) numbers from 0 to `into` - 1, each by a hash of the record's id."""
    return (uniforms(ids, derive("ogd")) * into).long()


def inverse_of(products: Tensor) -> Tensor:
    """Return (K, K) pseudo-inverse of the inner products (K, K), computed with unit directions.

    Directions of length 0 are left out.
    """
    lengths = products.diagonal().clamp(min=0).sqrt()
    scale = torch.where(lengths > 0, 1 / lengths.clamp(min=torch.finfo(lengths.dtype).tiny), 0.0)
    units = products * scale[:, None] * scale
    inverse: Tensor = torch.linalg.pinv(units, atol=DEPENDENT, rtol=0.0, hermitian=True)
    return inverse * scale[:, None] * scale
