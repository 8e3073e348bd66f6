"""Table of clipping rules by layer type: one rule per file of `rules`, and registered rules."""

from functools import cache
from typing import TypeGuard

from torch import nn

from perdure.errors import ConfigError
from perdure.privacy.clipping.rules.base import ClippingRule
from perdure.utils.extensions import Extensions, is_proper_subclass


def _is_rule(value: object) -> TypeGuard[type[ClippingRule]]:
    return is_proper_subclass(value, ClippingRule)


EXTENSIONS = Extensions(
    kind="clipping rule",
    package="perdure.privacy.clipping.rules",
    group="perdure.clipping_rules",
    fits=_is_rule,
    wanted="a subclass of perdure.privacy.clipping.ClippingRule",
    helpers=("base", "registry"),
)


def register_rule(module_type: type[nn.Module], rule: ClippingRule) -> None:
    """Register your own clipping rule for a layer type, so that book-keeping can clip these layers.

    Guarantee: only the guarantee of the rule itself, which must keep the conditions of
    `ClippingRule`; otherwise one record may change a sum by more than the clip norm. A type without
    a rule is clipped record by record, which is slower.

    Args:
        module_type: type of the layers; its subclasses are still clipped record by record.
        rule: an object of a subclass of `ClippingRule`.

    Raises:
        ConfigError: if an argument has another type, or if the type already has another rule.

    >>> register_rule(Gain, GainRule())                                     # doctest: +SKIP
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise ConfigError.of("module_type", module_type, "a subclass of torch.nn.Module")
    _add(clipping_rules(), module_type, rule)


@cache
def clipping_rules() -> dict[type[nn.Module], ClippingRule]:
    """Clipping rules by layer type; files and entry points are read at the first call."""
    table: dict[type[nn.Module], ClippingRule] = {}
    for name in EXTENSIONS.names():
        rule = EXTENSIONS.find(name)()
        for module_type in rule.layers:
            _add(table, module_type, rule)
    return table


def _add(
    table: dict[type[nn.Module], ClippingRule], module_type: type[nn.Module], rule: ClippingRule
) -> None:
    if not isinstance(rule, ClippingRule):
        raise ConfigError.of(
            "rule", rule, "an object of a subclass of perdure.privacy.clipping.ClippingRule"
        )
    known = table.get(module_type)
    # a notebook cell that runs again defines the same class again
    if known is not None and _name(known) != _name(rule):
        raise ConfigError(
            f"{module_type.__name__} already has the clipping rule {_name(known)}, and "
            f"{_name(rule)} cannot be added; allowed: one rule per layer type; register "
            f"{_name(rule)} for a subclass of the layer"
        )
    table[module_type] = rule


def _name(rule: ClippingRule) -> str:
    return f"{type(rule).__module__}.{type(rule).__qualname__}"
