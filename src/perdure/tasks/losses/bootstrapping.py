"""Bootstrapping: targets that are a mixture of the label and the model's own prediction.

    soft: loss_i = - sum over c of (beta t_i[c] + (1 - beta) p_i[c]) log p_i[c]
    hard: loss_i = - beta log p_i[y_i] - (1 - beta) log p_i[z_i],    z_i the most probable class

t_i is 1 for the label and 0 for other classes.

Source: Reed, Lee, Anguelov, Szegedy, Erhan, Rabinovich 2015, "Training deep neural networks on
noisy labels with bootstrapping", equations 6 and 7.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.tasks.losses.base import Loss


@dataclass(frozen=True, kw_only=True)
class Bootstrapping(Loss):
    """Cross entropy with a mixture of label and prediction, for noisy labels.

    Args:
        mode: `soft` for the predicted probabilities, `hard` for the most probable class.
        beta: share of the label, from 0 to 1; the paper uses 0.95 for soft and 0.8 for hard.
    """

    name: ClassVar[str] = "bootstrapping"
    resists_wrong_labels: ClassVar[bool] = True

    mode: Literal["soft", "hard"] = "soft"
    beta: float = 0.95

    def __post_init__(self) -> None:
        if self.mode not in ("soft", "hard"):
            raise ConfigError.of("mode", self.mode, ("soft", "hard"))
        if not 0 <= self.beta <= 1:
            raise ConfigError.of("beta", self.beta, "a number from 0 to 1")

    def losses(self, logits: Tensor, labels: Tensor, allowed: Tensor | None) -> Tensor:
        """Return (m,) cross entropy with the mixed targets."""
        log_p = torch.log_softmax(logits, dim=1)
        own = log_p.gather(1, labels[:, None]).squeeze(1)
        if self.mode == "soft":
            predicted = (log_p.exp() * log_p).sum(1)
        else:
            predicted = log_p.gather(1, logits.argmax(1)[:, None]).squeeze(1)
        return -self.beta * own - (1 - self.beta) * predicted
