"""A curator as the hooks of a strategy see it: the members of the protocol, and nothing behind."""

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

from perdure.contract.curator import Curator
from perdure.errors import PrivacyError

MEMBERS = tuple(name for name in vars(Curator) if not name.startswith("_"))
"""Names that hooks may use."""


def for_hooks(curator: Curator) -> Curator:
    """Return an object with the members of `perdure.Curator`, which asks this curator.

    Guarantee: no attribute of the object leads to the curator, its records or its memory; a hook
    that looks for one gets a PrivacyError with the members that there are.
    """

    def member(name: str, declared: Any) -> Any:
        if isinstance(declared, property):
            return property(lambda _: getattr(curator, name), doc=declared.__doc__)

        @wraps(cast(Callable[..., Any], declared))
        def ask(_: object, *args: Any, **named: Any) -> Any:
            return getattr(curator, name)(*args, **named)

        return ask

    def refuse(_: object, name: str) -> Any:
        if name.startswith("__"):  # what copy and its like try
            raise AttributeError(name)
        raise PrivacyError(
            f"a hook reads curator.{name}, which no charge covers; allowed: {', '.join(MEMBERS)}; "
            "ask curator.release(query, ...) instead"
        )

    members = {name: member(name, vars(Curator)[name]) for name in MEMBERS}
    kind = type("HookCurator", (), {"__slots__": (), "__getattr__": refuse, **members})
    return cast(Curator, kind())
