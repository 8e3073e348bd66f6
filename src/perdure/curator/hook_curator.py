"""Curator for the hooks of a strategy, with the members of the protocol and no other attributes."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, cast

from perdure.contract.curator import Curator
from perdure.contract.plan import PrivacyCost
from perdure.errors import BudgetError, PrivacyError

MEMBERS = tuple(name for name in vars(Curator) if not name.startswith("_"))
"""Names of the members that hooks may use."""
DECLARED = {
    "release": "releases",
    "count": "histograms",
    "select": "selections",
    "reference": "references",
}
"""Name of a member to the field of `PrivacyCost` that declares its use."""


def for_hooks(
    curator: Curator, *, strategy: str = "the strategy", cost: PrivacyCost | None = None
) -> Curator:
    """Return an object with only the members of `perdure.Curator`, which calls `curator`.

    Args:
        curator: curator that computes the answers.
        strategy: name of the strategy whose hooks get the object, for messages.
        cost: privacy cost that the strategy declares.

    Guarantee: no attribute of the object leads to the curator, its records or its memory; a hook
    that reads another attribute gets a PrivacyError with the allowed members.
    """

    def member(name: str, declared: Any) -> Any:
        if isinstance(declared, property):
            return property(lambda _: getattr(curator, name), doc=declared.__doc__)

        @wraps(cast(Callable[..., Any], declared))
        def ask(_: object, *args: Any, **named: Any) -> Any:
            try:
                return getattr(curator, name)(*args, **named)
            except BudgetError as error:
                if name not in DECLARED:
                    raise
                raise undeclared(strategy, name, named, cost or PrivacyCost(), error) from error

        return ask

    def refuse(_: object, name: str) -> Any:
        if name.startswith("__"):  # names that `copy` and similar functions look up
            raise AttributeError(name)
        raise PrivacyError(
            f"a hook reads curator.{name}, which no charge in the ledger covers; allowed: "
            f"{', '.join(MEMBERS)}; "
            "ask curator.release(query, ...) instead"
        )

    members = {name: member(name, vars(Curator)[name]) for name in MEMBERS}
    kind = type("HookCurator", (), {"__slots__": (), "__getattr__": refuse, **members})
    return cast(Curator, kind())


def undeclared(
    strategy: str, member: str, named: Mapping[str, Any], cost: PrivacyCost, error: BudgetError
) -> BudgetError:
    """Build the error for a strategy that asks for more releases than it declares, with the fix."""
    over_memory = member == "release" and named.get("over") == "memory"
    field = "memory_releases" if over_memory else DECLARED[member]
    reason = str(error).rpartition(";")[0] or str(error)
    purpose = f"purpose={named['purpose']!r}" if "purpose" in named else "..."
    return BudgetError(
        f"{strategy} asks for curator.{member}({purpose}), which its plan does not contain "
        f"({reason}); declare all releases in the strategy, privacy_cost = "
        f"PrivacyCost({field}={getattr(cost, field) + 1})"
    )
