"""Clipped sums by a loop of autograd over records, written without the library's clipping."""

import math

import torch
import torch.nn.functional as F

from perdure.contract.forward import Forward
from perdure.data.records import Batch, Records
from perdure.privacy.clipping.clip import Clip, layer_of
from perdure.queries.batch_gradients import clipped_gradient

TOLERANCE = 2e-5


def cross_entropies(forward, batch):
    return F.cross_entropy(forward(batch.inputs).flatten(1), batch.labels, reduction="none")


def batch_of(x, classes=3):
    return Batch.current(Records(inputs=x, labels=torch.arange(len(x)) % classes), 0)


def rows_by_loop(model, batch, losses=cross_entropies):
    """Return the gradient of every record, alone in its batch, by parameter name."""
    params = dict(model.named_parameters())
    rows = []
    for i in range(len(batch)):
        loss = losses(Forward(model), batch.take(slice(i, i + 1))).sum()
        grads = torch.autograd.grad(
            loss, list(params.values()), allow_unused=True, materialize_grads=True
        )
        rows.append({n: g.double() for n, g in zip(params, grads, strict=True)})
    return rows


def clipped_by_hand(rows, norm, per_layer=False):
    """Return the sum of rows, each scaled to the clip norm, or each layer to its share."""
    layers = {layer_of(name) for name in rows[0]} if per_layer else {None}
    bound = norm / math.sqrt(len(layers))
    total = {name: torch.zeros_like(value) for name, value in rows[0].items()}
    for row in rows:
        for layer in layers:
            own = [n for n in row if layer is None or layer_of(n) == layer]
            length = math.sqrt(sum(float(row[n].square().sum()) for n in own))
            for n in own:
                total[n] += row[n] * min(1.0, bound / max(length, 1e-30))
    return total


def size(total):
    return math.sqrt(sum(float(value.double().square().sum()) for value in total.values()))


def gap(one, other):
    """Return the distance of two sums relative to the second."""
    assert list(one) == list(other)
    return size({n: one[n].double() - other[n].double() for n in one}) / size(other)


def gap_to_loop(model, x, losses=cross_entropies, *, classes=3, per_layer=False):
    """Return the relative distance of the library's clipped sum from the loop's, with some records
    clipped.
    """
    batch = batch_of(x, classes)
    rows = rows_by_loop(model, batch, losses)
    norm = sorted(size(row) for row in rows)[len(rows) // 2]
    clip = Clip(norm=norm, per_layer=per_layer)
    params = dict(model.named_parameters())
    total = clipped_gradient(Forward(model), losses, params, batch, clip, None)
    return gap(total, clipped_by_hand(rows, norm, per_layer))
