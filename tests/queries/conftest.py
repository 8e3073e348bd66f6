"""Fixtures of this folder's tests."""

from helpers.curator_harness import party  # noqa: F401
