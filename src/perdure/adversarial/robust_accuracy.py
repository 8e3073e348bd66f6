"""Robust accuracy: accuracy if an attack changes every record within a ball, with its card."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.adversarial.balls import Norm
from perdure.adversarial.base import Attack, Logits, raw_gradient
from perdure.adversarial.bounds import PerFeature
from perdure.adversarial.objectives import OBJECTIVES, Objective
from perdure.errors import ConfigError, NonFiniteError
from perdure.utils.chunking import PASS_BYTES, row_slices
from perdure.utils.finite_outputs import finite_outputs
from perdure.utils.modules import evaluating_with_gradients, trainable_parameters

FEWEST_ROWS = 32
"""Fewest rows of one pass, unless the caller gives another number."""

MOST_ROWS = 512
"""Most rows of one pass, unless the caller gives another number."""


@dataclass(frozen=True, kw_only=True)
class ThreatModelCard:
    """Robust accuracy with everything that is needed to read it.

    Args:
        attack: name of the attack's class.
        settings: further settings of the attack, such as its steps and restarts.
        norm: norm of the ball.
        epsilon: radius of the ball, in units of the inputs.
        objectives: losses that the attack raised; a record had to survive each of them.
        records: number of records.
        clean_accuracy: percentage of records that are classified correctly without an attack.
        robust_accuracy: percentage of records that are classified correctly without and with it;
            an upper bound on the true robustness.
        zero_gradients: percentage of records whose gradient of the cross entropy is 0, NaN or
            infinite. A number above 0 means that gradients are hidden from attacks.
        largest_change: largest change that the attack made, in the norm.
    """

    attack: str
    settings: dict[str, Any]
    norm: Norm
    epsilon: PerFeature
    objectives: tuple[Objective, ...]
    records: int
    clean_accuracy: float
    robust_accuracy: float
    zero_gradients: float
    largest_change: float

    def __str__(self) -> str:
        """Return the card as one line."""
        return (
            f"{self.robust_accuracy:.1f} % robust, {self.clean_accuracy:.1f} % clean; "
            f"{self.threat()}, {self.records} records, "
            f"{self.zero_gradients:.1f} % without a gradient"
        )

    def threat(self) -> str:
        """Return the attack in words: name, norm, radius, settings and losses."""
        radius = "by feature" if isinstance(self.epsilon, tuple) else f"{self.epsilon:g}"
        settings = "".join(f", {name} {value}" for name, value in self.settings.items())
        losses = " and ".join(self.objectives) or "its own losses"
        return f"{self.attack}, {self.norm} {radius}{settings}, worst of {losses}"

    def row(self) -> dict[str, Any]:
        """Return the card as a dict for JSON."""
        return asdict(self)


def measure_robustness(
    predict: Logits,
    inputs: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    generator: torch.Generator | None,
    objectives: Sequence[Objective] = OBJECTIVES,
    batch_size: int | None = None,
) -> ThreatModelCard:
    """Attack every record, and return the accuracy that is left with its threat model.

        100 / n * sum_i [argmax predict(x_i) = y_i and argmax predict(attack(x_i)) = y_i]

    The result is an upper bound on the true robustness, because a stronger attack may find more
    errors. Logits of masked classes may be very negative.

    A module is evaluated in evaluation mode; afterwards its modes and parameters are as before.

    Guarantee: none. The result is an exact statistic of `inputs`, so they must be public.

    Args:
        predict: module, or another differentiable function (k, ...) -> (k, classes) logits; freeze
            the parameters of a function for speed.
        inputs: (n, ...) inputs, within the bounds of the attack.
        labels: (n,) int64 labels.
        attack: attack to use.
        generator: CPU generator for the random numbers of the attack; None for an attack without
            them.
        objectives: losses that the attack raises one after another; a record must survive all.
        batch_size: largest number of rows in one pass; None to choose it by the size of a row.

    Raises:
        ConfigError: if there are no records, if labels do not fit, if inputs are outside the bounds
            of the attack, or if an objective does not exist.
        NonFiniteError: if logits, or inputs after the attack, are NaN or infinite.
    """
    _check(inputs, labels, attack, objectives, batch_size)
    size = batch_size or _rows_of(inputs)
    totals = torch.zeros(3, dtype=torch.int64)
    largest = 0.0
    with fixed(predict):
        for start in range(0, len(inputs), size):
            piece = slice(start, start + size)
            counts, change = _attacked(
                predict, inputs[piece], labels[piece], attack, objectives, generator
            )
            totals += counts
            largest = max(largest, change)
    clean, robust, blind = (100.0 * int(count) / len(inputs) for count in totals)
    return ThreatModelCard(
        attack=type(attack).__name__,
        settings=_settings(attack),
        norm=attack.norm,
        epsilon=attack.epsilon,
        objectives=() if attack.OWN_LOSSES else tuple(objectives),
        records=len(inputs),
        clean_accuracy=clean,
        robust_accuracy=robust,
        zero_gradients=blind,
        largest_change=largest,
    )


def robust_accuracy(
    predict: Logits,
    inputs: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    generator: torch.Generator | None,
    objectives: Sequence[Objective] = OBJECTIVES,
    batch_size: int | None = None,
) -> float:
    """Percentage of records that are classified correctly both without and with the attack.

    It is the number `robust_accuracy` of the card of `measure_robustness`, which has the same
    arguments, guarantee and errors.

    Args:
        predict: module, or another differentiable function (k, ...) -> (k, classes) logits.
        inputs: (n, ...) inputs, within the bounds of the attack.
        labels: (n,) int64 labels.
        attack: attack to use.
        generator: CPU generator for the random numbers of the attack.
        objectives: losses that the attack raises one after another.
        batch_size: largest number of rows in one pass; None to choose it.

    >>> from perdure.adversarial import FGSM
    >>> pictures, labels = torch.tensor([[0.9, 0.1], [0.6, 0.5]]), torch.tensor([0, 0])
    >>> robust_accuracy(lambda rows: rows, pictures, labels, FGSM(epsilon=0.25), generator=None)
    50.0
    """
    card = measure_robustness(
        predict,
        inputs,
        labels,
        attack,
        generator=generator,
        objectives=objectives,
        batch_size=batch_size,
    )
    return card.robust_accuracy


@contextmanager
def fixed(predict: Callable[..., Any]) -> Iterator[None]:
    """Context manager that puts a module into evaluation mode and freezes its parameters.

    Afterwards modes and parameters are as before. Other functions are left as they are.
    """
    if not isinstance(predict, nn.Module):
        yield
        return
    trained = trainable_parameters(predict).values()
    with evaluating_with_gradients(predict):
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)


def _attacked(
    predict: Logits,
    inputs: Tensor,
    labels: Tensor,
    attack: Attack,
    objectives: Sequence[Objective],
    generator: torch.Generator | None,
) -> tuple[Tensor, float]:
    """Count the records (3,) that are right, right under attack, and without a gradient.

    The second result is the largest change.
    """
    with torch.no_grad():
        right = finite_outputs(predict(inputs)).argmax(1) == labels
    blind = _blind(predict, inputs, labels)
    inputs = inputs[right]
    labels = labels[right]
    if not len(inputs):
        return torch.tensor([0, 0, blind]), 0.0
    moved = attack.against(
        predict, inputs, labels, objectives=objectives, generator=generator
    ).detach()
    if not bool(moved.isfinite().all()):
        raise NonFiniteError(
            f"{type(attack).__name__} made NaN or infinite inputs; allowed: finite inputs; "
            "look for divisions by 0 in the attack"
        )
    with torch.no_grad():
        left = finite_outputs(predict(moved)).argmax(1) == labels
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[attack.norm]
    change = torch.linalg.vector_norm((moved - inputs).flatten(1), ord=order, dim=1)
    return torch.tensor([len(inputs), int(left.sum()), blind]), float(change.max())


def _blind(predict: Logits, inputs: Tensor, labels: Tensor) -> int:
    """Count the records whose cross entropy has no gradient, or one that is not finite."""
    gradient = raw_gradient(
        lambda rows: F.cross_entropy(predict(rows), labels, reduction="none"), inputs
    ).flatten(1)
    return int(((gradient == 0).all(1) | ~gradient.isfinite().all(1)).sum())


def _rows_of(inputs: Tensor) -> int:
    """Return the number of rows of a pass; it does not depend on the device, as draws do not."""
    bytes_of_row = max(1, inputs[:1].nbytes)
    return min(MOST_ROWS, max(FEWEST_ROWS, PASS_BYTES // bytes_of_row))


def _settings(attack: Attack) -> dict[str, Any]:
    """Return the fields of an attack that not every attack has."""
    common = {each.name for each in fields(Attack)}
    own = {each.name: getattr(attack, each.name) for each in fields(attack)}
    return {name: value for name, value in own.items() if name not in common}


def _check(
    inputs: Tensor,
    labels: Tensor,
    attack: Attack,
    objectives: Sequence[Objective],
    batch_size: int | None,
) -> None:
    """Refuse arguments of `measure_robustness` that do not match."""
    if len(inputs) == 0 or labels.shape != inputs.shape[:1]:
        raise ConfigError.of(
            "labels.shape",
            tuple(labels.shape),
            f"({len(inputs)},), one label per record, and at least one record",
        )
    if labels.dtype != torch.int64:
        raise ConfigError.of("labels.dtype", labels.dtype, "torch.int64; use labels.long()")
    if batch_size is not None and batch_size < 1:
        raise ConfigError.of("batch_size", batch_size, "1 or more, or None")
    unknown = [name for name in objectives if name not in get_args(Objective)]
    if unknown or not objectives or isinstance(objectives, str):
        raise ConfigError.of("objectives", objectives, f"a list of {get_args(Objective)}")
    refuse_outside(inputs, attack, "attack.bounds")


def refuse_outside(inputs: Tensor, attack: Attack, name: str) -> None:
    """Refuse inputs outside the bounds of an attack: it would be limited there, and too weak.

    Args:
        inputs: (n, ...) inputs.
        attack: attack with its bounds.
        name: name of the bounds, for the message.

    Raises:
        ConfigError: if an input is outside.
    """
    outside = sum(attack.outside(inputs[piece]) for piece in row_slices(inputs))
    if not outside:
        return
    low = min(inputs[piece].min().item() for piece in row_slices(inputs))
    high = max(inputs[piece].max().item() for piece in row_slices(inputs))
    share = 100 * outside / inputs.numel()
    raise ConfigError.of(
        name,
        attack.bounds,
        f"bounds that include all inputs ({low:.4g} to {high:.4g}; {share:.1f} % of their entries "
        "are outside), or None",
    )
