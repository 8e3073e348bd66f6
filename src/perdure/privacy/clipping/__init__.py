"""Clipping of per-record gradients, so that one record changes a sum by at most the clip norm.

Import `clipped_sum`, which works record by record, `clipped_gradient_sum`, which uses the clipping
rule of each layer type, and `Clip` for the bound. `register_rule(MyLayer, MyRule())` adds a rule
for your own layer type, which is then clipped as fast as the layers of torch (see `ClippingRule`).
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
