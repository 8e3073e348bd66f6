"""Rule: a training needs more computing than the machine does in reasonable time."""

import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.utils.seeding import drawing_from

ROWS = 2
"""Rows of the pass whose operations are counted."""
PASSES = 3
"""Forward passes that a step costs: one, and a backward pass of about two."""
SIDE = 512
"""Side of the matrices whose product measures the speed of the machine."""


@dataclass(frozen=True, kw_only=True)
class ComputeNeed(Rule):
    """Estimate the floating-point operations of a training, and the hours that they take.

        operations = 3 * operations of a forward pass of one row * rows of a step * steps

    They are summed over the experiences, with the rows from memory. Operations of a row are counted
    by torch, which knows products of matrices and convolutions. The time of a training without
    estimates is longer, because small layers do not reach the speed of large products.

    Symptom: the operations are above `operations`, or above those of large matrix products that
    the machine does in `hours`.

    Remedy: a smaller or depthwise model, 16-bit numbers, or a strategy that does not train on all
    earlier records again.

    Source: own rule: a limit that the user declares; the default is a day.

    Args:
        hours: hours of training above which there is a finding.
        operations: number of operations above which there is a finding; None for the number that
            the machine does in `hours`.
    """

    name: ClassVar[str] = "compute need"
    cause: ClassVar[Cause] = "memory"
    source: ClassVar[str] = "own rule: a declared limit"

    hours: float = 24.0
    operations: float | None = None

    def examine(self, case: Case) -> Finding | None:
        """Count the operations of a row, and multiply them by the rows of the plan."""
        need = PASSES * _of_a_row(case) * _rows(case)
        limit = self.operations
        if limit is None:
            # a slow machine does a billion a second, so that most trainings need no measurement
            limit = 3600 * self.hours * 1e9
            limit = limit if need <= limit else 3600 * self.hours * _speed(case.device)
        if need <= limit:
            return None
        depthwise = any(
            isinstance(layer, torch.nn.Conv2d) and layer.groups == 1
            for layer in case.model.modules()
        )
        return self.finding(
            f"the training needs about {need:.2g} operations, {need / limit:.2g} times the limit",
            measured=need,
            threshold=limit,
            remedy=Remedy(
                advice="a smaller model or model.name = 'mobilenet'; a strategy with a memory "
                "instead of 'joint'; training.precision = 'bfloat16'",
                changes={"model.name": "mobilenet"} if depthwise else {},
            ),
        )


def _of_a_row(case: Case) -> float:
    """Count the operations of a forward pass of one row."""
    model = case.fresh_model()
    inputs = case.some_inputs(ROWS)
    with torch.no_grad(), drawing_from(case.seed), FlopCounterMode(display=False) as counted:
        model(inputs)
    return float(counted.get_total_flops()) / max(1, len(inputs))


def _rows(case: Case) -> float:
    """Rows of all steps of all experiences, with those from memory."""
    plan = case.plan
    total = 0.0
    for index in range(len(case.stream)):
        past = case.stream.upto(index)
        total += plan.steps_of(past) * float(plan.exposure(past).expected)
    return total


def _speed(device: str | torch.device) -> float:
    """Measure the operations of a large product of matrices in a second."""
    left = torch.ones(SIDE, SIDE, device=device)
    began = time.perf_counter()
    for _ in range(8):
        left = left @ left.clamp(max=1 / SIDE)
    float(left[0, 0])  # waits for the device
    return 8 * 2 * SIDE**3 / max(1e-9, time.perf_counter() - began)
