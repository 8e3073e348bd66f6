"""The learner: trains one model on a stream of experiences.

Import `Learner`, or `Session` for your own training loop. `Callback` is the type of a function that
the learner calls at the points named in `POINTS`.
"""

from perdure.learner.learner import POINTS, Callback, Learner
from perdure.learner.session import Session

__all__ = [
    "POINTS",
    "Callback",
    "Learner",
    "Session",
]
