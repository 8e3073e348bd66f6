"""Fixtures of this folder's tests."""

from helpers.learners import learner_of  # noqa: F401
