"""Fixtures of this folder's tests."""

from helpers.learners import learner_of  # noqa: F401
from helpers.reference_gradients import copies, four, meetings  # noqa: F401
