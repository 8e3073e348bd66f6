"""What may be asked of a curator: functions that give one row per record."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perdure.privacy.clipping import Rows, chunks
from perdure.records import Batch, Params
from perdure.strategy import Forward

Query = Callable[[Forward, Batch], Tensor | Params]
"""(forward, batch) -> (n, ...) or a mapping of such; row i must depend on record i only."""


@dataclass(frozen=True)
class SquaredGradient:
    """Per record, the weighted sum over terms k of the squared gradient: sum_k w_k (d l_k / d theta)^2.

    With l_k = -log p_k and w_k = p_k over the classes this is the record's share of the diagonal Fisher matrix.

    Args:
        terms: (forward, batch) -> (losses (n, k), weights (n, k)); weights carry no gradient.
    """

    terms: Callable[[Forward, Batch], tuple[Tensor, Tensor]]

    def __call__(self, forward: Forward, batch: Batch) -> Params:
        """Rows by parameter name, (n, *parameter shape)."""
        params = forward.params or dict(forward.module.named_parameters())

        def one(tensors: Mapping[str, Tensor]) -> Params:
            def alone(p: Params) -> tuple[Tensor, Tensor]:
                losses, weights = self.terms(Forward(forward.module, p), batch_of_one(tensors))
                return losses[0], weights[0].detach()

            losses, pull, weights = torch.func.vjp(alone, params, has_aux=True)  # type: ignore[misc]
            sums: Params = {}
            for weight, term in zip(weights, torch.eye(len(losses)).to(losses), strict=True):
                for name, gradient in pull(term)[0].items():
                    _add(sums, name, weight * gradient.square())
            return sums

        return torch.func.vmap(one)(batch.tensors())

    def total(self, forward: Forward, batch: Batch) -> Params | None:
        """Exact sum over the batch without forming rows, for models made of linear layers; else None.

        For a linear layer the gradient of record i is the outer product of what left it backwards, d_i, and what
        entered it, a_i; so the sum of squares is (d*d)^T (a*a): one matrix product a term.
        """
        layers = linear_layers(forward.module)
        if layers is None or forward.params is not None:
            return None
        with _taped(layers) as tape:
            losses, weights = self.terms(forward, batch)
        if sorted(name for name, _, _ in tape) != sorted(layers) or any(a.dim() != 2 for _, a, _ in tape):
            return None
        sums: Params = {}
        for k in range(losses.shape[1]):
            deltas = torch.autograd.grad(losses[:, k].sum(), [out for _, _, out in tape], retain_graph=True)
            for (name, entered, _), delta in zip(tape, deltas, strict=True):
                weighted = weights[:, k, None].detach() * delta.square()
                _add(sums, f"{name}.weight", weighted.T @ entered.square())
                if layers[name].bias is not None:
                    _add(sums, f"{name}.bias", weighted.sum(0))
        return {name: sums[name] for name, _ in forward.module.named_parameters()}


def batch_of_one(tensors: Mapping[str, Tensor]) -> Batch:
    """Wrap the tensors of one record (no batch dimension) as a batch of one row."""
    return Batch.from_tensors({name: value.unsqueeze(0) for name, value in tensors.items()})


def rows_of(query: Query, module: nn.Module) -> Rows:
    """Evaluate the query on each record alone, so that no row can depend on another record."""

    def rows(params: Params, tensors: Mapping[str, Tensor]) -> Params:
        answer = as_params(query(Forward(module, params), batch_of_one(tensors)))
        return {name: value[0] for name, value in answer.items()}

    return rows


def gradient_rows(losses: Callable[[Forward, Batch], Tensor], module: nn.Module) -> Rows:
    """Gradient of one record's loss, the record alone in its batch."""

    def loss(params: Params, tensors: Mapping[str, Tensor]) -> Tensor:
        return losses(Forward(module, params), batch_of_one(tensors)).squeeze(0)

    return torch.func.grad(loss)


def as_params(answer: Tensor | Params) -> Params:
    """Give a bare tensor the name `value`."""
    return {"value": answer} if isinstance(answer, Tensor) else answer


def exact_sum(query: Query, forward: Forward, batch: Batch, chunk: int) -> Params:
    """Sum of the query's rows over the batch, in pieces of at most `chunk` records."""
    total: Params = {}
    for piece in chunks(batch.tensors(), chunk):
        part = Batch.from_tensors(piece)
        whole = query.total(forward, part) if isinstance(query, SquaredGradient) else None
        sums = whole or {name: rows.sum(0) for name, rows in as_params(query(forward, part)).items()}
        for name, value in sums.items():
            _add(total, name, value.detach())
    return total


def linear_layers(module: nn.Module) -> dict[str, nn.Linear] | None:
    """Return the linear layers by name, or None when a parameter belongs to anything else, is shared or frozen."""
    layers = {name: layer for name, layer in module.named_modules() if type(layer) is nn.Linear}
    owned = {f"{name}.{own}" for name, layer in layers.items() for own, _ in layer.named_parameters()}
    trained = {name for name, value in module.named_parameters() if value.requires_grad}
    return layers if owned == trained == {name for name, _ in module.named_parameters()} else None


@contextmanager
def _taped(layers: Mapping[str, nn.Linear]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Record (name, input, output) of every call of the layers."""
    tape: list[tuple[str, Tensor, Tensor]] = []

    def listen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, entered, left: tape.append((name, entered[0].detach(), left))

    handles = [layer.register_forward_hook(listen(name)) for name, layer in layers.items()]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def _add(sums: Params, name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
