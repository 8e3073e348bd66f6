"""Tensors that refer to rows of other tensors, and read them only when they are used.

A stream cuts one set of records into many: experiences, clients, pieces. Each part stores the
positions of its rows and not the rows, so a stream needs no more memory than its data set, and
inputs may be in a file that is larger than memory (`numpy.memmap`, `torch.from_file`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from perdure.errors import DataError
from perdure.utils.chunking import HELD_BYTES, row_slices

Change = Callable[[Tensor], Tensor]
"""Function from rows (k, ...) to changed rows (k, ...); row i depends on row i only."""

aten = torch.ops.aten

# They read shape, dtype and device of their argument, but none of its numbers.
FACTORIES = {
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.new_full.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.empty_like.default,
    aten.full_like.default,
    aten.ones_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.zeros_like.default,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class RowPart:
    """Rows of one source tensor, with an optional change of each row.

    Args:
        source: (m, ...) a tensor, or a view of several parts.
        index: (n,) int64 positions in the source, on its device; None for all of its rows.
        change: function that is applied to the rows when they are read; None for none.
    """

    source: Tensor
    index: Tensor | None = None
    change: Change | None = None

    def __len__(self) -> int:
        return len(self.source) if self.index is None else len(self.index)

    def at(self, positions: Tensor) -> Tensor:
        """Read the rows at positions (k,), int64, none negative."""
        if self.index is not None:
            positions = self.index.index_select(0, positions)
        return self._changed(rows_at(self.source, positions))

    def between(self, start: int, stop: int) -> Tensor:
        """Read the rows from `start` up to `stop`."""
        if self.index is None:
            # a copy, so that code that works in place does not change the source
            return self._changed(self.source[start:stop].clone())
        return self._changed(rows_at(self.source, self.index[start:stop]))

    def _changed(self, rows: Tensor) -> Tensor:
        return rows if self.change is None else self.change(rows)


class RowView(Tensor):
    """A tensor (n, ...) whose rows are read from other tensors only when they are used.

    It is made by `view_rows`, `changed_rows` and `joined_rows`. Reading shape, dtype and device
    takes no time. An index along the first axis reads only the rows that it names; any other
    operation reads all rows into a temporary tensor. Results are plain tensors. The view itself
    cannot be written to. A pickled or copied view becomes a plain tensor with only its own rows.

    >>> from perdure.data import digits, split
    >>> stream = split(digits(), scenario="class", experiences=5)
    >>> stream[0].train.inputs[:2].shape
    torch.Size([2, 1, 8, 8])
    """

    parts: tuple[RowPart, ...]

    @staticmethod
    def __new__(cls: type[Self], parts: Sequence[RowPart]) -> Self:
        """Make a view of consecutive parts, whose rows have the same shape and dtype."""
        first = parts[0]
        # a change may give another shape or dtype, so apply it to a single row
        like = first.between(0, 1) if first.change else first.source
        shape = (sum(map(len, parts)), *like.shape[1:])
        view: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        view.parts = tuple(parts)
        return view

    def at(self, positions: Tensor) -> Tensor:
        """Read the rows at positions (k,), int64, none negative."""
        if len(self.parts) == 1:
            return self.parts[0].at(positions)
        lengths = torch.tensor([len(part) for part in self.parts], device=positions.device)
        ends = lengths.cumsum(0)
        which = torch.bucketize(positions, ends, right=True)
        rows = self.new_empty(len(positions), *self.shape[1:])
        for number, part in enumerate(self.parts):
            here = (which == number).nonzero().flatten()
            if len(here):
                own = positions.index_select(0, here) - (ends[number] - lengths[number])
                rows.index_copy_(0, here, part.at(own))
        return rows

    def between(self, start: int, stop: int) -> Tensor:
        """Read the rows from `start` up to `stop`."""
        if len(self.parts) == 1:
            return self.parts[0].between(start, stop)
        return self.at(torch.arange(start, max(start, stop), device=self.device))

    def rows(self) -> Tensor:
        """Read all rows."""
        return self.between(0, len(self))

    # ------------------------------------------------------------------ as a tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch; its results are plain tensors."""
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Read the rows that an operation needs, and run the operation on them."""
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                value = args[place] if place < len(args) else kwargs.get(argument.name)
                if isinstance(value, RowView) and argument.is_write:
                    raise DataError(NOT_WRITTEN)
        first = args[0] if args else None
        if isinstance(first, RowView):
            if func in FACTORIES:
                # a tensor of one number, expanded to the shape of the view
                blank = torch.empty((), dtype=first.dtype, device=first.device)
                return func(blank.expand(first.shape), *args[1:], **kwargs)
            if func is aten.detach.default:
                return RowView(first.parts)
            found = _some_rows(func, first, args[1:], kwargs)
            if found is not None:
                return found
        args, kwargs = pytree.tree_map_only(RowView, RowView.rows, (tuple(args), kwargs))
        return func(*args, **kwargs)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise DataError(NOT_WRITTEN)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"RowView(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.rows().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.rows().clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def numpy(self, *, force: bool = False) -> Any:
        """Read all rows into a NumPy array."""
        return self.rows().numpy(force=force)

    def tolist(self) -> Any:
        """Read all rows into lists."""
        return self.rows().tolist()


NOT_WRITTEN = (
    "this tensor shows rows of a larger data set and cannot be changed; change a copy instead: "
    "inputs.clone()"
)


def _some_rows(func: Any, view: RowView, args: Sequence[Any], kwargs: Any) -> Tensor | None:
    """Run an operation that needs only some of the rows; None if it needs all of them."""
    n = len(view)
    if func is aten.slice.Tensor:
        defaults: tuple[Any, ...] = (0, None, None, 1)
        dim, start, end, step = (*args, *defaults[len(args) :])
        if dim == 0 and step == 1 and not kwargs:
            first, last, _ = slice(start, end).indices(n)
            return view.between(first, max(first, last))
    elif func is aten.select.int and args[0] == 0:
        place = args[1] + n if args[1] < 0 else args[1]
        return view.between(place, place + 1)[0]
    elif func is aten.index_select.default and args[0] == 0:
        return view.at(args[1])
    elif func is aten.index.Tensor and len(args[0]) == 1 and args[0][0].dim() == 1:
        return view.at(positions_of(args[0][0], n).to(view.device))
    elif func is aten._to_copy.default and "memory_format" not in kwargs:
        # piece by piece, so that the CPU never holds everything that is moved to another device
        dtype = kwargs.get("dtype") or view.dtype
        moved = torch.empty(view.shape, dtype=dtype, device=kwargs.get("device") or view.device)
        for piece in row_slices(view, always=True):
            moved[piece] = view.between(piece.start, piece.stop)
        return moved
    return None


def positions_of(index: Tensor | slice, n: int) -> Tensor:
    """Return (k,) int64 positions that an index selects among n rows.

    Args:
        index: positions (k,), negative ones counted from the end, a boolean mask (n,), or a slice.
        n: number of rows.

    Raises:
        DataError: if a position does not exist, or a mask has another length.
    """
    if isinstance(index, slice):
        return torch.arange(n)[index]
    if index.dtype == torch.bool:
        if index.shape != (n,):
            raise DataError(
                f"a mask has shape {tuple(index.shape)}; allowed: ({n},), one per record"
            )
        return index.nonzero().flatten()
    positions = torch.where(index < 0, index + n, index)
    if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < n:
        wrong = int(index[(positions < 0) | (positions >= n)][0])
        raise DataError(
            f"position {wrong} does not exist among {n} records; allowed: {-n} to {n - 1}"
        )
    return positions


def rows_at(rows: Tensor, positions: Tensor) -> Tensor:
    """Read the rows at positions (k,), int64, none negative, on the device of the rows."""
    # not through torch's dispatcher, which would take time in each step
    return rows.at(positions) if isinstance(rows, RowView) else rows.index_select(0, positions)


def storages_of(rows: Tensor) -> set[int]:
    """Return the addresses of the storages that hold some rows; for a view, of its sources."""
    if isinstance(rows, RowView):
        return set().union(*(storages_of(part.source) for part in rows.parts))
    return {rows.untyped_storage().data_ptr()}


def addresses_of(rows: Tensor) -> Tensor:
    """Return (n,) int64 memory address of each row, on the CPU; 0 for a row without its own memory.

    For a view, these are the addresses in its source.
    """
    if isinstance(rows, RowView):
        found = [addresses_of(part.source) for part in rows.parts]
        return torch.cat(
            [
                own if part.index is None else own[part.index.cpu()]
                for own, part in zip(found, rows.parts, strict=True)
            ]
        )
    if not rows.numel() or not rows.stride(0):  # all rows of an expanded tensor have one address
        return torch.zeros(len(rows), dtype=torch.int64)
    return rows.data_ptr() + rows.stride(0) * rows.element_size() * torch.arange(len(rows))


def view_rows(rows: Tensor, positions: Tensor) -> Tensor:
    """Make a view of the rows at some positions; no rows are copied.

    Args:
        rows: (n, ...) tensor, which may be a view itself.
        positions: (k,) int64, none negative, on the device of the rows.
    """
    part = RowPart(source=rows)
    if isinstance(rows, RowView) and len(rows.parts) == 1:
        part = rows.parts[0]  # a view of a view becomes a view of the source
    index = positions if part.index is None else part.index.index_select(0, positions)
    run = _run(index)
    if run is None:
        return RowView([RowPart(source=part.source, index=index, change=part.change)])
    return RowView([RowPart(source=part.source[run], change=part.change)])


def _run(index: Tensor) -> slice | None:
    """Return a slice if the positions of an index are consecutive; else None."""
    if not len(index):
        return slice(0, 0)
    first = int(index[0])
    if int(index[-1]) - first + 1 != len(index) or not bool((index.diff() == 1).all()):
        return None
    return slice(first, first + len(index))


def changed_rows(rows: Tensor, change: Change) -> Tensor:
    """Return changed rows: computed now if they are small, and at each read if they are not.

    Args:
        rows: (n, ...) tensor.
        change: function that is applied to the rows.
    """
    changed = RowView([RowPart(source=rows, change=change)])
    held = max(rows.nbytes, changed.nbytes) <= HELD_BYTES
    return change(rows[:]) if held else changed


def joined_rows(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate rows (n_i, ...): into a copy if they are small, into a view if they are not.

    Parts with the same source become one index into this source.
    """
    if len(parts) == 1:
        return parts[0]
    if sum(part.nbytes for part in parts) <= HELD_BYTES:
        return torch.cat(list(parts))
    split = [
        piece
        for part in parts
        if len(part)
        for piece in (part.parts if isinstance(part, RowView) else [RowPart(source=part)])
    ]
    sources = {(id(piece.source), piece.change) for piece in split}
    if len(sources) == 1 and all(piece.index is not None for piece in split):
        index = torch.cat([piece.index for piece in split if piece.index is not None])
        return RowView([RowPart(source=split[0].source, index=index, change=split[0].change)])
    return RowView(split)
