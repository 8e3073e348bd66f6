"""Rule: the optimiser does not have all parameters that require gradients."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.optim import Optimizer

from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class UnlistedParameters(Rule):
    """Find parameters that require gradients and that the optimiser was not given.

    Symptom: the share of unlisted numbers among those that require gradients is above `share`. An
    optimiser that is given as a function gets all of them, unless the function leaves some out.

    Remedy: give the optimiser `model.parameters()`.

    Source: SageMaker Debugger (UnchangedTensor) for the symptom.

    Args:
        share: share of unlisted numbers above which there is a finding.
    """

    name: ClassVar[str] = "unlisted parameters"
    cause: ClassVar[Cause] = "wiring"
    source: ClassVar[str] = "SageMaker Debugger, UnchangedTensor"

    share: float = 0.0

    def examine(self, case: Case) -> Finding | None:
        """Compare the optimiser's groups with the model's parameters."""
        params = case.trained_parameters
        optimizer = case.optimizer
        if optimizer is None or not params:
            return None
        made = optimizer if isinstance(optimizer, Optimizer) else optimizer(params.values())
        listed = {id(each) for group in made.param_groups for each in group["params"]}
        unlisted: dict[str, nn.Parameter] = {
            name: value for name, value in params.items() if id(value) not in listed
        }
        part = sum(value.numel() for value in unlisted.values()) / case.trained_numbers
        if part <= self.share:
            return None
        shown = ", ".join(list(unlisted)[:3]) + (", ..." if len(unlisted) > 3 else "")
        return self.finding(
            f"the optimiser does not have {shown}: {part:.0%} of the numbers that require "
            "gradients",
            measured=part,
            threshold=self.share,
            remedy=Remedy(advice="give the optimiser model.parameters()"),
        )
