"""Gradients of all records, added up per group of records in one sum.

The row of a record has its gradient at the index of its group and 0 at all others, so its norm is
the norm of one gradient for any number of groups. Such rows, as large as one gradient per group,
are never formed: a gradient is clipped and then added to the sum of its group. If all layers are
linear, the gradient is not formed either.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perdure.contract.forward import Forward
from perdure.data.records import Batch, batch_of_one
from perdure.privacy.clipping.clip import Clip, per_pass, scaled, squared_norms
from perdure.queries.per_record import CHUNK
from perdure.queries.squared_gradients import Outer, SquaredGradient, clipped_outer, first_rows
from perdure.types import Params
from perdure.utils.chunking import filled_chunks


@dataclass(frozen=True)
class GroupedGradient(SquaredGradient):
    """Sum of gradients per group of records, (groups, *parameter shape).

    The row of a record is the weighted sum of the gradients of its terms, at the index of the
    record's group; all other entries are 0.

    Guarantee: the row and the group of a record depend on that record alone, because they are
    evaluated in a batch of one, under `torch.func.vmap`. The row has the norm of the gradient.

    Args:
        group: function batch -> (n,) whole numbers from 0 to `groups` - 1. A record with another
            number is in no group, and its row is 0.
        groups: number of groups.
    """

    group: Callable[[Batch], Tensor]
    groups: int

    def __call__(self, forward: Forward, batch: Batch) -> Params:
        """Rows by parameter name, (n, groups, *parameter shape).

        These rows are long; the sum is computed without them.
        """
        params = forward.params or dict(forward.module.named_parameters())

        def one(tensors: Mapping[str, Tensor]) -> Params:
            return self._row_of_one(forward.module, params, tensors)

        return torch.func.vmap(one)(batch.tensors())

    def _row_of_one(
        self, module: nn.Module, params: Params, tensors: Mapping[str, Tensor]
    ) -> Params:
        here = torch.arange(self.groups, device=tensors["labels"].device) == self._place(tensors)
        row = self._row(module, params, tensors)
        return {
            n: torch.where(here.view(-1, *[1] * value.dim()), value, 0.0)
            for n, value in row.items()
        }

    def size_of(self, values: Tensor) -> Tensor:
        """Return the values unchanged, because gradients are summed with their signs."""
        return values

    @torch.no_grad()
    def summed(
        self,
        module: nn.Module,
        params: Params,
        tensors: Mapping[str, Tensor],
        clip: Clip | None = None,
    ) -> Params | None:
        """Sum of the rows, clipped if `clip` is given; None if there are no records.

        It needs memory for the sum and for the gradients of a few records (see `per_pass`).
        """
        if not len(tensors["labels"]):
            return None
        layers = self.outer_layers(module, params, tensors)
        # one more group for records without a group; float64 if clipped (see `clipped_outer`)
        wide = None if clip is None else torch.float64
        sums = {
            name: value.new_zeros(self.groups + 1, *value.shape, dtype=wide)
            for name, value in params.items()
        }
        for piece, count in filled_chunks(tensors, CHUNK, fill=clip is not None):
            outer = self._outer(module, layers, params, piece) if layers else None
            if layers and outer is not None:
                own = clipped_outer(layers, first_rows(outer, count), clip)
                _add_outer(sums, layers, own, self._places(piece)[:count])
            else:
                own_rows = {name: value[:count] for name, value in piece.items()}
                self._add_rows(sums, module, params, own_rows, clip)
        return {name: value[: self.groups] for name, value in sums.items()}

    def _add_rows(
        self,
        sums: Params,
        module: nn.Module,
        params: Params,
        tensors: Mapping[str, Tensor],
        clip: Clip | None,
    ) -> None:
        """Add the gradients of the records, a few at a time, to the sums of their groups."""
        for piece, count in filled_chunks(tensors, per_pass(params), fill=clip is not None):
            rows = torch.func.vmap(lambda record: self._row(module, params, record))(piece)
            rows = {name: value[:count] for name, value in rows.items()}
            if clip is not None:
                rows = {name: value.double() for name, value in rows.items()}
                rows = scaled(rows, clip.factors(squared_norms(rows)))
            places = self._places(piece)[:count]
            for name, total in sums.items():
                total.index_add_(0, places, rows[name])

    def _row(self, module: nn.Module, params: Params, tensors: Mapping[str, Tensor]) -> Params:
        """Compute the gradient of one record, by parameter name."""
        row, _ = self._sizes(lambda p: (Forward(module, p), {}), params, tensors)
        return row

    def _place(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Number of one record's group; `groups` if the record is in no group."""
        number = self.group(batch_of_one(tensors))[0]
        return torch.where((number >= 0) & (number < self.groups), number, self.groups).long()

    def _places(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.func.vmap(self._place)(dict(tensors))


def _add_outer(sums: Params, layers: Mapping[str, nn.Linear], outer: Outer, places: Tensor) -> None:
    """Add the records' gradients, given as outer products, to the sums of their groups."""
    order = places.argsort(stable=True)
    sizes = places.bincount(minlength=len(next(iter(sums.values())))).tolist()
    for name, (u, v) in outer.items():
        parts = zip(torch.split(u[order], sizes), torch.split(v[order], sizes), strict=True)
        for number, (left, right) in enumerate(parts):
            sums[f"{name}.weight"][number].addmm_(left.T, right)
            if layers[name].bias is not None:
                sums[f"{name}.bias"][number].add_(left.sum(0))
