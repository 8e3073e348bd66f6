"""Trial trainings: a few steps of a copy of the model on synthetic or public records.

Guarantee: a trial reads the inputs and targets that it is given, and changes no model but its copy.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle, islice

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perdure.doctor.case import Case
from perdure.utils.denormals import flushed
from perdure.utils.modules import evaluating, trainable_parameters
from perdure.utils.seeding import drawing_from, generator

Rows = tuple[Tensor, Tensor]
"""Inputs (n, ...) and targets of the same records."""
Make = Callable[[Iterable[nn.Parameter]], Optimizer | None]
"""Function from parameters to an optimiser."""


@flushed()
def trial(
    case: Case,
    batches: Sequence[Rows],
    make: Make,
    *,
    steps: int,
    factor: float = 1.0,
    enough: float = 0.0,
    private: bool = False,
    measured: Rows | None = None,
) -> list[float]:
    """Train a copy of the model, and return the loss before each step.

    Args:
        case: case with model, loss and seed.
        batches: batches that are used in turn.
        make: function that makes the optimiser.
        steps: largest number of steps.
        factor: factor for the learning rate of the optimiser.
        enough: share of the first loss at which the trial stops, for the mean loss of the last pass
            over the batches; 0 to take all steps.
        private: True to clip the gradient of each batch and to add noise, as large as that of a
            private step.
        measured: records on which the loss is measured at the start and at the end instead; None
            to measure the loss of each batch.

    Returns:
        Losses, at most `steps`, or two if `measured` is given. They end with infinity if a loss is
        not finite. Empty if nothing can be trained.
    """
    model = case.fresh_model()
    params = list(trainable_parameters(model).values())
    optimizer = make(params) if params else None
    if optimizer is None:
        return []
    for group in optimizer.param_groups:
        group["lr"] *= factor
    losses: list[float] = []
    start = [] if measured is None else [_loss(case, model, measured)]
    with torch.enable_grad(), drawing_from(case.seed):
        for inputs, targets in islice(cycle(batches), steps):
            loss = case.mean_loss(model(inputs), targets)
            losses.append(float(loss.detach()) if bool(loss.isfinite()) else math.inf)
            if not math.isfinite(losses[-1]):
                break
            if enough and recent(losses, len(batches)) <= enough * losses[0]:
                break
            optimizer.zero_grad()
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            if private:
                _make_private(params, case)
            optimizer.step()
    if measured is not None and losses:
        return [*start, _loss(case, model, measured) if math.isfinite(losses[-1]) else math.inf]
    return losses


def _loss(case: Case, model: nn.Module, rows: Rows) -> float:
    """Mean loss of a model in evaluation mode; infinity if it is not finite."""
    with torch.no_grad(), evaluating(model):
        found = float(case.mean_loss(model(rows[0]), rows[1]))
    return found if math.isfinite(found) else math.inf


def recent(losses: Sequence[float], window: int) -> float:
    """Mean of the last `window` losses; infinity if there are fewer."""
    if len(losses) < window or not math.isfinite(losses[-1]):
        return math.inf
    return math.fsum(losses[-window:]) / window


def _make_private(params: Sequence[nn.Parameter], case: Case) -> None:
    """Clip the mean gradient to the clip norm, and add the noise of a private step to it.

    The sum of clipped gradients of B records is at most B times the clip norm; its mean has noise
    of sigma C / B in each coordinate.
    """
    assert case.privacy is not None
    clip = case.privacy.clip_norm
    nn.utils.clip_grad_norm_(params, clip)
    scale = (case.noise_multiplier or 0.0) * clip / max(1.0, case.records_per_step)
    for value in params:
        if value.grad is None:
            value.grad = torch.zeros_like(value)
        value.grad += scale * torch.randn_like(value)


def batches_of(inputs: Tensor, targets: Tensor, *, rows: int, seed: int) -> list[Rows]:
    """Split records into batches of `rows` in random order; a smaller rest is left out."""
    order = torch.randperm(len(inputs), generator=generator(seed, "doctor", "batches"))
    size = min(rows, len(inputs))
    parts = order.split(size)  # type: ignore[no-untyped-call]
    return [(inputs[part], targets[part]) for part in parts if len(part) == size]
