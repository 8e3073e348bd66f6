"""Training that diverges: the norm of a whole gradient is bounded, and NaN or infinity is refused.

Without privacy the loss of a step shows on the processor at once that parameters or activations are
NaN or infinite; gradients, and everything on other devices, are looked at in every `EVERY`th step,
counted over experiences, because a stream may have thousands of them with one step each.
Under privacy only released gradients and parameters are looked at, in every step.
"""

import math
from collections.abc import Sequence
from operator import itemgetter

import torch
from torch import Tensor

from perdure.data.value_checks import check_finite
from perdure.errors import RunawayError
from perdure.planning.training_plan import TrainingPlan
from perdure.types import Params
from perdure.utils.finite_numbers import all_finite

EVERY = 16
"""Number of steps between two checks that read all numbers, or wait for a device."""

FEW = 256
"""Largest number of losses that are looked at one by one, which is faster than a mean."""

TINY = 1e-6
"""Number that `torch.nn.utils.clip_grad_norm_` adds to the norm."""


def bounded(gradient: Params, max_norm: float) -> Params:
    """Scale a gradient so that the norm of all its parts together is at most `max_norm`.

    It computes what `torch.nn.utils.clip_grad_norm_` does, in new tensors.

    Guarantee: none is needed, because the gradient of a private step is released already.

    Args:
        gradient: gradient by parameter name.
        max_norm: largest L2 norm, above 0.
    """
    norm = torch.nn.utils.get_total_norm(list(gradient.values()))
    factor = (max_norm / (norm + TINY)).clamp(max=1.0)
    # a gradient that has NaN stays as it is, so that the check names the right parameter
    factor = torch.where(norm.isnan(), 1.0, factor)
    return dict(zip(gradient, torch._foreach_mul(list(gradient.values()), factor), strict=True))


def refuse_runaway_step(
    params: Params,
    losses: Tensor | None,
    training: TrainingPlan,
    experience: int,
    step: int,
    number: int,
) -> None:
    """Refuse to continue with a step that has NaN or infinity; called before the optimiser's step.

    Args:
        params: trained parameters, with the gradients of the step in `.grad`.
        losses: losses (n,) of the rows of the step, or their mean (); None under privacy.
        training: plan of the run.
        experience: index of the experience.
        step: number of the step in the experience.
        number: number of the step since the session was opened, from 0.

    Raises:
        DataError: if an input that is NaN or infinite is the cause.
        RunawayError: names the parameter, gradient or loss.
    """
    # to read the losses on another device would wait for the step
    waits = losses is not None and losses.device.type != "cpu"
    if losses is not None and number % EVERY and (waits or _shown_finite(losses)):
        return
    loss = None if losses is None else losses.mean()
    gradients = {name: value.grad for name, value in params.items() if value.grad is not None}
    watched = [*gradients.values(), *(params.values() if loss is None else ())]
    sums = torch.stack([*map(torch.sum, watched), *([] if loss is None else [loss])])
    if bool(sums.isfinite().all()):
        return
    where = f"in step {step} of experience {experience}"
    _refuse(_lost(params), "parameter", where, training)
    if loss is not None and not bool(loss.isfinite()):
        largest, value = max(
            ((name, float(value.detach().abs().max())) for name, value in params.items()),
            key=itemgetter(1),
        )
        beside = f"{where} (largest parameter: {largest}, {value:.1e})"
        _refuse(["loss"], "the", beside, training)
    _refuse(_lost(gradients), "the gradient of", where, training)


def refuse_runaway(params: Params, training: TrainingPlan, experience: int) -> None:
    """Refuse to continue after an experience that ended with NaN or infinity.

    Args:
        params: parameters after training.
        training: plan of the run.
        experience: index of the experience that was trained.

    Raises:
        DataError: if an input that is NaN or infinite is the cause.
        RunawayError: in all other cases.
    """
    _refuse(_lost(params), "parameter", f"at the end of experience {experience}", training)


def _refuse(lost: Sequence[str], quantity: str, where: str, training: TrainingPlan) -> None:
    """Raise the error for names of tensors that are NaN or infinite; do nothing for no name.

    Without privacy, the records are searched for the cause; a message under privacy must not depend
    on a record.
    """
    if not lost:
        return
    if not training.privacy:
        check_finite([training.stream])
    more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
    raise RunawayError(
        f"{training.strategy.name}: {quantity} {lost[0]}{more} is NaN or infinite "
        f"{where}; lower the learning rate or the strength of the strategy, or give max_grad_norm"
    )


def _shown_finite(losses: Tensor) -> bool:
    few = losses if losses.numel() <= FEW else losses.mean()
    return all(map(math.isfinite, few.flatten().tolist()))


def _lost(tensors: Params) -> list[str]:
    return [name for name, value in tensors.items() if not all_finite(value.detach())]
