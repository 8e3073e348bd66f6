"""Fixtures of the tests in this folder."""

from helpers.toy_data import toy  # noqa: F401
