"""Clipping of per-record gradients: the only place where a record's influence is bounded.

A layer type of your own is clipped by book-keeping, as fast as torch's own layers, once it has a
rule: `register_rule(MyLayer, MyRule())` (see `ClippingRule`).
"""

from perdure.privacy.clipping.rule_table import register_rule
from perdure.privacy.clipping.rules.base import (
    ClippingRule,
    FormedRows,
    LayerCall,
    PrecomputedRows,
    RecordGradients,
)

__all__ = [
    "ClippingRule",
    "FormedRows",
    "LayerCall",
    "PrecomputedRows",
    "RecordGradients",
    "register_rule",
]
