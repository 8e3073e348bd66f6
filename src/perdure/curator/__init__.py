"""The curator: it holds the private records of one party and answers releases.

A `Learner` makes its own; import `LocalCurator` to ask one directly. Strategies see it as the
`Curator` of `perdure.contract`.
"""

from perdure.curator.local_curator import Diagnostics, LocalCurator

__all__ = [
    "Diagnostics",
    "LocalCurator",
]
