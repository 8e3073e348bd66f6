"""State of a strategy: named tensors, each with a rule that combines it over clients."""

from collections.abc import Iterator, Mapping
from typing import Literal

from torch import Tensor

from perdure.errors import StrategyError
from perdure.types import Params

Rule = Literal["sum", "mean", "round_mean", "local"]
"""Rule by which the states of clients are combined; `local` tensors stay with their client."""


class State(Mapping[str, Tensor]):
    """State of a strategy: a flat mapping from name to tensor.

    `Strategy.init` fixes names and shapes. Each name is declared once with the rule by which a
    federation combines it: `sum` (increments add up over clients), `mean` (weighted by declared
    sizes), `round_mean` (the mean change of all clients, after every round) or `local` (each client
    keeps its own). Values in the shapes of the parameters form a
    *group*: one entry per parameter, named `group/parameter`.

    Args:
        tensors: name to tensor.
        rules: name to rule, for the same names.

    Raises:
        StrategyError: if the names differ.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor] | None = None, rules: Mapping[str, Rule] | None = None
    ) -> None:
        self._tensors = dict(tensors or {})
        self.rules: dict[str, Rule] = dict(rules or {})
        if self._tensors.keys() != self.rules.keys():
            raise StrategyError(
                "every state name needs one rule; these names have only a tensor or only a rule: "
                f"{sorted(self._tensors.keys() ^ self.rules)}"
            )

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return (
            f"State({', '.join(f'{n}: {tuple(t.shape)} {self.rules[n]}' for n, t in self.items())})"
        )

    def declare(self, name: str, value: Tensor, rule: Rule) -> "State":
        """Add a new name with its tensor and rule; for use in `Strategy.init`.

        Args:
            name: name of the tensor.
            value: the tensor, of any shape; the shape never changes.
            rule: `sum`, `mean`, `round_mean` or `local`.
        """
        return self._declared({name: value}, rule)

    def declare_group(self, group: str, values: Params, rule: Rule) -> "State":
        """Add one tensor per parameter, named `group/parameter`; for use in `Strategy.init`.

        Args:
            group: name of the group.
            values: parameter name to tensor, in the shape of that parameter.
            rule: `sum`, `mean`, `round_mean` or `local`, for the whole group.
        """
        return self._declared({f"{group}/{name}": value for name, value in values.items()}, rule)

    def group(self, group: str) -> Params:
        """Return the tensors of one group by parameter name."""
        return {
            n.removeprefix(f"{group}/"): t for n, t in self.items() if n.startswith(f"{group}/")
        }

    def replace(self, changes: Mapping[str, Tensor]) -> "State":
        """Return a state with new values under known names and unchanged shapes.

        Raises:
            StrategyError: if `init` did not declare a name, or a shape differs.
        """
        for name, value in changes.items():
            if name not in self or self[name].shape != value.shape:
                known = tuple(self[name].shape) if name in self else "undeclared"
                given = tuple(value.shape)
                raise StrategyError(
                    f"state {name!r} is {known}, but the given tensor has shape {given}; declare "
                    "the name with this shape in init()"
                )
        return State({**self._tensors, **changes}, self.rules)

    def replace_group(self, group: str, values: Params) -> "State":
        """Return a state with new values for all parameters of one group."""
        return self.replace({f"{group}/{name}": value for name, value in values.items()})

    def _declared(self, new: Mapping[str, Tensor], rule: Rule) -> "State":
        for name in new:
            if name in self._tensors:
                raise StrategyError(f"state name {name!r} is declared twice; choose another name")
        return State({**self._tensors, **new}, {**self.rules, **dict.fromkeys(new, rule)})
