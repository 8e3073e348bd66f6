"""Fixtures of this folder's tests."""

from helpers.toy_data import toy  # noqa: F401
