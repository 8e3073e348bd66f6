"""The learner: one model on a stream of experiences, in one loop.

Import `Learner`, or `Session` for a loop of your own; `Callback` is the type of what is called at
the `POINTS` of a step.
"""

from perdure.learner.learner import POINTS, Callback, Learner
from perdure.learner.session import Session

__all__ = [
    "POINTS",
    "Callback",
    "Learner",
    "Session",
]
