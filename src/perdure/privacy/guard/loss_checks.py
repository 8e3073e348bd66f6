"""Tests of losses and layers on synthetic records: remove a record, or change its neighbours."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from perdure.errors import GuardError
from perdure.utils.seeding import seed_globally, undisturbed

SyntheticLosses = Callable[[Tensor, Tensor], Tensor]
"""Function from inputs (n, ...) and other values of each row, such as labels (n,), to (n,) losses.
"""

TOLERANCE = 1e-4
"""Relative change of a record's loss that rounding in a batch of another shape can explain."""

ROUNDING = 1e-2
"""Relative change of a layer's rows that is explained by ReLUs which rounding switches."""

ONE_BY_ONE = 'give Privacy(custom_forward="record-by-record")'
"""Advice at the end of messages about code that couples the records of a batch."""


# --------------------------------------------------------------------------- losses


def quiet_training(model: nn.Module) -> None:
    """Put the model into training mode with dropout off, so that the tests are deterministic.

    Layers that mix records only in training mode are then seen too.
    """
    for module in model.train().modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()


def check_losses(losses: SyntheticLosses, inputs: Tensor, labels: Tensor, what: str) -> None:
    """Refuse losses that change for the other records if one record is removed.

    Each record's loss must be the same alone, in the batch, and in a smaller batch.

    Args:
        losses: function from inputs and labels to losses.
        inputs: (n, ...) inputs of synthetic records.
        labels: (n,) labels.
        what: name of the losses, for the message.

    Raises:
        GuardError: if the loss couples records or does not give one loss per record.
    """
    n = len(inputs)
    with undisturbed():
        seed_globally(0)
        whole = losses(inputs, labels).detach()
        if whole.shape != (n,):
            raise GuardError(
                f"{what} gives shape {tuple(whole.shape)} for {n} records; return one loss "
                "per record, "
                "with reduction='none'"
            )
        seed_globally(0)
        fewer = losses(inputs[:-1], labels[:-1]).detach()
        alone = torch.cat([losses(inputs[i : i + 1], labels[i : i + 1]).detach() for i in range(n)])
    scale = whole.abs().clamp(min=1.0)
    moved = torch.maximum(
        ((whole - alone) / scale).abs(), ((whole[:-1] - fewer) / scale[:-1]).abs().max()
    )
    if not bool((moved < TOLERANCE).all()):
        raise GuardError(
            f"{what} couples records: removing one record changed the loss of another by "
            f"{float(moved.max()):.2g} of its value; compute each row from that row only (no "
            "batch means, class-weighted means or in-batch negatives; no randomness except "
            f"torch.nn.Dropout), or {ONE_BY_ONE}"
        )


# --------------------------------------------------------------------------- layers


def check_rows(
    model: nn.Module, losses: SyntheticLosses, inputs: Tensor, labels: Tensor, what: str
) -> None:
    """Refuse a layer that mixes records, by changing one record and by removing one.

    Row i of a layer's input, and of the gradient at its output, must belong to record i.

    Book-keeping computes per-record gradients from the rows of a layer, so its bound depends on
    this. A layer with inputs (length, n, features) fails, because it would mix records in a batch
    whose size equals the length. So does a backward pass that mixes records, which no test of the
    losses can see. Layers with one row in all, or with k > 1 rows per record, pass: their rows are
    never taken for those of several records.

    Args:
        losses: function that runs `model`, in training mode without dropout (see `quiet_training`).
        inputs: (n, ...) inputs of synthetic records, at least 3.
        labels: (n,) labels.
        what: name of the losses, for the message.

    Raises:
        GuardError: names the layer.
    """
    n = len(inputs)
    whole = layer_calls(model, losses, inputs, labels)
    fewer = layer_calls(model, losses, inputs[:-1], labels[:-1])
    if [call[0] for call in whole] != [call[0] for call in fewer]:
        raise GuardError(
            f"{what} calls different layers if one record is removed; compute each row from that "
            f"row only, or {ONE_BY_ONE}"
        )
    for (name, rows, _), (_, rows_of_fewer, _) in zip(whole, fewer, strict=True):
        if rows * rows_of_fewer != 1 and (rows * (n - 1) != rows_of_fewer * n or rows < n):
            raise GuardError(
                f"layer {name} gives {rows} rows for {n} records and {rows_of_fewer} for "
                f"{n - 1} in {what}; pass all "
                "records at once and put them first: batch_first=True, positions as (n, length), "
                f"or {ONE_BY_ONE}"
            )
    kept = torch.arange(n)
    _compare(whole, fewer, kept[:-1], what, ROUNDING)
    for i in range(n):
        changed = inputs.clone()
        changed[i] = inputs[(i + 1) % n]
        _compare(
            whole, layer_calls(model, losses, changed, labels), kept[kept != i], what, TOLERANCE
        )


LayerRows = tuple[str, int, dict[str, Tensor]]
"""Name of a layer, number of rows of its output in one call, and two tensors.

The tensors are the input of the layer and the gradient at its output, records first.
"""


def layer_calls(
    model: nn.Module, losses: SyntheticLosses, inputs: Tensor, labels: Tensor
) -> list[LayerRows]:
    """Differentiable calls of the innermost layers with parameters, in the order of the calls."""
    heard: list[tuple[str, nn.Module, Tensor, Any]] = []
    handles = [
        _listen(name, layer, heard) for name, layer in model.named_modules() if _innermost(layer)
    ]
    try:
        with undisturbed():
            seed_globally(0)
            total = losses(inputs, labels).sum()
    finally:
        for handle in handles:
            handle.remove()
    outputs = [left for _, _, left, _ in heard]
    backs = (
        torch.autograd.grad(total, outputs, allow_unused=True, materialize_grads=True)
        if outputs
        else ()
    )
    return [_call(*call, back) for call, back in zip(heard, backs, strict=True)]


def _call(name: str, layer: nn.Module, left: Tensor, entered: Any, back: Tensor) -> LayerRows:
    dim = 0 if getattr(layer, "batch_first", True) else 1
    parts = {"gradient": back.movedim(dim, 0)}
    if isinstance(entered, Tensor) and entered.shape[dim : dim + 1] == left.shape[dim : dim + 1]:
        parts["input"] = entered.detach().movedim(dim, 0)
    return name, left.shape[dim], parts


def _innermost(layer: nn.Module) -> bool:
    below = (param for child in layer.children() for param in child.parameters())
    return any(True for _ in layer.parameters(recurse=False)) and not any(True for _ in below)


def _listen(
    name: str, layer: nn.Module, heard: list[tuple[str, nn.Module, Tensor, Any]]
) -> RemovableHandle:
    def hook(_: nn.Module, entered: tuple[Any, ...], left: Any) -> None:
        # skip parametrisations, which have no inputs and return a weight
        if entered and isinstance(left, Tensor) and left.requires_grad and left.dim():
            heard.append((name or "model", layer, left, entered[0]))

    return layer.register_forward_hook(hook)


def _compare(
    whole: list[LayerRows], other: list[LayerRows], rows: Tensor, what: str, tolerance: float
) -> None:
    """Refuse a layer whose kept `rows` differ between two runs with a different other record."""
    for (name, n, parts), (_, _, others) in zip(whole, other, strict=True):
        for part, value in parts.items() if n == len(rows) + 1 else ():
            mine = value[rows].double()
            theirs = others[part][rows].double()
            moved = float((mine - theirs).norm() / mine.norm().clamp(min=1e-30))
            if not moved < tolerance:
                raise GuardError(
                    f"layer {name} mixes records in {what}: a change of one record changed the "
                    f"{part} of another by {moved:.2g} of its size; compute each row from that "
                    "row only, in the forward and the backward pass, keep the records as first "
                    f"axis and in order, or {ONE_BY_ONE}"
                )
