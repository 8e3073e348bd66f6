"""Rule: a model is too large for the devices that it is made for."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class LargeModel(Rule):
    """Find models whose parameters need more bytes than a device or a download may have.

    Symptom: parameters and buffers have more than `bytes` bytes.

    Remedy: after training, a distilled student, pruning, or 8-bit weights.

    Source: own rule: a limit that the user declares; the default is a common limit of a file.

    Args:
        bytes: number of bytes above which there is a finding.
    """

    name: ClassVar[str] = "large model"
    cause: ClassVar[Cause] = "memory"
    source: ClassVar[str] = "own rule: a declared limit"

    bytes: float = 2e9

    def examine(self, case: Case) -> Finding | None:
        """Add up the sizes of the tensors."""
        model = case.model
        sizes = [value.nbytes for value in (*model.parameters(), *model.buffers())]
        if sum(sizes) <= self.bytes:
            return None
        return self.finding(
            f"the model has {sum(sizes) / 1e6:.3g} MB; the limit is {self.bytes / 1e6:.3g} MB",
            measured=sum(sizes),
            threshold=self.bytes,
            remedy=Remedy(advice="perdure export --student 'hidden = [64]' --int8 --prune 0.5"),
            series=sizes,
            series_name="bytes of each tensor",
        )
