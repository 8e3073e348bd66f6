"""Intervals of tensors, on which a model runs as on a tensor: interval bound propagation.

An `Interval` is a tensor of midpoints with a radius for each entry. A model that gets one computes,
layer by layer, an interval that contains its outputs for all inputs of the interval:

    linear and convolution     midpoint W m + b, radius |W| r
    monotone activations       the activation of both ends
    pooling, mean, reshape     the same of midpoint and radius, or of both ends
    sums, products by a number

Other operations are refused, because their result would not contain all outputs. So are operations
in place, which would change an interval that other layers may still use.

Source: Gowal et al. 2018, "On the effectiveness of interval bound propagation for training
verifiably robust models", section 3.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.errors import ConfigError

MONOTONE = frozenset(
    {
        "clamp",
        "elu",
        "hardtanh",
        "leaky_relu",
        "max_pool1d",
        "max_pool2d",
        "relu",
        "relu6",
        "selu",
        "sigmoid",
        "softplus",
        "tanh",
    }
)
"""Operations that never fall when an entry of the input rises."""

SLOPED = frozenset({"elu", "leaky_relu"})
"""Those of them that fall if one of their numbers is negative."""

AVERAGES = frozenset(
    {
        "adaptive_avg_pool2d",
        "avg_pool1d",
        "avg_pool2d",
        "flatten",
        "getitem",
        "mean",
        "permute",
        "reshape",
        "squeeze",
        "sum",
        "to",
        "transpose",
        "unsqueeze",
        "view",
    }
)
"""Linear operations without an offset, whose weights are not negative."""

AFFINE = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
FACTS = frozenset({"dim", "size", "is_floating_point", "len", "numel"})
GETTERS = frozenset({"device", "dtype", "ndim", "requires_grad", "shape"})
"""Questions about shape and type, as methods and as attributes."""

REASONS = {
    "group_norm": "it divides by a spread of the input itself",
    "instance_norm": "it divides by a spread of the input itself",
    "layer_norm": "it divides by a spread of the input itself",
    "elu": "it falls where alpha is negative",
    "gelu": "it falls and rises",
    "leaky_relu": "it falls where the slope is negative",
    "silu": "it falls and rises",
    "softplus": "it falls where beta is negative or the threshold below 20",
    "to": "a type with fewer digits rounds the ends",
    "view": "a view in another type has no order",
}
FIX = (
    "allowed: Linear, Conv, BatchNorm in evaluation mode, ReLU and other monotone activations, "
    "pooling, reshaping and sums; for other models use randomised smoothing"
)


class Interval(Tensor):
    """Tensor of midpoints (n, ...) with the radius of each entry; make it with `between`.

    Its attributes: `radius` (n, ...); `layer`, the interval that entered the last layer and the
    layer's weight, if the interval is the result of a linear layer.
    """

    radius: Tensor
    layer: "tuple[Interval, Tensor] | None"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute an operation on intervals, or refuse it."""
        with torch._C.DisableTorchFunctionSubclass():
            return _computed(func, args, dict(kwargs or {}))

    def ends(self) -> tuple[Tensor, Tensor]:
        """Return the lower and the upper ends (n, ...), as tensors."""
        with torch._C.DisableTorchFunctionSubclass():
            middle = self.as_subclass(Tensor)
            return middle - self.radius, middle + self.radius

    def above(self, labels: Tensor) -> Tensor:
        """Return (n, C) largest differences of each logit and the label's logit; 0 for the label.

        If the last operation was a linear layer, differences are taken of its weights, which gives
        tighter bounds than differences of the ends.

        Args:
            labels: (n,) int64 classes.
        """
        with torch._C.DisableTorchFunctionSubclass():
            middle = self.as_subclass(Tensor)
            own = labels.unsqueeze(1)
            change = middle - middle.gather(1, own)
            if self.layer is None:
                spread = self.radius + self.radius.gather(1, own)
            else:
                entering, weight = self.layer
                between = (weight - weight.unsqueeze(1)).abs()
                spread = torch.einsum("ncf,nf->nc", between[labels], entering.radius)
                # a logit without a radius may be a number of a mask, which has no weights
                apart = self.radius, self.radius.gather(1, own)
                number = (apart[0] == 0) | (apart[1] == 0)
                spread = torch.where(number, apart[0] + apart[1], spread)
            return (change + spread).scatter(1, own, 0.0)


def between(lower: Tensor, upper: Tensor) -> Interval:
    """Return the interval of all tensors between two tensors (n, ...)."""
    return _interval((upper + lower) / 2, (upper - lower) / 2)


def _interval(
    middle: Tensor, radius: Tensor, layer: tuple[Interval, Tensor] | None = None
) -> Interval:
    found = middle.as_subclass(Interval)
    found.radius = radius
    found.layer = layer
    return found


Operation = Callable[..., Any]
Rule = Callable[[Operation, Sequence[Any], dict[str, Any]], Interval | None]
"""Function from an operation and its arguments to the result; None where it does not hold."""


def _computed(func: Operation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return the result of one operation.

    Raises:
        ConfigError: if there is no rule for it.
    """
    raw = getattr(func, "__name__", "")
    name = raw.strip("_")
    asked = name in FACTS
    if raw == "__get__":
        name = func.__self__.__name__  # type: ignore[attr-defined]
        asked = name in GETTERS or name.startswith("is_")
    if asked:
        return func(*args, **kwargs)
    changes = raw.endswith("_") and not raw.endswith("__")
    if changes or kwargs.pop("inplace", False) or "out" in kwargs:
        raise ConfigError(
            f"interval bounds have no rule for {name} in place: other layers may use the tensor "
            "that it changes; use inplace=False, and h = h + x for h += x"
        )
    rule = None if _intervals(tuple(kwargs.values())) else RULES.get(name)
    found = rule(func, args, kwargs) if rule else None
    if found is None:
        reason = REASONS.get(name, "its result has no known bounds")
        raise ConfigError(f"interval bounds have no rule for {name}: {reason}; {FIX}")
    return found


def _affine(func: Operation, args: Sequence[Any], kwargs: dict[str, Any]) -> Interval | None:
    """Linear layer or convolution."""
    first, weight = args[:2]
    if not _is_first(args):
        return None
    bias = args[2] if len(args) > 2 else kwargs.pop("bias", None)
    middle = func(first.as_subclass(Tensor), weight, bias, *args[3:], **kwargs)
    radius = func(first.radius, weight.abs(), None, *args[3:], **kwargs)
    last = (first, weight) if func is F.linear and first.ndim == 2 else None
    return _interval(middle, radius, last)


def _average(func: Operation, args: Sequence[Any], kwargs: dict[str, Any]) -> Interval | None:
    """Linear operation with weights that are not negative."""
    first = args[0]
    retyped = any(isinstance(each, torch.dtype) for each in (*args, *kwargs.values()))
    if not _is_first(args) or (func.__name__ == "view" and retyped):
        return None
    middle = func(first.as_subclass(Tensor), *args[1:], **kwargs)
    if not middle.is_floating_point() or middle.dtype.itemsize < first.dtype.itemsize:
        return None
    # the divisor of a pooling may be negative
    return _interval(middle, func(first.radius, *args[1:], **kwargs).abs())


def _monotone(func: Operation, args: Sequence[Any], kwargs: dict[str, Any]) -> Interval | None:
    """Operation that never falls."""
    if not _is_first(args) or _falls(func, args, kwargs):
        return None
    lower, upper = (func(end, *args[1:], **kwargs) for end in args[0].ends())
    return between(lower, upper)


def _falls(func: Operation, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return True if an activation falls somewhere, because of its numbers."""
    if func.__name__ == "softplus":
        beta = kwargs.get("beta", args[1] if len(args) > 1 else 1.0)
        threshold = kwargs.get("threshold", args[2] if len(args) > 2 else 20.0)
        return not (beta > 0 and threshold >= 20)
    numbers = (*args[1:], *kwargs.values()) if func.__name__ in SLOPED else ()
    return not all(each >= 0 for each in numbers)


def _normalised(func: Operation, args: Sequence[Any], kwargs: dict[str, Any]) -> Interval | None:
    """Batch normalisation by fixed statistics."""
    if not _is_first(args) or kwargs.get("training", args[5:6] == (True,)):
        return None
    middle_of = args[0].as_subclass(Tensor)
    middle = func(middle_of, *args[1:], **kwargs)
    # the difference of two outputs has no offset, and its sign is the sign of the scale
    end = func(middle_of + args[0].radius, *args[1:], **kwargs)
    return _interval(middle, (end - middle).abs())


def _dropped(
    func: Operation,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Interval | None:
    """Dropout in evaluation mode."""
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    return None if training else args[0]


def _sum(func: Operation, args: Sequence[Any], kwargs: dict[str, Any]) -> Interval | None:
    """Sum or difference of intervals, tensors and numbers."""
    if kwargs or len(args) != 2:
        return None
    parts = [each.as_subclass(Tensor) if isinstance(each, Interval) else each for each in args]
    middle = func(*parts)
    radii = [each.radius for each in args if isinstance(each, Interval)]
    radius = radii[0] + radii[1] if len(radii) > 1 else radii[0]
    return _interval(middle, radius.expand_as(middle))


def _product(func: Operation, args: Sequence[Any], kwargs: dict[str, Any]) -> Interval | None:
    """Product of one interval and a tensor or number."""
    if kwargs or _intervals(args) > 1:
        return None
    first, second = args if isinstance(args[0], Interval) else (args[1], args[0])
    size = second.abs() if isinstance(second, Tensor) else abs(second)
    return _interval(func(first.as_subclass(Tensor), second), func(first.radius, size))


def _quotient(func: Operation, args: Sequence[Any], kwargs: dict[str, Any]) -> Interval | None:
    """Interval divided by a tensor or number."""
    return _product(func, args, kwargs) if isinstance(args[0], Interval) else None


def _masked(func: Operation, args: Sequence[Any], kwargs: dict[str, Any]) -> Interval | None:
    """Entries of an interval where a mask is True, and a number elsewhere."""
    if kwargs or len(args) != 3 or not isinstance(args[1], Interval) or isinstance(args[2], Tensor):
        return None
    mask, first, number = args
    if isinstance(mask, Interval):
        return None
    middle = func(mask, first.as_subclass(Tensor), number)
    layer = first.layer if middle.shape == first.shape else None
    return _interval(middle, func(mask, first.radius, 0.0), layer)


def _is_first(args: Sequence[Any]) -> bool:
    """Return True if the first argument is an interval, and no other."""
    return isinstance(args[0], Interval) and _intervals(args) == 1


def _intervals(args: Sequence[Any]) -> int:
    return sum(isinstance(each, Interval) for each in args)


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(AFFINE, _affine),
    **dict.fromkeys(AVERAGES, _average),
    **dict.fromkeys(MONOTONE, _monotone),
    "batch_norm": _normalised,
    "dropout": _dropped,
    "where": _masked,
    **dict.fromkeys(("add", "radd", "sub", "rsub"), _sum),
    **dict.fromkeys(("mul", "rmul"), _product),
    **dict.fromkeys(("div", "truediv"), _quotient),
}
"""Rule of each operation, by its name in torch."""
