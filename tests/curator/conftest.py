"""Fixtures of the tests in this folder."""

from helpers.curator_bench import bench  # noqa: F401
from helpers.reference_gradients import copies, four, meetings  # noqa: F401
