"""Rules of the doctor: one file, one rule.

    from perdure.doctor.rules import find    # find("dead_units") is DeadUnits

To add a rule, add a file `my_rule.py` with one class `MyRule(Rule)`.
"""

from typing import TypeGuard

from perdure.doctor.rules.base import Rule
from perdure.utils.extensions import Extensions, is_proper_subclass

__all__ = ["Rule", "find", "names"]


def _is_rule(value: object) -> TypeGuard[type[Rule]]:
    return is_proper_subclass(value, Rule)


_EXTENSIONS = Extensions(
    kind="rule",
    package=__name__,
    group="perdure.doctor_rules",
    fits=_is_rule,
    wanted="a subclass of perdure.doctor.Rule",
    helpers=("base",),
)


def names() -> tuple[str, ...]:
    """Return the sorted names of all rules: files of this package, and entry points."""
    return _EXTENSIONS.names()


def find(name: str, *, field: str = "rule") -> type[Rule]:
    """Return the class of a rule.

    Args:
        name: one of `names()`, or "my_package.my_module:MyRule".
        field: name of the setting or argument with this value, for the error message.

    Raises:
        ConfigError: if there is no such rule, or it cannot be imported.
    """
    return _EXTENSIONS.find(name, field=field)
