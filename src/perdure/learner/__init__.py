"""The learner: one model on a stream of experiences, in one loop.

Import `Learner`; `Callback` is the type of what it calls at the `POINTS` of a step.
"""

from perdure.learner.learner import POINTS, Callback, Learner

__all__ = [
    "POINTS",
    "Callback",
    "Learner",
]
