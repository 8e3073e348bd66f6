"""Rule: learning rate and clip norm together make private steps too large or too small."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class PrivateStepSize(Rule):
    """Find learning rates of SGD that do not fit the clip norm.

    A private step moves the parameters by at most eta C (1 - m)^-1 in the direction of the records,
    and by eta C sigma sqrt(d) / B at random, where eta is the learning rate, C the clip norm, m the
    momentum, sigma the noise multiplier, d the number of trained numbers and B the expected number
    of records in a step. Halving C asks for twice the learning rate.

    Symptom: the random part of a step is more than `largest` times the norm of the parameters; or
    all steps of an experience together can move the parameters by less than `smallest` times it.

    Remedy: the learning rate at which the random part is a fifth of the norm, or the one with which
    all steps together can move ten times as far as the norm.

    Source: SageMaker Debugger, WeightUpdateRatio (above 10, below 1e-8), in terms of eta C. Own
    measurement of the limits on digits, nine rates: a random part of 0.1 to 1.1 gives 83 to 89
    percent, of 4.4 65 percent and of 22 chance; a movement of 0.2 gives 13 percent, of 2 71.

    Args:
        largest: random part of a step, relative to the parameters, above which it is too large.
        smallest: movement of all steps, relative to the parameters, below which it is too small.
    """

    name: ClassVar[str] = "private step size"
    cause: ClassVar[Cause] = "learning rate"
    source: ClassVar[str] = "SageMaker Debugger, WeightUpdateRatio; own measurement"

    largest: float = 3.0
    smallest: float = 0.3

    def examine(self, case: Case) -> Finding | None:
        """Compute both parts of a step from declared numbers and the initial parameters."""
        rate = case.learning_rate
        optimizer = case.make_optimizer([torch.nn.Parameter(torch.zeros(1))])
        plain = isinstance(optimizer, torch.optim.SGD)
        if case.privacy is None or rate is None or not plain or not case.noise_multiplier:
            return None
        assert optimizer is not None
        values = case.trained_parameters.values()
        norm = math.sqrt(sum(float(value.detach().square().sum()) for value in values))
        if not norm:
            return None
        reach = rate * case.privacy.clip_norm / (1 - optimizer.param_groups[0]["momentum"])
        spread = case.noise_multiplier * math.sqrt(case.trained_numbers) / case.records_per_step
        noise = reach * spread / norm
        far = reach * case.steps / norm
        if noise > self.largest:
            return self._found(case, rate, noise, self.largest, 0.2 / noise, "of noise, too large")
        if far < self.smallest:
            told = f"at most in all {case.steps} steps, too small"
            return self._found(case, rate, far, self.smallest, 10 / far, told)
        return None

    def _found(
        self, case: Case, rate: float, measured: float, threshold: float, factor: float, told: str
    ) -> Finding:
        assert case.privacy is not None
        better = float(f"{rate * factor:.1g}")
        return self.finding(
            f"learning rate {rate:g} with clip norm {case.privacy.clip_norm:g} moves the "
            f"parameters by {measured:.2g} of their norm {told}",
            measured=measured,
            threshold=threshold,
            remedy=Remedy(
                advice=f"learning_rate = {better:g}", changes={"training.learning_rate": better}
            ),
        )
