"""Averages of the parameters over the steps of an experience, by `torch.optim.swa_utils`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

from perdure.errors import ConfigError
from perdure.types import Params
from perdure.utils.checked_fields import CheckedFields
from perdure.utils.modules import begin_training

Update = Callable[[list[Tensor], list[Tensor], int], None]
"""Function of `torch.optim.swa_utils` from averages, current values and their number so far."""
ROWS = 2048
"""Most rows of one pass that computes running statistics."""


@dataclass(frozen=True, kw_only=True)
class EMA(CheckedFields):
    """Exponential moving average of the parameters.

        average <- decay * average + (1 - decay) * parameters,  after every step

    Guarantee: post-processing of released parameters, so it costs no privacy.

    Args:
        decay: share of the old average that is kept in each step, from 0 to below 1.

    Source: Polyak and Juditsky 1992; `torch.optim.swa_utils.get_ema_multi_avg_fn`.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError.of("decay", self.decay, "a number from 0 to below 1")

    def begins(self, step: int, steps: int) -> bool:
        """Return True if the parameters after step `step` of `steps` are averaged."""
        return True

    def update(self) -> Update:
        """Return torch's function that adds parameters to an average."""
        found: Update = get_ema_multi_avg_fn(self.decay)  # type: ignore[no-untyped-call]
        return found


@dataclass(frozen=True, kw_only=True)
class SWA(CheckedFields):
    """Stochastic weight averaging: the mean of the parameters over the last steps.

    Guarantee: post-processing of released parameters, so it costs no privacy.

    Args:
        start: share of the steps of an experience before the average begins, from 0 to below 1.

    Source: Izmailov et al., UAI 2018; `torch.optim.swa_utils.get_swa_multi_avg_fn`.
    """

    start: float = 0.75

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1:
            raise ConfigError.of("start", self.start, "a share from 0 to below 1")

    def begins(self, step: int, steps: int) -> bool:
        """Return True if the parameters after step `step` of `steps` are averaged."""
        return step >= self.start * steps

    def update(self) -> Update:
        """Return torch's function that adds parameters to an average."""
        found: Update = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
        return found


class Average:
    """Average of the trained parameters since the experience began, beside the parameters.

    Args:
        averaging: rule of the average; None for no average.
    """

    def __init__(self, averaging: EMA | SWA | None) -> None:
        self._averaging = averaging
        self._update = averaging.update() if averaging else None
        self.values: Params = {}
        """Averages by name; empty before the first step that is averaged."""
        self.count = 0
        """Number of steps whose parameters are in the average."""

    def follow(self, params: Mapping[str, Tensor], step: int, steps: int) -> None:
        """Add the parameters after a step.

        Args:
            params: trained parameters.
            step: number of the step in its experience.
            steps: number of steps of the experience.
        """
        if self._averaging is None or self._update is None:
            return
        if not self._averaging.begins(step, steps):
            return
        now = {name: value.detach() for name, value in params.items()}
        if self.count:
            # by name, because a checkpoint does not keep the order
            self._update([self.values[name] for name in now], list(now.values()), self.count)
        else:
            self.values = {name: value.clone() for name, value in now.items()}
        self.count += 1

    def restore(self, values: Mapping[str, Tensor], count: int) -> None:
        """Restore an average from a checkpoint."""
        self.values = dict(values)
        self.count = count

    def clear(self) -> None:
        """Forget the average."""
        self.values = {}
        self.count = 0


@torch.no_grad()
def put_values(params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values to the parameters of the same names."""
    for name, value in values.items():
        params[name].copy_(value)


def measure_statistics(model: nn.Module, inputs: Tensor, device: str | torch.device) -> None:
    """Compute the running statistics of BatchNorm again, for changed parameters.

    Statistics that training does not move, as in a frozen body, stay as they are. The modules end
    in evaluation mode.

    Args:
        model: model with the changed parameters.
        inputs: (n, ...) inputs of all records.
        device: device of the model.
    """
    norms = [part for part in model.modules() if isinstance(part, _BatchNorm)]
    begin_training(model)
    if norms and all(part.training and part.track_running_stats for part in norms):
        # pieces of equal size, because the mean over pieces is not weighted
        count = math.ceil(len(inputs) / ROWS)
        ends = [len(inputs) * number // count for number in range(count + 1)]
        update_bn((inputs[start:end].to(device) for start, end in pairwise(ends)), model)
