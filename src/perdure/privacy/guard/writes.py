"""Writes during a private pass: parameters, buffers and state stay as they are.

A write by a forward pass or a loss into a tensor that is kept is a release without noise: a
renormalised embedding shows the tokens of one record, a running sum in a strategy's state the sum
of the batch. So all these tensors are compared around a pass. Version counters tell of every
in-place operation and cost microseconds; values also tell of writes through `.data`, which the
counters do not see, and are compared around every probe and once a block of steps.
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
    """Tensors of a model and a state as they were before a pass.

    Args:
        tensors: by kind and name.
        versions: how often each had been written to.
        values: copies of them; empty where only the versions are compared.
    """

    tensors: dict[str, Tensor]
    versions: list[int]
    values: dict[str, Tensor]


class WriteWatch:
    """Compare the tensors of a model and of a strategy's state around private passes.

    Args:
        model: whose parameters and buffers are compared; modules that it gets later are not.
    """

    def __init__(self, model: nn.Module) -> None:
        # Walking the modules costs more than reading the counters, so it is done once.
        self._tables: list[tuple[str, Mapping[str, Tensor | None]]] = []
        for prefix, module in model.named_modules():
            dot = f"{prefix}." if prefix else ""
            self._tables.append((f"parameter {dot}", module._parameters))
            self._tables.append((f"buffer {dot}", module._buffers))

    @contextmanager
    def unwritten(self, state: State, what: str, *, values: bool = False) -> Iterator[None]:
        """Refuse writes by what runs inside.

        Args:
            state: of the strategy.
            what: name of the pass, for messages.
            values: compare values as well; a tensor that was written is put back.

        Raises:
            GuardError: naming the tensor.
        """
        before = self.see(state, values=values)
        yield
        self.refuse_writes(before, state, what)

    def see(self, state: State, *, values: bool = False) -> Seen:
        """Note every tensor as it is now."""
        tensors = self._tensors(state)
        copies = {n: t.detach().clone() for n, t in tensors.items()} if values else {}
        return Seen(
            tensors=tensors, versions=[version_of(t) for t in tensors.values()], values=copies
        )

    def refuse_writes(self, before: Seen, state: State, what: str) -> None:
        """Refuse a tensor that is other than `before`, or new, or gone.

        Raises:
            GuardError: naming the tensor.
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
    """Number of in-place operations on the tensor so far; 0 where torch does not count them."""
    if isinstance(tensor, RowView):  # it is written to where its rows are read from
        return sum(version_of(part.source) for part in tensor.parts)
    return 0 if tensor.is_inference() else tensor._version


def counts_writes(tensor: Tensor) -> bool:
    """Tell if torch counts the in-place operations on the tensor."""
    if isinstance(tensor, RowView):
        return all(counts_writes(part.source) for part in tensor.parts)
    return not tensor.is_inference()


def same_values(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors hold the same numbers; NaN is like NaN."""
    if one.shape != other.shape or torch.equal(one, other):
        return one.shape == other.shape
    equal = (one == other) | (one.isnan() & other.isnan())
    return bool(equal.all())


def _refusal(name: str, what: str) -> GuardError:
    return GuardError(
        f"{name} is written to in {what}: it would keep what private records put there, without "
        "noise; compute new tensors and leave parameters, buffers and state as they are (what a "
        "strategy remembers comes from released values, in after_step or after_experience)"
    )
