"""Tests of strategies: the library's, or one of your own.

Import `check_strategy`, which runs a strategy alone, federated, private and under `vmap`, and
`CHECKS`, the checks by name.

>>> from perdure.testing import check_strategy
>>> print(check_strategy(Replay(memory_size=20)))
"""

from perdure.testing.conformance import CHECKS, Report, check_strategy

__all__ = [
    "CHECKS",
    "Report",
    "check_strategy",
]
