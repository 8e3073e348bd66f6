"""Rule: the model ends in a softmax or sigmoid that the loss applies again."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.tasks import MultiLabel, NextToken, SingleLabel

OF_SOFTMAX = (nn.CrossEntropyLoss, functional.cross_entropy)
OF_SIGMOID = (nn.BCEWithLogitsLoss, functional.binary_cross_entropy_with_logits)
ROWS = 64


@dataclass(frozen=True, kw_only=True)
class SoftmaxTwice(Rule):
    """Find outputs that are probabilities already, where the loss wants logits.

    Symptom: on random inputs, every row of outputs is at least 0 and adds up to 1 within
    `tolerance`; for labels of which a record may have several, every output is between 0 and 1.

    Remedy: remove the last softmax or sigmoid of the model; the loss has its own.

    Source: UMLAUT (Schoop, Huang, Hartmann 2021), missing or doubled final activation. With 10
    classes a second softmax bounds the cross entropy to at least 1.46.

    Args:
        tolerance: largest distance of a row's sum from 1.
    """

    name: ClassVar[str] = "softmax twice"
    cause: ClassVar[Cause] = "wiring"
    source: ClassVar[str] = "UMLAUT (Schoop, Huang, Hartmann 2021)"

    tolerance: float = 1e-3

    def examine(self, case: Case) -> Finding | None:
        """Run the model on inputs of the sample and on random ones."""
        softmax = _wants(case, (SingleLabel, NextToken), OF_SOFTMAX)
        sigmoid = _wants(case, (MultiLabel,), OF_SIGMOID)
        if not (softmax or sigmoid):
            return None
        outputs = case.outputs(case.some_inputs(ROWS)).flatten(0, -2)
        if outputs.shape[-1] < 2 or not _are_shares(outputs):
            return None
        distance = float((outputs.sum(-1) - 1).abs().max())
        if softmax and distance > self.tolerance:
            return None
        last = "softmax" if softmax else "sigmoid"
        return self.finding(
            f"all outputs are between 0 and 1{' and add up to 1' * softmax}, so the model ends in "
            f"a {last}, which the loss applies again",
            measured=distance if softmax else float(outputs.max()),
            threshold=self.tolerance if softmax else 1.0,
            remedy=Remedy(advice=f"remove the last {last} of the model; return logits"),
            series=outputs[0].tolist()[:100],
            series_name="outputs of one record",
        )


def _wants(case: Case, tasks: tuple[type, ...], losses: tuple[object, ...]) -> bool:
    """Return True if the loss of the case, or of its task, applies the function itself."""
    if case.loss is None:
        return isinstance(case.task, tasks)
    return any(
        case.loss is each or (isinstance(each, type) and isinstance(case.loss, each))
        for each in losses
    )


def _are_shares(outputs: Tensor) -> bool:
    """Return True if all outputs are between 0 and 1, and not all the same number."""
    inside = bool(((outputs >= 0) & (outputs <= 1)).all())
    return inside and bool(outputs.std() > 0)
