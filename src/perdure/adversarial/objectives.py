"""Losses of logits that an attack raises when robustness is measured.

Cross entropy hides the gradient of a confident model: at logits 100 times as large, a network that
keeps 11.5 % under attack seems to keep 93 %. The other two do not: multiplying all logits by a
number changes neither the steps that they cause nor the result.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.errors import ConfigError

Objective = Literal["cross_entropy", "rescaled_cross_entropy", "margin"]
"""Name of a loss of logits, which an attack raises."""

OBJECTIVES: tuple[Objective, ...] = ("rescaled_cross_entropy", "margin")
"""Losses that an evaluation raises one after another; a record must survive each of them."""


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) largest logit of another class minus the logit of the label; above 0 for an error.

    Source: Carlini and Wagner 2017, "Towards evaluating the robustness of neural networks",
    section VI.A, objective f6.
    """
    own = labels.unsqueeze(1)
    others = logits.scatter(1, own, -torch.inf).amax(1)
    return others - logits.gather(1, own).squeeze(1)


def rescaled_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) cross entropy of the logits divided by the distance of the label to the next class.

    The distance counts as a constant. The loss is the same for logits of any scale, so that its
    gradient never vanishes because a model is confident.
    """
    gap = margin(logits, labels).detach().abs()
    gap = gap.clamp(torch.finfo(logits.dtype).tiny, torch.finfo(logits.dtype).max)
    return F.cross_entropy(logits / gap.unsqueeze(1), labels, reduction="none")


def towards(target: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the loss of a targeted attack: minus the cross entropy (n,) of the target's label.

    >>> attack.perturb(lambda rows: towards(target)(model(rows)), inputs)

    Args:
        target: (n,) int64 classes that the attack aims at.
    """
    return lambda logits: -F.cross_entropy(logits, target, reduction="none")


def losses_of(objective: Objective, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss (n,) of an objective for logits (n, classes) and labels (n,).

    Raises:
        ConfigError: if there is no such objective.
    """
    if objective == "margin":
        return margin(logits, labels)
    if objective == "rescaled_cross_entropy":
        return rescaled_cross_entropy(logits, labels)
    if objective == "cross_entropy":
        return F.cross_entropy(logits, labels, reduction="none")
    raise ConfigError.of("objective", objective, get_args(Objective))
