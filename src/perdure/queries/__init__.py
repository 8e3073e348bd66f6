"""Queries that a curator answers, and their exact and clipped sums over records.

Import a query for `curator.release` (`Gram`, `SquaredGradient`, `AbsoluteGradient`,
`GroupedGradient`), or a function that releases a statistic (`mean`, `histogram`, `quantile`,
`top_k`). `SummedQuery` is the base class of queries that can compute their sums faster than one
record at a time.
"""

from perdure.queries.batch_gradients import clipped_gradient
from perdure.queries.evaluation import SummedQuery
from perdure.queries.gram import Gram, svec, unsvec
from perdure.queries.grouped_gradients import GroupedGradient
from perdure.queries.releases import histogram, mean, quantile, top_k
from perdure.queries.squared_gradients import AbsoluteGradient, SquaredGradient

__all__ = [
    "AbsoluteGradient",
    "Gram",
    "GroupedGradient",
    "SquaredGradient",
    "SummedQuery",
    "clipped_gradient",
    "histogram",
    "mean",
    "quantile",
    "svec",
    "top_k",
    "unsvec",
]
