"""Sums of squared or absolute per-record gradients.

They are used for Fisher information and memory aware synapses.

Without privacy they are summed layer by layer (see `layer_sums`). With privacy they are summed
without rows if all layers are linear. The gradient of a linear layer is d a^T, with a the input and
d the gradient at the output. So its square is the outer product of d^2 and a^2, the sum over terms
is a sum over d^2 only, and a record's norm is |sum_k w_k d_k^2| |a^2|. The same holds for the
absolute value, with |d| and |a|.

This is the complete gradient only if the losses depend on a weight through the layer's own call and
nothing else. In other cases (tied weights, `F.linear(z, layer.weight.T)`, a replaced `forward`) the
rows are formed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perdure.contract.forward import Forward
from perdure.data.records import Batch, batch_of_one
from perdure.privacy.clipping.clip import Clip, per_pass
from perdure.privacy.clipping.rules.base import sum_of
from perdure.privacy.clipping.tape import escapes, runs_as_built, taped
from perdure.queries.evaluation import SummedQuery
from perdure.queries.layer_sums import Terms, sum_by_layers, tapped
from perdure.queries.per_record import CHUNK, add_to, clipped_row_sum, exact_row_sum
from perdure.queries.unrolled_recurrence import unrolled_recurrence
from perdure.types import Params
from perdure.utils.chunking import filled_chunks

Outer = dict[str, tuple[Tensor, Tensor]]
"""Layer to (u (n, out), v (n, in)): record i's row is u_i v_i^T for the weight and u_i for the
bias.
"""


@dataclass(frozen=True)
class SquaredGradient(SummedQuery):
    """Weighted sum over terms k of the squared gradient, for each record.

    sum_k w_k (d l_k / d theta)^2

    With l_k = -log p_k and w_k = p_k over the classes k, this is the contribution of the record to
    the diagonal of the Fisher matrix.

    Guarantee: the row of a record depends on that record alone, because it is evaluated in a batch
    of one, under `torch.func.vmap`.

    Args:
        terms: function from (forward, batch) to losses l (n, k) and weights w (n, k).
    """

    terms: Terms

    def __call__(self, forward: Forward, batch: Batch) -> Params:
        """Rows by parameter name, (n, *parameter shape)."""
        params = forward.params or dict(forward.module.named_parameters())

        def one(tensors: Mapping[str, Tensor]) -> Params:
            return self._row_of_one(forward.module, params, tensors)

        return torch.func.vmap(one)(batch.tensors())

    def size_of(self, values: Tensor) -> Tensor:
        """Square each number; the shape (...) does not change.

        The size of a product is the product of the factors' sizes.
        """
        return values.square()

    @torch.no_grad()
    def exact_sum(self, forward: Forward, batch: Batch, chunk: int) -> Params:
        """Sum of the rows without privacy; `summed` computes it if it supports the model.

        A model that does not run under `torch.func.vmap` runs on one record after another, because
        without privacy nothing has to be hidden.
        """
        module = forward.module
        params = forward.params or {name: p.detach() for name, p in module.named_parameters()}
        with unrolled_recurrence(module):
            try:
                total = self.summed(module, params, batch.tensors())
                # few at a time, because each row is as large as the parameters
                return total or exact_row_sum(self, forward, batch, min(chunk, per_pass(params)))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                return self._sum_one_by_one(module, params, batch.tensors())

    def _sum_one_by_one(
        self, module: nn.Module, params: Params, tensors: Mapping[str, Tensor]
    ) -> Params:
        """Sum of the rows, without `torch.func.vmap`."""
        sums: Params = {}
        for place in range(len(tensors["labels"])):
            record = {name: value[place] for name, value in tensors.items()}
            for name, value in self._row_of_one(module, params, record).items():
                add_to(sums, name, value)
        return sums

    def _row_of_one(
        self, module: nn.Module, params: Params, tensors: Mapping[str, Tensor]
    ) -> Params:
        """Row of one record, by parameter name."""
        row, _ = self._sizes(lambda p: (Forward(module, p), {}), params, tensors)
        return row

    def clipped_sum(
        self, module: nn.Module, params: Params, tensors: Mapping[str, Tensor], clip: Clip
    ) -> Params | None:
        """Sum of the clipped rows; each row is computed if `summed` does not support the model."""
        total = self.summed(module, params, tensors, clip)
        return total or clipped_row_sum(self, module, params, tensors, clip)

    # only the terms use gradients; otherwise a graph for a second derivative is kept
    @torch.no_grad()
    def summed(
        self,
        module: nn.Module,
        params: Params,
        tensors: Mapping[str, Tensor],
        clip: Clip | None = None,
    ) -> Params | None:
        """Sum the rows, clipped if `clip` is given.

        Args:
            module: the model.
            params: parameters of the model by name.
            tensors: the records, name to (n, ...).
            clip: bound on each row; None for no bound.

        Returns:
            One sum per parameter, in the parameter's shape. None if there are no records; without
            `clip`, also if `sum_by_layers` does not support the model; with `clip`, also if rows
            are not outer products (see `outer_layers`).
        """
        if clip is None:
            return sum_by_layers(self.terms, self.size_of, module, params, tensors)
        layers = self.outer_layers(module, params, tensors)
        if not layers:
            return None
        total = None
        for piece, count in filled_chunks(tensors, CHUNK):
            outer = self._outer(module, layers, params, piece)
            if outer is None:
                return None
            part = _sums(layers, first_rows(outer, count), clip)
            total = (
                part
                if total is None
                else {name: total[name] + value for name, value in part.items()}
            )
        return total and {name: total[name] for name in params}

    def _sizes(
        self,
        at: Callable[[Params], tuple[Forward, Params]],
        point: Params,
        tensors: Mapping[str, Tensor],
    ) -> tuple[Params, Params]:
        """Compute sum_k w_k size(d l_k / d point) for one record; also return the mapping of `at`.

        Args:
            at: function from the point to the model with these tensors, and to a mapping that is
                filled while the model runs.
            point: tensors with respect to which the losses are differentiated.
            tensors: one record.
        """

        def alone(p: Params) -> tuple[Tensor, tuple[Tensor, Params]]:
            forward, kept = at(p)
            losses, weights = self.terms(forward, batch_of_one(tensors))
            return losses[0], (weights[0].detach(), kept)

        losses, pull, (weights, kept) = torch.func.vjp(alone, point, has_aux=True)  # type: ignore[misc]
        sums = {name: torch.zeros_like(value) for name, value in point.items()}
        for weight, term in zip(weights, torch.eye(len(losses)).to(losses), strict=True):
            sums = {
                name: sums[name] + weight * self.size_of(gradient)
                for name, gradient in pull(term)[0].items()
            }
        return sums, kept

    def outer_layers(
        self, module: nn.Module, params: Params, tensors: Mapping[str, Tensor]
    ) -> dict[str, nn.Linear] | None:
        """Find the linear layers of a model whose rows are outer products.

        One blank record is run to find the calls.

        Args:
            module: the model.
            params: parameters of the model by name.
            tensors: the records, name to (n, ...); only shapes and dtypes are used.

        Returns:
            Layers by name. None if another module has a parameter, or if the losses depend on a
            parameter in another way than through one call of the unchanged method of its layer.
        """
        layers = linear_layers(module)
        if not layers or not all(map(runs_as_built, layers.values())):
            return None
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        blank = {name: value.new_zeros(1, *value.shape[1:]) for name, value in tensors.items()}
        with torch.enable_grad(), taped(layers, leaves) as tape:
            losses, _ = self.terms(Forward(module, leaves), Batch.from_tensors(blank))
            total = losses.sum()
        calls = [call for call in tape if call is not None and call.stands]
        whole = len(calls) == len(tape) and sorted(c.layer for c in calls) == sorted(layers)
        return layers if whole and not escapes(total, calls, leaves) else None

    def _outer(
        self,
        module: nn.Module,
        layers: Mapping[str, nn.Linear],
        params: Params,
        tensors: Mapping[str, Tensor],
    ) -> Outer | None:
        """Rows as outer products, for all records of `tensors`.

        None if a layer is not called exactly once, with one vector per record.
        """
        with tapped(layers) as tap:

            def one(params: Params, tensors: Mapping[str, Tensor]) -> tuple[Params, Params]:
                shifts = {
                    f"{name}/0": layer.weight.new_zeros(1, layer.out_features)
                    for name, layer in layers.items()
                }
                return self._sizes(
                    lambda p: (Forward(module, params), tap.start_pass(p)), shifts, tensors
                )

            backs, entered = torch.func.vmap(one, in_dims=(None, 0))(params, dict(tensors))
        once = sorted((name, (1, layer.out_features)) for name, layer in layers.items())
        if sorted(tap.calls) != once or any(value.dim() != 3 for value in entered.values()):
            return None
        return {
            name: (backs[f"{name}/0"][:, 0], self.size_of(entered[f"{name}/0"][:, 0]))
            for name in layers
        }


class AbsoluteGradient(SquaredGradient):
    """Weighted sum over terms k of the absolute gradient, for each record.

    sum_k w_k |d l_k / d theta|

    With one term, the row of a record has the norm of the gradient.

    Guarantee: the row of a record depends on that record alone, as in `SquaredGradient`.
    """

    def size_of(self, values: Tensor) -> Tensor:
        """Return the absolute value of each number; the shape (...) does not change."""
        return values.abs()


def first_rows(outer: Outer, count: int) -> Outer:
    """Return the outer products of the first `count` records."""
    return {name: (u[:count], v[:count]) for name, (u, v) in outer.items()}


def _sums(layers: Mapping[str, nn.Linear], outer: Outer, clip: Clip) -> Params:
    """Sum of the clipped rows, by parameter name."""
    outer = clipped_outer(layers, outer, clip)
    sums = {f"{name}.weight": u.T @ v for name, (u, v) in outer.items()}
    return sums | {
        f"{name}.bias": u.sum(0) for name, (u, _) in outer.items() if layers[name].bias is not None
    }


def clipped_outer(layers: Mapping[str, nn.Linear], outer: Outer, clip: Clip | None) -> Outer:
    """Scale outer products so that each record's row is clipped; unchanged without a clip.

    Scaled outer products are in float64: over many records, sums in float32 change by more than
    the clip norm.
    """
    if clip is None:
        return outer
    outer = {name: (u.double(), v.double()) for name, (u, v) in outer.items()}
    biased = {name: float(layer.bias is not None) for name, layer in layers.items()}
    squares = {
        n: u.square().sum(1) * (v.square().sum(1) + biased[n]) for n, (u, v) in outer.items()
    }
    factors = clip.factors(squares)
    known = torch.isfinite(sum_of(list(squares.values())))[:, None]
    return {
        name: (torch.where(known, u, 0.0) * factors[name][:, None], torch.where(known, v, 0.0))
        for name, (u, v) in outer.items()
    }


def linear_layers(module: nn.Module) -> dict[str, nn.Linear] | None:
    """Return the linear layers by name, if they have all parameters of the model, all trained.

    None if another module has a parameter, two layers share one, a parameter does not require a
    gradient, or a layer has other parameters than weight and bias.
    """
    linear = {name: layer for name, layer in module.named_modules() if type(layer) is nn.Linear}
    # Layers of a frozen body have buffers instead of parameters, so no gradient is squared.
    layers = {name: layer for name, layer in linear.items() if list(layer.parameters())}
    # other parameters may determine a weight (torch.nn.utils.weight_norm)
    if any(_own_names(layer) not in ({"weight"}, {"weight", "bias"}) for layer in layers.values()):
        return None
    owned = {
        f"{name}.{parameter}"
        for name, layer in layers.items()
        for parameter, _ in layer.named_parameters()
    }
    trained = {name for name, value in module.named_parameters() if value.requires_grad}
    return layers if owned == trained == {name for name, _ in module.named_parameters()} else None


def _own_names(layer: nn.Module) -> set[str]:
    return {name for name, _ in layer.named_parameters()}
