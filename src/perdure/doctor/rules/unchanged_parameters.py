"""Rule: a trained tensor does not change."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace


@dataclass(frozen=True, kw_only=True)
class UnchangedParameters(Rule):
    """Find tensors that should be trained and do not change in any measured step.

    Symptom: in at least `steps` measured steps, the update of a tensor with two dimensions or more
    is exactly 0, while that of another tensor is not. The optimiser may not have the tensor, or the
    outputs do not depend on it. Biases are left out: those before a normalisation do nothing.

    Remedy: give the optimiser `model.parameters()`, and use the layer in `forward`.

    Source: SageMaker Debugger, UnchangedTensor, over 3 steps.

    Args:
        steps: smallest number of measured steps.
    """

    name: ClassVar[str] = "unchanged parameters"
    cause: ClassVar[Cause] = "wiring"
    source: ClassVar[str] = "SageMaker Debugger, UnchangedTensor"
    explained_by: ClassVar[tuple[str, ...]] = (
        "dead units",
        "learning rate too high",
        "vanishing gradient",
        "saturated activation",
    )

    steps: int = 3

    def watch(self, trace: Trace) -> Finding | None:
        """Look for tensors whose updates are all 0."""
        if len(trace.at) < self.steps or not trace.finite:
            return None
        unmoved = (trace.updates == 0).all(0)
        still = unmoved & torch.tensor(trace.matrices)
        if not bool(still.any()) or bool(unmoved.all()):
            return None
        names = [name for name, same in zip(trace.names, still.tolist(), strict=True) if same]
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        return self.finding(
            f"{shown}: no change in {len(trace.at)} measured steps",
            measured=len(names) / len(trace.names),
            threshold=0.0,
            remedy=Remedy(
                advice="give the optimiser model.parameters(), and use these layers in forward"
            ),
            experience=trace.experience,
            step=trace.done,
        )
