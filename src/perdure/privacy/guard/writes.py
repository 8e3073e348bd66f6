"""Refuse code that writes to parameters, buffers or strategy state during a private pass.

If a forward pass or a loss writes to a tensor that is kept, this is a release without noise: a
renormalised embedding reveals the tokens of one record, a running sum in a strategy's state reveals
the sum of the batch. So all these tensors are compared before and after a pass. Version counters
detect every in-place operation in microseconds. Values are also compared, around every probe and
once per block of steps, because version counters do not see writes through `.data`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perdure.data.row_view import RowView
from perdure.errors import GuardError

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """Tensors of a model and a strategy state, as they were before a pass.

    Args:
        tensors: tensors by kind and name.
        versions: number of writes to each tensor before the pass.
        values: copies of the tensors; empty if only the versions are compared.
    """

    tensors: dict[str, Tensor]
    versions: list[int]
    values: dict[str, Tensor]


class WriteWatch:
    """Compare the tensors of a model and of a strategy's state around private passes.

    Args:
        model: model whose parameters and buffers are compared; modules added later are not.
    """

    def __init__(self, model: nn.Module) -> None:
        # Listing the modules takes longer than reading the counters, so it is done once.
        self._tables: list[tuple[str, Mapping[str, Tensor | None]]] = []
        for prefix, module in model.named_modules():
            dot = f"{prefix}." if prefix else ""
            self._tables.append((f"parameter {dot}", module._parameters))
            self._tables.append((f"buffer {dot}", module._buffers))

    @contextmanager
    def unwritten(self, state: State, what: str, *, values: bool = False) -> Iterator[None]:
        """Context manager that refuses writes by the code that runs inside it.

        Args:
            state: state of the strategy.
            what: name of the pass, for messages.
            values: also compare values; a tensor that was changed gets its old values again.

        Raises:
            GuardError: names the tensor.
        """
        before = self.see(state, values=values)
        yield
        self.refuse_writes(before, state, what)

    def see(self, state: State, *, values: bool = False) -> Seen:
        """Record the versions of all tensors, and their values if `values` is True."""
        tensors = self._tensors(state)
        copies = {n: t.detach().clone() for n, t in tensors.items()} if values else {}
        return Seen(
            tensors=tensors, versions=[version_of(t) for t in tensors.values()], values=copies
        )

    def refuse_writes(self, before: Seen, state: State, what: str) -> None:
        """Refuse a tensor that differs from `before`, is new, or is missing.

        Raises:
            GuardError: names the tensor.
        """
        now = self._tensors(state)
        for (name, tensor), version in zip(before.tensors.items(), before.versions, strict=True):
            changed = now.get(name) is not tensor or version_of(tensor) != version
            if not changed and name in before.values:
                changed = not same_values(tensor.detach(), before.values[name])
            if changed:
                self._put_back(before)
                raise _refusal(name, what)
        for name in now.keys() - before.tensors.keys():
            raise _refusal(name, what)

    def _tensors(self, state: State) -> dict[str, Tensor]:
        found = {
            prefix + name: value
            for prefix, table in self._tables
            for name, value in table.items()
            if value is not None
        }
        return found | {f"state {name}": value for name, value in state.items()}

    def _put_back(self, before: Seen) -> None:
        with torch.no_grad():
            for name, value in before.values.items():
                if not same_values(before.tensors[name].detach(), value):
                    before.tensors[name].copy_(value)


def version_of(tensor: Tensor) -> int:
    """Number of in-place operations on the tensor so far; 0 if torch does not count them."""
    if isinstance(tensor, RowView):  # writes go to the source of its rows
        return sum(version_of(part.source) for part in tensor.parts)
    return 0 if tensor.is_inference() else tensor._version


def counts_writes(tensor: Tensor) -> bool:
    """Return True if torch counts the in-place operations on the tensor."""
    if isinstance(tensor, RowView):
        return all(counts_writes(part.source) for part in tensor.parts)
    return not tensor.is_inference()


def same_values(one: Tensor, other: Tensor) -> bool:
    """Return True if two tensors have the same shape and numbers; NaN equals NaN here."""
    if one.shape != other.shape or torch.equal(one, other):
        return one.shape == other.shape
    equal = (one == other) | (one.isnan() & other.isnan())
    return bool(equal.all())


def _refusal(name: str, what: str) -> GuardError:
    return GuardError(
        f"{name} is written to in {what}: it would keep data of private records without "
        "noise; compute new tensors, and do not change parameters, buffers or state (a "
        "strategy may keep only released values, in after_step or after_experience)"
    )
