"""Fixtures of the tests in this folder."""

from helpers.curator_harness import party  # noqa: F401
