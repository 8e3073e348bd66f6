"""The curator: it holds the private records of one party and answers releases.

A `Learner` makes its own; import `Curator` to ask one directly. Strategies see no more of it than
`perdure.contract` says.
"""

from perdure.curator.local_curator import Curator, Diagnostics

__all__ = [
    "Curator",
    "Diagnostics",
]
