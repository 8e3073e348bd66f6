"""Certificates by interval bound propagation (Gowal et al. 2018)."""

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from numbers import Real

import torch
from torch import Tensor

from perdure.adversarial.bounds import Bounds, of_entries, refuse_bounds
from perdure.adversarial.certificates.card import Certificate
from perdure.adversarial.certificates.interval import Interval, between
from perdure.adversarial.robust_accuracy import MOST_ROWS, fixed
from perdure.errors import ConfigError


def ball(inputs: Tensor, epsilon: float | Tensor, bounds: Bounds) -> Interval:
    """Return the interval (n, ...) of all allowed inputs in the linf ball around each record.

    Args:
        inputs: (n, ...) inputs within the bounds.
        epsilon: radius, or one for each record in a shape that fits (n, ...).
        bounds: smallest and largest value of an input, each for all features or as a list with one
            number per feature; None for inputs without bounds.
    """
    low, high = (of_entries("bounds", bound, inputs) for bound in bounds or (-math.inf, math.inf))
    return between((inputs - epsilon).clamp(min=low), (inputs + epsilon).clamp(max=high))


def worst_logits(predict: Callable[[Tensor], Tensor], box: Interval, labels: Tensor) -> Tensor:
    """Return (n, C) bounds on each logit minus the label's logit; 0 for the label.

    A record whose other bounds are all below 0 is classified as its label everywhere in the box.

    Args:
        predict: model of layers that have a rule, in evaluation mode.
        box: interval (n, ...) of inputs.
        labels: (n,) int64 classes.

    Raises:
        ConfigError: if a layer has no rule.
    """
    return _bounded(predict, box).above(labels)


def _bounded(predict: Callable[[Tensor], Tensor], box: Interval) -> Interval:
    """Return the interval (n, C) of the logits."""
    with _eager():
        logits: object = predict(box)
    if not isinstance(logits, Interval):
        raise ConfigError(
            "interval bounds got lost inside the model, which made a new tensor; allowed: a model "
            "whose outputs are computed from its inputs by layers with a rule"
        )
    return logits


def _eager() -> AbstractContextManager[object]:
    """Context manager in which compiled models run their Python code, which intervals need."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def _refuse_uncovered(logits: Interval, found: Tensor) -> None:
    """Refuse a model whose logits (n, C) for inputs of the box lie outside their bounds.

    No rule should let this happen; it is a net below the rules.
    """
    lower, upper = logits.ends()
    size = torch.maximum(lower.abs(), upper.abs()).nan_to_num(posinf=0.0)
    rounding = 4 * torch.finfo(found.dtype).eps ** 0.5 * (1 + size)
    if not bool(((found >= lower - rounding) & (found <= upper + rounding)).all()):
        raise ConfigError(
            "interval bounds do not cover this model: some of its logits are NaN or outside of "
            "their bounds; allowed: a model whose logits depend on its inputs only through layers "
            "with a rule; for other models use randomised smoothing"
        )


def certify_by_bounds(
    predict: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    bounds: Bounds = (0.0, 1.0),
) -> Certificate:
    """Return the accuracy that holds for every input in the linf balls around all records.

        100 / n * sum_i [max_{j != y_i} upper bound of (z_j - z_{y_i}) < 0]

    The bounds are loose for a model that was not trained for them (see
    `perdure.adversarial.defences.IntervalBounds`): then nearly nothing is certified.

    Guarantee: no input in the ball of a certified record is classified wrongly, up to the rounding
    of floating-point numbers. None for privacy: the result is an exact statistic of `inputs`, so
    they must be public.

    Args:
        predict: module, or another function, of layers that have a rule.
        inputs: (n, ...) inputs within the bounds.
        labels: (n,) int64 labels.
        epsilon: radius of the balls, in units of the inputs.
        bounds: smallest and largest value of an input, each for all features or as a list with one
            number per feature; None for inputs without bounds.

    Raises:
        ConfigError: if a layer has no rule, if logits at the record, the middle or two corners of
            its ball are outside of their bounds, or if an argument is not allowed.

    Source: Gowal et al. 2018, "On the effectiveness of interval bound propagation for training
    verifiably robust models", sections 3 and 4.
    """
    refuse_misfits(inputs, labels, epsilon, bounds)
    clean = 0
    certified = 0
    with fixed(predict), torch.no_grad():
        for start in range(0, len(inputs), MOST_ROWS):
            rows = inputs[start : start + MOST_ROWS]
            own = labels[start : start + MOST_ROWS]
            box = ball(rows, epsilon, bounds)
            logits = _bounded(predict, box)
            lower, upper = box.ends()
            for inside in ((lower + upper) / 2, lower, upper):
                _refuse_uncovered(logits, predict(inside))
            found = predict(rows)
            _refuse_uncovered(logits, found)
            _refuse_labels(own, found)
            clean += int((found.argmax(1) == own).sum())
            others = logits.above(own).scatter(1, own.unsqueeze(1), -math.inf).amax(1)
            certified += int((others < 0).sum())
    return Certificate(
        method="interval bounds",
        norm="linf",
        epsilon=epsilon,
        records=len(inputs),
        clean_accuracy=100.0 * clean / len(inputs),
        certified_accuracy=100.0 * certified / len(inputs),
    )


def refuse_misfits(inputs: Tensor, labels: Tensor, epsilon: float, bounds: Bounds) -> None:
    """Refuse records, a radius or bounds that cannot be certified."""
    # types are checked, because no dataclass does it for a function
    tensors: dict[str, object] = {"inputs": inputs, "labels": labels}
    radius: object = epsilon
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ConfigError.of(name, value, f"a tensor; torch.as_tensor({name}) makes one")
    if not inputs.is_floating_point():
        raise ConfigError.of("inputs.dtype", inputs.dtype, "a floating-point type")
    if not len(inputs) or labels.shape != inputs.shape[:1] or labels.dtype != torch.int64:
        given = f"{tuple(labels.shape)} in {labels.dtype}"
        raise ConfigError.of(
            "labels", given, f"({len(inputs)},) in torch.int64, and at least one record"
        )
    if not isinstance(radius, Real) or not 0 <= float(radius) < math.inf:
        raise ConfigError.of("epsilon", epsilon, "a finite number, 0 or more")
    refuse_bounds(bounds)
    if bounds is None:
        return
    low, high = (of_entries("bounds", bound, inputs) for bound in bounds)
    if not bool(((inputs >= low) & (inputs <= high)).all()):
        found = f"{float(inputs.min()):g} to {float(inputs.max()):g}"
        raise ConfigError.of("bounds", bounds, f"bounds that include all inputs ({found}), or None")


def _refuse_labels(labels: Tensor, logits: Tensor) -> None:
    """Refuse labels (n,) that are no classes of the logits (n, C).

    Raises:
        ConfigError: if a label is below 0 or above C - 1.
    """
    classes = logits.shape[1]
    if not bool(((labels >= 0) & (labels < classes)).all()):
        given = f"{int(labels.min())} to {int(labels.max())}"
        raise ConfigError.of("labels", given, f"0 to {classes - 1}, the classes of the model")
