"""Fixtures of this folder's tests."""

from helpers.avalanche_harness import avalanche, benchmark, template  # noqa: F401
from helpers.toy_data import toy  # noqa: F401
