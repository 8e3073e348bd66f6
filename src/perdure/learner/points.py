"""Named points of the loop, at which callbacks are called."""

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
