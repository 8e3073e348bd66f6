"""Rules for book-keeping, one layer type or family of types a file.

Import `ClippingRule` and what a rule is made of. Adding a rule is adding a file with one subclass;
`register_rule` adds the rule of a layer of your own.
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
