"""Self test of clipping: compare clipped gradients of synthetic records with a loop of autograd.

Book-keeping, the samplers of Opacus and torch.func.vmap all compute per-record gradients from one
pass over a batch, and so depend on how a layer handles a batch. The loop does not: it runs one
record at a time, with one forward pass, one backward pass and an explicit clip.
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
"""Number of synthetic records that are compared."""

TOLERANCE = 1e-4
"""Largest relative difference of the clipped sums that rounding can explain."""

TOLERANCE_OF_FLOAT32 = 2e-3
"""Largest relative difference of the clipped sums for a model that does not run in float64.

In float32, rounding can switch a ReLU on or off, which cannot be told from an error.
"""

NEAR_OVERFLOW = 1.5e19
"""Norm of inputs whose square is just finite in float32; their gradients have squares of 0."""

SMALL_CLIP = 1e-6
"""Clip norm so small that every record with a gradient other than 0 is clipped."""

ClippedGradient = Callable[[Tensor, Tensor, Clip], Params | None]
"""Function from inputs (n, ...), other facts of each row and a clip to the library's clipped sum.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientCase:
    """Clipped gradient to test, with everything needed to compute the gradients of single records.

    Args:
        losses: function that returns the losses of some records, from the model with `params`, in
            training mode without dropout (see `perdure.privacy.guard.loss_checks.quiet_training`).
        clipped: function that returns the clipped sum of the gradients of the same losses; it is
            tested.
        params: parameters of the gradient, by name.
        inputs: (n, ...) inputs of synthetic records; n is at least `RECORDS`.
        labels: (n, ...) labels, and other facts, of these records.
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
    """Refuse a clipped gradient that differs from a loop of autograd over synthetic records.

    The bound is the median of the records' norms, so that some records are clipped and some are
    not.

    Args:
        case: clipped gradient and losses to compare.
        what: name of the gradient, for the error message.
        per_layer: clip every layer separately.
        in_double: function that returns the case in float64. It decides if the results differ in
            float32, because in deep networks rounding can switch units of ReLU on or off.

    Raises:
        GuardError: if the sums differ (the message names the parameter with the largest
            difference), or if gradients of single records cannot be computed.
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
            f"{moved:.2g} of its size, most in parameter {worst}: in a batch, a layer computes "
            "something else than its type (because of a replaced method, a hook, an in-place "
            f"write or a wrong clipping rule); allowed: a difference below {allowed:g}; build the "
            "layer from unchanged torch layers"
        )


def check_bound(case: GradientCase, what: str, *, per_layer: bool = False) -> None:
    """Refuse a clipped gradient that exceeds the clip norm for a record with very large inputs.

    Before a normalisation layer, a very large input has a very small gradient. A clipping rule that
    multiplies their squares in float32 then computes a norm of 0, and does not clip. Denormal
    numbers are set to 0, as in training. Records on which the model fails or overflows are skipped.

    Args:
        case: clipped gradient to test; its inputs are floating-point numbers of any size.
        what: name of the gradient, for the error message.
        per_layer: clip every layer separately.

    Raises:
        GuardError: if a clipped gradient is longer than the clip norm.
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
                f"{moved:.3g} times the clip norm: a clipping rule computes a norm that is too "
                f"small; allowed: at most {1 + SLACK:g}; compute norms with squared_row_norms of "
                "perdure.privacy.clipping, or declare the range of the inputs "
                "(Records(domain=InputDomain(range=...)))"
            )


def _at_large_inputs(case: GradientCase, inputs: Tensor, clip: Clip) -> Params | None:
    """Compute the clipped gradient of one record with very large inputs.

    Return None if the model fails on the record, because then nothing is proved.
    """
    try:
        with undisturbed(), flushed():
            seed_globally(0)
            return case.clipped(inputs, case.labels[:1], clip)
    except PerdureError:
        raise
    except Exception:  # of any model
        return None


def _gap(case: GradientCase, what: str, per_layer: bool) -> tuple[float, str]:
    """Relative distance of the tested sum from the sum of the loop, and the worst parameter."""
    records = range(len(case.inputs))
    with undisturbed():
        rows = [_row(case, slice(i, i + 1)) for i in records]
        norm = sorted(map(_length, rows))[len(rows) // 2]
        if not 0.0 < norm < math.inf:
            return 0.0, ""  # no gradient reaches the parameters, or all gradients overflow
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
    """Sum of the rows after each of them (or each of its layers) was scaled to the clip norm."""
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
    """Compute the clipped sum that is tested, or raise GuardError if it cannot be computed."""
    try:
        found = case.clipped(case.inputs, case.labels, clip)
    except PerdureError:
        raise
    except Exception as error:  # the losses run on each record, so this is another error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GuardError(
            f"gradients of single records cannot be computed for {what}: "
            f"{reason.partition('. ')[0]}; allowed: a forward pass that runs under "
            "torch.func.vmap, without lengths, offsets or branches that depend on values; pad "
            "all records to one length, and use masks and torch.where"
        ) from error
    if found is None:
        raise GuardError(
            f"{what} has no gradient for {len(case.inputs)} records; return (n,) losses that "
            "depend on the parameters"
        )
    return found
