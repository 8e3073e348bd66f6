"""Clipping of per-record gradients: the only place where a record's influence is bounded.

Import `clipped_sum`, which goes record by record, and `clipped_gradient_sum`, which goes by the
rules of the layers; `Clip` is the bound. A layer type of your own is clipped by rule as well, as
fast as torch's own layers, after `register_rule(MyLayer, MyRule())` (see `ClippingRule`).
"""

from perdure.privacy.clipping.bookkeeping import clipped_gradient_sum
from perdure.privacy.clipping.clip import Clip, clipped_sum
from perdure.privacy.clipping.norms import squared_row_norms
from perdure.privacy.clipping.rules.base import (
    ClippingRule,
    FormedRows,
    LayerCall,
    PrecomputedRows,
    RecordGradients,
    sum_of,
)
from perdure.privacy.clipping.rules.registry import register_rule

__all__ = [
    "Clip",
    "ClippingRule",
    "FormedRows",
    "LayerCall",
    "PrecomputedRows",
    "RecordGradients",
    "clipped_gradient_sum",
    "clipped_sum",
    "register_rule",
    "squared_row_norms",
    "sum_of",
]
