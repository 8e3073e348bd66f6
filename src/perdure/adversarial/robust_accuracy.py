"""Robust accuracy: accuracy if an attack changes every record within a ball."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.adversarial.base import Attack
from perdure.errors import ConfigError
from perdure.utils.chunking import row_slices
from perdure.utils.finite_outputs import finite_outputs


def robust_accuracy(
    predict: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    generator: torch.Generator | None,
    batch_size: int = 512,
) -> float:
    """Percentage of records that are classified correctly both without and with the attack.

        100 / n * sum_i [argmax predict(x_i) = y_i and argmax predict(attack(x_i)) = y_i]

    The result is an upper bound on the true robustness, because a stronger attack may find more
    errors. The attack increases the cross entropy of the logits; logits of masked classes may be
    very negative.

    Guarantee: none. The result is an exact statistic of `inputs`, so they must be public.

    Args:
        predict: differentiable function (k, ...) -> (k, classes) logits; freeze the parameters for
            speed.
        inputs: (n, ...) inputs, within the bounds of the attack.
        labels: (n,) int64 labels.
        attack: attack to use.
        generator: CPU generator for the random numbers of the attack; None for an attack without
            them.
        batch_size: largest number of rows in one forward pass.

    Raises:
        ConfigError: if there are no records, if labels do not fit, if inputs are outside the bounds
            of the attack, or if logits are NaN or infinite.

    >>> from perdure.adversarial import FGSM
    >>> pictures, labels = torch.tensor([[0.9, 0.1], [0.6, 0.5]]), torch.tensor([0, 0])
    >>> robust_accuracy(lambda rows: rows, pictures, labels, FGSM(epsilon=0.25), generator=None)
    50.0
    """
    _check(inputs, labels, attack, batch_size)
    pieces = [slice(start, start + batch_size) for start in range(0, len(inputs), batch_size)]
    right = sum(
        _survivors(predict, inputs[piece], labels[piece], attack, generator) for piece in pieces
    )
    return 100.0 * right / len(inputs)


def _survivors(
    predict: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    attack: Attack,
    generator: torch.Generator | None,
) -> int:
    """Count the records that are classified correctly both without and with the attack."""
    with torch.no_grad():
        right = finite_outputs(predict(inputs)).argmax(1) == labels
    inputs = inputs[right]
    labels = labels[right]
    if len(inputs) == 0:
        return 0
    moved = attack.perturb(
        lambda rows: F.cross_entropy(predict(rows), labels, reduction="none"),
        inputs,
        generator=generator,
    )
    with torch.no_grad():
        return int((finite_outputs(predict(moved)).argmax(1) == labels).sum())


def _check(inputs: Tensor, labels: Tensor, attack: Attack, batch_size: int) -> None:
    """Refuse arguments of `robust_accuracy` that do not match."""
    if len(inputs) == 0 or labels.shape != inputs.shape[:1]:
        raise ConfigError.of(
            "labels.shape",
            tuple(labels.shape),
            f"({len(inputs)},), one label per record, and at least one record",
        )
    if batch_size < 1:
        raise ConfigError.of("batch_size", batch_size, "1 or more")
    if attack.bounds is None:
        return
    low = min(inputs[piece].min().item() for piece in row_slices(inputs))
    high = max(inputs[piece].max().item() for piece in row_slices(inputs))
    # If inputs are outside the bounds, an attack is limited there, and robust accuracy too high.
    if low < attack.bounds[0] or high > attack.bounds[1]:
        raise ConfigError.of(
            "attack.bounds",
            attack.bounds,
            f"bounds that include all inputs ({low:.4g} to {high:.4g})",
        )
