"""Tests for strategies, also for your own.

Import `check_strategy`, which runs a strategy alone, federated, private and under `vmap`, and
`CHECKS` for the names of its checks. `replay` runs a private experiment twice, on two data sets
that differ in one record.

>>> from perdure.testing import check_strategy
>>> print(check_strategy(Replay(memory_size=20)))
"""

from perdure.testing.conformance import CHECKS, Report, check_strategy
from perdure.testing.replay import ReleaseChange, ReplayResult, replay

__all__ = [
    "CHECKS",
    "ReleaseChange",
    "ReplayResult",
    "Report",
    "check_strategy",
    "replay",
]
