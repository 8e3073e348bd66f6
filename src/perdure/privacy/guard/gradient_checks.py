"""Self test of clipping: the clipped gradient of synthetic records against a loop of autograd.

Book-keeping, the samplers of Opacus and torch.func.vmap each read the gradients of single records
off one pass of a batch, and rest on what a layer does with the batch. The loop rests on nothing:
one record, one forward pass, one backward pass, and a clip written out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.errors import GuardError, PerdureError
from perdure.privacy.clipping.clip import Clip, layer_of
from perdure.privacy.grid import SLACK
from perdure.privacy.guard.loss_checks import SyntheticLosses
from perdure.types import Params
from perdure.utils.denormals import flushed
from perdure.utils.seeding import seed_globally, undisturbed

RECORDS = 3
"""Synthetic records that are compared."""

TOLERANCE = 1e-4
"""Share of the clipped sum that rounding explains."""

TOLERANCE_OF_FLOAT32 = 2e-3
"""The same for a model that does not run in float64, in which units of ReLU that rounding switches
cannot be told from a fault.
"""

NEAR_OVERFLOW = 1.5e19
"""Norm of inputs whose square is just finite in float32; that of a gradient of 1e-19 is 0."""

SMALL_CLIP = 1e-6
"""Clip norm at which every record but one without a gradient is clipped."""

ClippedGradient = Callable[[Tensor, Tensor, Clip], Params | None]
"""(inputs (n, ...), what else goes with each row, clip) -> the library's clipped sum by name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientCase:
    """A clipped gradient that is compared with the gradients of single records.

    Args:
        losses: the losses of some records, by the model at `params`, in training mode without
            dropout (see `perdure.privacy.guard.loss_checks.quiet_training`).
        clipped: the sum that is tested, of the same losses.
        params: parameters of the gradient.
        inputs: (n, ...) of synthetic records, `RECORDS` or more.
        labels: (n,).
    """

    losses: SyntheticLosses
    clipped: ClippedGradient
    params: Params
    inputs: Tensor
    labels: Tensor


def check_gradients(
    case: GradientCase,
    what: str,
    *,
    per_layer: bool = False,
    in_double: Callable[[], GradientCase] | None = None,
) -> None:
    """Compare the clipped gradient of synthetic records with a loop of autograd over them.

    The bound is the middle one of the records' norms, so that some are clipped and some are not.

    Args:
        case: what is compared.
        what: name for the message.
        per_layer: clip every layer by itself.
        in_double: makes the case in float64, which decides where float32 differs: in deep networks
            rounding switches units of ReLU.

    Raises:
        GuardError: naming the parameter whose sum differs most, or the reason why gradients of
            single records cannot be formed.
    """
    moved, worst = _gap(case, what, per_layer)
    if moved < TOLERANCE:
        return
    allowed = TOLERANCE_OF_FLOAT32
    if in_double is not None:
        try:
            moved, worst = _gap(in_double(), what, per_layer)
            allowed = TOLERANCE
        except Exception:  # noqa: S110  # a model that is written for float32 alone
            pass
    if not moved < allowed:  # so that NaN is refused too
        raise GuardError(
            f"the clipped gradient of {what} differs from the gradients of single records by "
            f"{moved:.2g} of its size, most in parameter {worst}: a layer computes something else "
            "in a batch than its type says (a replaced method, a hook, a tensor written to in "
            f"place, a wrong clipping rule); allowed: a difference below {allowed:g}; build the "
            "layer out of torch's own, unchanged"
        )


def check_bound(case: GradientCase, what: str, *, per_layer: bool = False) -> None:
    """Look at the clipped gradients of single records with very large inputs.

    In front of a normalisation their gradients are as small as the inputs are large; a norm that
    multiplies squares in float32 is 0 then, and nothing is clipped. Denormal numbers count as 0, as
    while training. A record on which the model fails or overflows bounds nothing and is passed.

    Args:
        case: what is looked at; inputs are floating-point numbers of any size.
        what: name for the message.
        per_layer: clip every layer by itself.

    Raises:
        GuardError: where a clipped gradient is longer than the clip norm.
    """
    clip = Clip(norm=SMALL_CLIP, per_layer=per_layer)
    one = case.inputs[:1].flatten(1)
    first = torch.zeros_like(one)
    first[:, 0] = NEAR_OVERFLOW
    long = one * (NEAR_OVERFLOW / one.norm().clamp(min=1e-3))
    for row in (long, first):
        found = _at_large_inputs(case, row.view_as(case.inputs[:1]), clip)
        moved = _length({n: value.double() for n, value in (found or {}).items()}) / clip.norm
        if not moved <= 1 + SLACK:  # so that NaN is refused too
            raise GuardError(
                f"the clipped gradient of {what} for a record with inputs of {NEAR_OVERFLOW:g} is "
                f"{moved:.3g} times the clip norm: a clipping rule computes too small a norm; "
                f"allowed: at most {1 + SLACK:g}; take norms with squared_row_norms of "
                "perdure.privacy.clipping, or declare the range of the inputs "
                "(Records(domain=InputDomain(range=...)))"
            )


def _at_large_inputs(case: GradientCase, inputs: Tensor, clip: Clip) -> Params | None:
    """Clipped gradient of one record; None where the model fails on it, which bounds nothing."""
    try:
        with undisturbed(), flushed():
            seed_globally(0)
            return case.clipped(inputs, case.labels[:1], clip)
    except PerdureError:
        raise
    except Exception:  # of any model
        return None


def _gap(case: GradientCase, what: str, per_layer: bool) -> tuple[float, str]:
    """Distance of the tested sum from the loop's, as a share of it, and the worst parameter."""
    records = range(len(case.inputs))
    with undisturbed():
        rows = [_row(case, slice(i, i + 1)) for i in records]
        norm = sorted(map(_length, rows))[len(rows) // 2]
        if not 0.0 < norm < math.inf:
            return 0.0, ""  # nothing reaches the parameters, or all of it overflows
        clip = Clip(norm=norm, per_layer=per_layer)
        seed_globally(0)
        found = _found(case, clip, what)
    expected = _clipped_by_hand(rows, clip)
    apart = {name: _length({name: found[name].double() - v}) for name, v in expected.items()}
    worst = max(apart, key=lambda name: math.inf if math.isnan(apart[name]) else apart[name])
    return math.sqrt(sum(value**2 for value in apart.values())) / _length(expected), worst


def _row(case: GradientCase, one: slice) -> Params:
    """Gradient of one record, in float64."""
    seed_globally(0)
    loss = case.losses(case.inputs[one], case.labels[one]).sum()
    if not loss.requires_grad:
        return {name: torch.zeros_like(p, dtype=torch.float64) for name, p in case.params.items()}
    grads = torch.autograd.grad(
        loss, list(case.params.values()), allow_unused=True, materialize_grads=True
    )
    return {name: grad.double() for name, grad in zip(case.params, grads, strict=True)}


def _length(row: Params) -> float:
    return math.sqrt(sum(float(value.square().sum()) for value in row.values()))


def _clipped_by_hand(rows: list[Params], clip: Clip) -> Params:
    """Sum of the rows, each (or each of its layers) scaled into its bound."""
    layers = dict.fromkeys(map(layer_of, rows[0])) if clip.per_layer else {"": None}
    bound = clip.norm / math.sqrt(len(layers))
    total = {name: torch.zeros_like(value) for name, value in rows[0].items()}
    for row in rows:
        for layer in layers:
            own = {n: v for n, v in row.items() if not clip.per_layer or layer_of(n) == layer}
            factor = min(1.0, bound / max(_length(own), 1e-30))
            for name, value in own.items():
                total[name] += factor * value
    return total


def _found(case: GradientCase, clip: Clip, what: str) -> Params:
    """The sum that is tested."""
    try:
        found = case.clipped(case.inputs, case.labels, clip)
    except PerdureError:
        raise
    except Exception as error:  # the losses themselves ran on each record
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GuardError(
            f"gradients of single records cannot be formed of {what}: {reason.partition('. ')[0]}; "
            "allowed: a forward pass that runs under torch.func.vmap, without lengths, offsets or "
            "branches computed from values; pad to one length, and use masks and torch.where"
        ) from error
    if found is None:
        raise GuardError(
            f"{what} gives no gradient for {len(case.inputs)} records; return (n,) losses"
        )
    return found
