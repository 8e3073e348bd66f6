"""Measures of explanations: faithfulness to the model, robustness, sparsity, and agreement.

Every function returns one number for each instance, (n,), or (n, k) if all outputs are explained.
Absent features come from a background, which must be public or synthetic: see `Explainer.explain`.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.explain._model import Predict, Rows
from perdure.explain._question import Question, question
from perdure.explain.backgrounds import Background
from perdure.explain.base import Attribution, seeded

# --------------------------------------------------------------------------- areas


def deletion_area(
    predict: Predict,
    inputs: Rows,
    found: Attribution,
    background: Background,
    *,
    steps: int = 20,
    chunk: int | None = None,
) -> Tensor:
    """Area under the output while features are removed, the largest contribution first.

        area = trapezoidal mean over s = 0, ..., steps of
               mean over background rows r of f(x, the first s / steps of the features from r)

    A smaller area is better: the output falls at once if the features that matter go first.

    Guarantee: none; see `Explainer.explain`.

    Args:
        predict: the model that was explained.
        inputs: (n, ...) the explained instances.
        found: their explanation.
        background: (b, ...) public or synthetic rows that give the values of removed features, or
            a `TokenBackground`, whose kept tokens are never removed.
        steps: number of steps; at most one feature goes at a time if it is the number of features.
        chunk: largest number of rows in one forward pass; None for a size that suits the caches.

    Returns:
        (n,) or (n, k) areas in units of the output.

    Raises:
        ConfigError: if an argument is not allowed.

    Source: Petsiuk, Das, Saenko 2018, "RISE", section 4.1; Samek et al. 2017.
    """
    return _area(predict, inputs, found, background, steps, chunk, "deletion")


def insertion_area(
    predict: Predict,
    inputs: Rows,
    found: Attribution,
    background: Background,
    *,
    steps: int = 20,
    chunk: int | None = None,
) -> Tensor:
    """Area under the output while features are added to the background; larger is better.

    Features enter in the order in which `deletion_area` removes them.

    Args:
        predict: see `deletion_area`.
        inputs: (n, ...) the explained instances.
        found: see `deletion_area`.
        background: (b, ...) rows that features enter.
        steps: see `deletion_area`.
        chunk: see `deletion_area`.

    Returns:
        (n,) or (n, k) areas in units of the output.

    Raises:
        ConfigError: if an argument is not allowed.

    Source: Petsiuk, Das, Saenko 2018, "RISE", section 4.1.
    """
    return _area(predict, inputs, found, background, steps, chunk, "insertion")


def _area(
    predict: Predict,
    inputs: Rows,
    found: Attribution,
    background: Background,
    steps: int,
    chunk: int | None,
    kind: Literal["deletion", "insertion"],
) -> Tensor:
    if steps < 1:
        raise ConfigError.of("steps", steps, "1 or more")
    areas = []
    for values, asked in _each_output(predict, inputs, found, background, chunk):
        features = values.shape[1]
        # Rank 0 is the largest contribution; ties are in the order of the features.
        ranks = values.argsort(dim=1, descending=True, stable=True).argsort(1)
        marks = torch.arange(steps + 1, device=ranks.device) / steps * features
        first = ranks[:, None] < marks.round()[:, None]
        heights = _outputs_with(asked, ~first if kind == "deletion" else first)
        areas.append(torch.trapezoid(heights, dim=1) / steps)
    return _joined(areas, found)


# --------------------------------------------------------------------------- correlation


def faithfulness_correlation(
    predict: Predict,
    inputs: Rows,
    found: Attribution,
    background: Background,
    *,
    subset: int | None = None,
    draws: int = 100,
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Correlation of the contributions of random features with the output that is lost with them.

        Pearson correlation, over random sets S of features, of
            sum_{j in S} phi_j  and  f(x) - mean over background rows r of f(r on S, x elsewhere)

    Guarantee: none; see `Explainer.explain`.

    Args:
        predict: see `deletion_area`.
        inputs: see `deletion_area`.
        found: see `deletion_area`.
        background: see `deletion_area`.
        subset: number of features in a set; None for a fifth of them, at least one.
        draws: number of sets; all instances and outputs use the same.
        generator: CPU generator that draws the sets; None for seed 0.
        chunk: see `deletion_area`.

    Returns:
        (n,) or (n, k) correlations from -1 to 1; 0 where one side is constant.

    Raises:
        ConfigError: if an argument is not allowed.

    Source: Bhatt, Weller, Moura 2020, "Evaluating and aggregating feature-based model
    explanations", definition 4.
    """
    if draws < 2:
        raise ConfigError.of("draws", draws, "2 or more")
    results = []
    masks: Tensor | None = None
    for values, asked in _each_output(predict, inputs, found, background, chunk):
        if masks is None:
            masks = _subsets(values.shape[1], subset, draws, seeded(generator)).to(values.device)
        removed = masks.expand(len(values), -1, -1)
        lost = asked.outputs - _outputs_with(asked, ~removed)
        results.append(_correlation(values @ masks.T.to(values), lost))
    return _joined(results, found)


def _subsets(features: int, size: int | None, draws: int, generator: torch.Generator) -> Tensor:
    """Return random sets (draws, features) bool of `size` features each."""
    size = max(1, features // 5) if size is None else size
    if not 1 <= size <= features:
        raise ConfigError.of("subset", size, f"1 to {features}, features of one set")
    order = torch.rand(draws, features, generator=generator).argsort(1)
    return torch.zeros(draws, features, dtype=torch.bool).scatter(1, order[:, :size], value=True)


# --------------------------------------------------------------------------- without the model


def max_sensitivity(
    explain: Callable[[Tensor], Attribution],
    inputs: Tensor,
    *,
    radius: float,
    draws: int = 10,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Largest relative change of the contributions within a small box around each instance.

        max over draws of |phi(x + u) - phi(x)| / |phi(x)|,  u uniform in [-radius, radius]

    Args:
        explain: function from inputs to their explanation. It explains fixed outputs, and draws
            equal samples at every call, such as
            `lambda rows: KernelSHAP().explain(model, rows, background, targets=labels)`.
        inputs: (n, ...) instances, floats.
        radius: half the side of the box, in units of the inputs.
        draws: number of points in the box; more can only raise the result.
        generator: CPU generator that draws the points; None for seed 0.

    Returns:
        (n,) or (n, k) float64; 0 for contributions that do not change.

    Raises:
        ConfigError: if an argument is not allowed.

    Source: Yeh et al. 2019, "On the (in)fidelity and sensitivity of explanations", definition 3.
    """
    if not 0 < radius < math.inf:
        raise ConfigError.of("radius", radius, "a positive number")
    if draws < 1:
        raise ConfigError.of("draws", draws, "1 or more")
    if not inputs.is_floating_point():
        raise ConfigError.of("inputs.dtype", str(inputs.dtype), "floats, which can move a little")
    source = seeded(generator)
    found = explain(inputs)
    around = _by_output(found)
    size = around.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    largest = torch.zeros_like(size)
    for _ in range(draws):
        shift = (2 * torch.rand(inputs.shape, generator=source, dtype=torch.float64) - 1) * radius
        moved = _by_output(explain(inputs + shift.to(inputs)))
        largest = largest.maximum((moved - around).norm(dim=1) / size)
    return _as_given(largest, found)


def sparsity(found: Attribution) -> Tensor:
    """Gini index of the absolute contributions: 0 if all are equal, near 1 if one has everything.

        1 - 2 sum_j |phi|_(j) / |phi|_1 * (d - j + 1/2) / d,  |phi|_(1) <= ... <= |phi|_(d)

    Args:
        found: explanation of d features.

    Returns:
        (n,) or (n, k) float64; 0 if all contributions are 0.

    Source: Chalasani et al. 2020, "Concise explanations of neural networks using adversarial
    training", section 5; Hurley and Rickard 2009.
    """
    sizes = _by_output(found).abs().sort(dim=1).values
    count = sizes.shape[1]
    weights = (count - torch.arange(count).to(sizes) - 0.5) / count
    total = sizes.sum(1)
    share = torch.einsum("ndk,d->nk", sizes, weights) / total.where(total > 0, 1.0)
    return _as_given(torch.where(total > 0, 1 - 2 * share, 0.0), found)


# --------------------------------------------------------------------------- agreement


def rank_correlation(one: Attribution, other: Attribution) -> Tensor:
    """Spearman's correlation of two explanations of the same instances, over features.

    1 means that both order the features alike, 0 that the orders have nothing in common. Equal
    contributions share their mean rank. If all contributions of one explanation are equal, the
    result is 1 if they are in the other, too, and else 0.

    Args:
        one: explanation of n instances.
        other: explanation of the same instances by another method, model or seed.

    Returns:
        (n,) or (n, k) float64 from -1 to 1.

    Raises:
        ConfigError: if the shapes differ.
    """
    first, second = _matching(one, other)
    found = _correlation(_ranks(first), _ranks(second))
    both = (first == first[:, :1]).all(1) & (second == second[:, :1]).all(1)
    return _as_given(torch.where(both, 1.0, found), one)


def top_overlap(one: Attribution, other: Attribution, *, count: int | None = None) -> Tensor:
    """Share of the most important features that two explanations of the same instances share.

        |top(one) intersected with top(other)| / count,  top: largest absolute contributions

    Args:
        one: explanation of n instances.
        other: explanation of the same instances by another method, model or seed.
        count: number of most important features; None for a tenth of them, at least one.

    Returns:
        (n,) or (n, k) float64 from 0 to 1; two random orders have count / features on average.

    Raises:
        ConfigError: if the shapes differ, or there are fewer features than `count`.
    """
    first, second = _matching(one, other)
    features = first.shape[1]
    count = max(1, features // 10) if count is None else count
    if not 1 <= count <= features:
        raise ConfigError.of("count", count, f"1 to {features}, the number of features")
    tops = [
        each.abs().argsort(dim=1, descending=True, stable=True).argsort(1) < count
        for each in (first, second)
    ]
    return _as_given((tops[0] & tops[1]).sum(1).double() / count, one)


def _matching(one: Attribution, other: Attribution) -> tuple[Tensor, Tensor]:
    """Return the contributions (n, features, k) of both, which must have one shape."""
    if one.values.shape != other.values.shape or one.base.shape != other.base.shape:
        raise ConfigError.of(
            "other.values.shape",
            tuple(other.values.shape),
            f"{tuple(one.values.shape)}, the shape of the first explanation",
        )
    first = _by_output(one)
    return first, _by_output(other).to(first.device)


def _ranks(values: Tensor) -> Tensor:
    """Return the ranks (n, features, k) float64 over features; equal values share their mean."""
    lines = values.movedim(1, -1).contiguous()
    order = lines.sort(-1).values
    below = torch.searchsorted(order, lines)
    upto = torch.searchsorted(order, lines, right=True)
    return (below + upto).double().div(2).movedim(-1, 1)


# --------------------------------------------------------------------------- shapes


def _by_output(found: Attribution) -> Tensor:
    """Return the contributions as (n, features, k) float64; k is 1 for a single output."""
    flat = found.values.detach().flatten(1, found.values.ndim - found.base.ndim).double()
    return flat if found.base.ndim == 2 else flat[..., None]


def _as_given(numbers: Tensor, found: Attribution) -> Tensor:
    """Return numbers (n, k) without k if the explanation is of a single output."""
    return numbers if found.base.ndim == 2 else numbers[:, 0]


def _joined(numbers: list[Tensor], found: Attribution) -> Tensor:
    return _as_given(torch.stack(numbers, dim=1), found)


def _each_output(
    predict: Predict, inputs: Rows, found: Attribution, background: Background, chunk: int | None
) -> Iterator[tuple[Tensor, Question]]:
    """Yield contributions (n, features) and the question for each explained output."""
    if tuple(found.values.shape[: inputs.ndim]) != tuple(inputs.shape):
        raise ConfigError.of(
            "found.values.shape",
            tuple(found.values.shape),
            f"{tuple(inputs.shape)}, the shape of the inputs, with one more dimension for all "
            "outputs",
        )
    every = _by_output(found)
    targets = found.targets if found.base.ndim == 2 else found.targets[:, None]
    for output in range(every.shape[2]):
        asked = question(predict, inputs, background, targets[:, output], chunk)
        yield every[:, :, output].to(asked.outputs.device), asked


@torch.no_grad()
def _outputs_with(asked: Question, kept: Tensor) -> Tensor:
    """Return the mean output (n, m) over the background, with some features from there.

    Args:
        asked: model, instances, background, and one output of each instance.
        kept: (n, m, features) bool, True where a feature keeps its value.
    """
    n, count, _ = kept.shape
    shape = asked.inputs.shape[1:]
    absent = asked.absent
    masks = kept.reshape(n * count, *shape).to(asked.inputs.device)
    pairs = torch.arange(n * count, device=asked.inputs.device)
    total = torch.zeros(n * count, dtype=torch.float64, device=asked.inputs.device)
    for row in absent:
        parts = []
        for pair in torch.split(pairs, asked.chunk):
            owner = pair // count
            present = masks[pair] if asked.kept is None else masks[pair] | asked.kept[owner]
            changed = torch.where(present, asked.inputs[owner], row)
            parts.append(asked.scores(changed, owner)[:, 0])
        total += torch.cat(parts)
    return (total / len(absent)).view(n, count)


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson correlation over dimension 1, float64; 0 where one side is constant."""
    sides = [one.double(), other.double()]
    centred = [side - side.mean(1, keepdim=True) for side in sides]
    # Below the rounding of a float32 model there is nothing to correlate.
    rounding = torch.finfo(torch.float32).eps
    varies = [c.norm(dim=1) > rounding * s.norm(dim=1) for c, s in zip(centred, sides, strict=True)]
    both = varies[0] & varies[1]
    scale = torch.where(both, centred[0].norm(dim=1) * centred[1].norm(dim=1), 1.0)
    found = torch.where(both, (centred[0] * centred[1]).sum(1) / scale, 0.0)
    return found.clamp(-1, 1)
