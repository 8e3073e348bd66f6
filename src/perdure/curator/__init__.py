"""The curator: holds the private records of one party, and answers queries by releases.

A `Learner` makes its own curator; import `LocalCurator` to use one directly. Strategies use it
through the interface `Curator` of `perdure.contract`.
"""

from perdure.curator.diagnostics import Diagnostics
from perdure.curator.local_curator import LocalCurator

__all__ = [
    "Diagnostics",
    "LocalCurator",
]
