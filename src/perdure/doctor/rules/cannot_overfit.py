"""Rule: the model cannot learn three batches of records that any wired model learns."""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trials import batches_of, recent, trial
from perdure.tasks import Regression
from perdure.utils.seeding import generator

BATCHES = 3
ROWS = 16
PROTOTYPES = 4
RATES = (1e-2, 1e-3, 1e-1)
"""Learning rates of Adam that are tried in turn, until one of them is enough."""


@dataclass(frozen=True, kw_only=True)
class CannotOverfit(Rule):
    """Find a model whose loss does not fall on three batches of synthetic records.

    A synthetic record is one of four random inputs of the declared domain with a little noise, and
    the target of that input, so that even a small linear model learns them.

    Symptom: with Adam at each of three learning rates, the loss of the last pass over the batches
    is above `share` times the first loss after `steps` steps. The first rate that succeeds ends
    the rule, so that a sound model takes few steps.

    Remedy: none is a setting. Look for a detached graph, frozen or dead layers, a doubled softmax,
    or a loss of the wrong shape.

    Source: Karpathy 2019, "A recipe for training neural networks", overfit one batch; own
    measurement: sound models fall below 0.5 within 120 steps; softmax twice stays above 0.6 with
    ten classes.

    Args:
        share: share of the first loss above which there is a finding.
        steps: largest number of steps at each learning rate.
    """

    name: ClassVar[str] = "cannot overfit"
    cause: ClassVar[Cause] = "wiring"
    source: ClassVar[str] = "Karpathy 2019, overfit a single batch; own measurement"
    explained_by: ClassVar[tuple[str, ...]] = (
        "dead units",
        "exploding gradient",
        "frozen parameters",
        "initial variance",
        "label range",
        "saturated activation",
        "softmax twice",
        "vanishing gradient",
    )
    trains: ClassVar[bool] = True

    share: float = 0.5
    steps: int = 120

    def examine(self, case: Case) -> Finding | None:
        """Train copies of the model on synthetic records."""
        inputs, targets = _easy(case)
        batches = batches_of(inputs, targets, rows=ROWS, seed=case.seed)
        best: list[float] = []
        for rate in RATES:
            losses = trial(
                case,
                batches,
                partial(torch.optim.Adam, lr=rate),
                steps=self.steps,
                enough=self.share,
            )
            if not losses:  # nothing to train, which other rules tell
                return None
            best = min(best or losses, losses, key=lambda each: recent(each, BATCHES))
            if recent(best, BATCHES) <= self.share * best[0]:
                return None
        return self._found(best)

    def _found(self, losses: list[float]) -> Finding:
        finite = [loss for loss in losses if math.isfinite(loss)]
        left = recent(losses, BATCHES) / losses[0]
        return self.finding(
            f"after {len(losses)} steps on {BATCHES} batches of easy synthetic records the loss "
            f"is still {left:.2f} times the first one ({losses[0]:.3g})",
            measured=left,
            threshold=self.share,
            remedy=Remedy(
                advice="check the wiring: softmax twice, frozen or detached layers, dead units"
            ),
            series=finite,
            series_name="loss of each step on synthetic records",
        )


def _easy(case: Case) -> tuple[Tensor, Tensor]:
    """Make inputs and targets of three batches around a few prototypes."""
    rows = BATCHES * ROWS
    kinds = torch.arange(rows) % PROTOTYPES
    pattern = case.random_inputs(PROTOTYPES)
    targets = case.random_targets(PROTOTYPES)
    if isinstance(case.task, Regression):
        targets = kinds[:PROTOTYPES, None].to(targets.dtype).expand_as(targets) - 1.5
    inputs = pattern[kinds]
    if inputs.is_floating_point():
        noise = torch.randn(inputs.shape, generator=generator(case.seed, "doctor", "easy"))
        inputs = inputs + 0.05 * pattern.std() * noise.to(inputs.dtype)
    return inputs, targets[kinds]
