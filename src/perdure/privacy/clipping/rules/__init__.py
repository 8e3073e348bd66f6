"""Clipping rules for book-keeping; each file has the rule of one layer type or family of types.

Import `ClippingRule`, and the classes that a rule is built from. To add a rule to the library, add
a file with one subclass; `register_rule` adds a rule for your own layer type.
"""

from perdure.privacy.clipping.rules.base import (
    ClippingRule,
    FormedRows,
    LayerCall,
    PrecomputedRows,
    RecordGradients,
)
from perdure.privacy.clipping.rules.registry import register_rule

__all__ = [
    "ClippingRule",
    "FormedRows",
    "LayerCall",
    "PrecomputedRows",
    "RecordGradients",
    "register_rule",
]
