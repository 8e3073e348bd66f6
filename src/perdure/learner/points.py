"""Named points of the loop, at which callbacks are called."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perdure.learner.learner import Learner

Callback = Callable[[str, "Learner"], None]
"""Function that is called at every named point of the loop; the names are `POINTS`."""
POINTS = (
    "experience.begin",
    "block.begin",
    "step.sampled",
    "step.gradient",
    "step.done",
    "block.end",
    "experience.consolidated",
    "experience.end",
    "evaluated",
    "checkpoint.begin",
    "checkpoint.end",
    "ledger.before-append",
    "ledger.appended",
    "ledger.head-written",
    "noise.drawn",
)
"""Points at which callbacks are called.

A run that is killed at any of these points and resumed gives bit-identical results.
"""
