"""Tests that losses, layers and features of a record do not depend on the rest of the batch.

The batches come from `probes`, over the declared input domain. Kept rows must have the same losses,
the same inputs and gradients in every layer and the same features for any other rows: in a small
batch, in one of the expected size, and alone.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from perdure.errors import GuardError, PerdureError
from perdure.privacy.guard.loss_checks import (
    ONE_BY_ONE,
    TOLERANCE,
    LayerRows,
    SyntheticLosses,
    layer_calls,
)
from perdure.privacy.guard.probes import Neighbours
from perdure.utils.seeding import seed_globally, undisturbed

ROUNDING_SHARE = 1e-3
"""Largest relative change of a record's loss between batch shapes that counts as rounding.

It applies only if a batch of equal rows changes as much.
"""


@contextmanager
def explained(what: str, probe: str) -> Iterator[None]:
    """Context manager that turns an exception of a model or loss into a GuardError.

    Args:
        what: name of the code that runs inside, for the message.
        probe: description of the synthetic inputs, for the message.
    """
    try:
        yield
    except PerdureError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GuardError(
            f"{what} fails on synthetic records ({probe}): {reason}; it must run on every record "
            "of the declared domain, Records(domain=InputDomain(...)), in batches of any size"
        ) from error


def check_neighbours(
    model: nn.Module,
    losses: SyntheticLosses,
    pairs: Iterable[Neighbours],
    facts: tuple[Tensor, Tensor],
    what: str,
    *,
    layers: bool,
) -> None:
    """Refuse losses and layers in which the shared rows of two batches depend on other rows.

    Args:
        model: model that the losses run.
        losses: losses of synthetic records.
        pairs: pairs of batches of one shape; all pairs share the first batch.
        facts: labels, or other facts, of every row in the first and in the second batch; shared
            rows have those of the first batch.
        what: name of the losses, for messages.
        layers: True to compare also the inputs of layers and the gradients at their outputs.

    Raises:
        GuardError: names the loss or layer that depends on other rows.
    """
    before: tuple[Tensor, list[LayerRows]] | None = None
    for pair in pairs:
        n = len(pair.one)
        other_facts = facts[1][:n].index_copy(0, pair.kept, facts[0][pair.kept])
        with explained(what, f"{n} rows, {pair.name}"):
            if before is None:
                before = _observed(model, losses, pair.one, facts[0][:n], layers)
            after = _observed(model, losses, pair.other, other_facts, layers)
        _compare_losses(before[0], after[0], pair, what)
        if layers:
            _compare_layers(before[1], after[1], pair, what)


def _observed(
    model: nn.Module, losses: SyntheticLosses, inputs: Tensor, facts: Tensor, layers: bool
) -> tuple[Tensor, list[LayerRows]]:
    """Return (n,) losses and, if `layers` is True, the calls of the layers."""
    seen: list[Tensor] = []

    def watched(x: Tensor, y: Tensor) -> Tensor:
        value = losses(x, y)
        seen.append(value.detach())
        return value

    if layers:
        calls = layer_calls(model, watched, inputs, facts)
        return seen[-1], calls
    with torch.no_grad(), undisturbed():
        seed_globally(0)
        watched(inputs, facts)
    return seen[-1], []


def _compare_losses(before: Tensor, after: Tensor, pair: Neighbours, what: str) -> None:
    n = len(pair.one)
    if before.shape != (n,) or after.shape != (n,):
        raise GuardError(
            f"{what} gives shape {tuple(before.shape)} for {n} records; return one loss per "
            "record, with reduction='none'"
        )
    one, other = before[pair.kept], after[pair.kept]
    moved = difference(one, other) / one.abs().nan_to_num(0, 0, 0).clamp(min=1.0)
    if not bool((moved < TOLERANCE).all()):
        raise coupled(what, pair, "loss", moved)


def coupled(what: str, pair: Neighbours, part: str, moved: Tensor) -> GuardError:
    """Build the error for a loss, layer or output that depends on the other rows of a batch."""
    return GuardError(
        f"{what} couples records: changing the other rows ({pair.name}) in a batch of "
        f"{len(pair.one)} changed the {part} of a record by {float(moved.max()):.2g} of its "
        "size; compute each row from that row only (no statistic over the batch, no length or "
        f"choice taken from it), or {ONE_BY_ONE}"
    )


def difference(one: Tensor, other: Tensor) -> Tensor:
    """Absolute difference of two tensors, 0 where both have the same infinity or NaN."""
    same = (one == other) | (one.isnan() & other.isnan())
    return torch.where(same, 0.0, (one - other).abs())


def _compare_layers(
    before: list[LayerRows], after: list[LayerRows], pair: Neighbours, what: str
) -> None:
    n = len(pair.one)
    if [call[:2] for call in before] != [call[:2] for call in after]:
        raise GuardError(
            f"{what} calls different layers if the other records of the batch change "
            f"({pair.name}); compute each row from that row only, without branches that depend on "
            "the batch"
        )
    for (name, rows, parts), (_, _, others) in zip(before, after, strict=True):
        if rows % n:  # one row for all records; the losses show its effect
            continue
        kept = torch.cat([pair.kept + start for start in range(0, rows, n)])
        for part, value in parts.items():
            moved = rows_moved(value[kept], others[part][kept])
            if not bool((moved < TOLERANCE).all()):
                raise coupled(f"layer {name} in {what}", pair, part, moved)


def rows_moved(one: Tensor, other: Tensor) -> Tensor:
    """Return (k,) length of the change of each row, relative to the length of the row.

    A row that is almost 0 compared with the other rows is measured relative to those.
    """
    before = one.double().flatten(1) if one.dim() > 1 else one.double()[:, None]
    after = other.double().flatten(1) if other.dim() > 1 else other.double()[:, None]
    sizes = before.nan_to_num(0, 0, 0).norm(dim=1)
    least = max(1e-6 * float(sizes.median()), 1e-30)
    moved: Tensor = difference(before, after).norm(dim=1) / sizes.clamp(min=least)
    return moved


def check_outputs(
    function: Callable[[Tensor], object], pairs: Iterable[Neighbours], what: str
) -> None:
    """Refuse a function of inputs (n, ...) if the rows that two batches share depend on others.

    Args:
        function: function that returns a tensor with one row per record; other results are not
            compared.
        pairs: pairs of batches that share some rows and differ in all others.
        what: name of the function, for messages.

    Raises:
        GuardError: names the function.
    """
    before: object = None
    for pair in pairs:
        with torch.no_grad(), explained(what, f"{len(pair.one)} rows, {pair.name}"):
            before = function(pair.one) if before is None else before
            after = function(pair.other)
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            return
        if before.shape != after.shape or len(before) != len(pair.one):
            raise coupled(what, pair, "shape", torch.ones(1))
        moved = rows_moved(before[pair.kept], after[pair.kept])
        if not bool((moved < TOLERANCE).all()):
            raise coupled(what, pair, "output", moved)


def check_alone(losses: SyntheticLosses, pair: Neighbours, facts: Tensor, what: str) -> None:
    """Refuse losses of the shared rows (`kept`) that differ if a record is alone in its batch.

    Kernels for other shapes round differently. A batch of copies of the row shows by how much,
    because in it only the number of rows can have an effect.

    Raises:
        GuardError: names the losses.
    """
    with torch.no_grad(), undisturbed():
        with explained(what, "in a batch"):
            seed_globally(0)
            whole = losses(pair.one, facts)
        for i in pair.kept.tolist():
            with explained(what, "1 row"):
                seed_globally(0)
                alone = losses(pair.one[i : i + 1], facts[i : i + 1])
            if alone.shape != (1,):
                raise GuardError(
                    f"{what} gives shape {tuple(alone.shape)} for 1 record; return (1,), one loss "
                    "per record"
                )
            scale = float(alone.abs().nan_to_num(0, 0, 0).clamp(min=1.0))
            moved = float(difference(whole[i], alone[0]))
            if moved < TOLERANCE * scale:
                continue
            if not moved < TOLERANCE * scale + _rounding(losses, pair, facts, i, alone[0]):
                raise coupled(what, pair, "loss", torch.tensor([moved / scale]))


def _rounding(
    losses: SyntheticLosses, pair: Neighbours, facts: Tensor, i: int, alone: Tensor
) -> float:
    """Largest change of a row's loss that the shape of the batch alone can explain."""
    n = len(pair.one)
    seed_globally(0)
    copies = losses(pair.one[i].expand(n, *pair.one.shape[1:]).contiguous(), facts[i].expand(n, -1))
    moved = float(difference(copies[i], alone))
    largest = float(pair.one[i].double().abs().max()) if pair.one[i].numel() else 0.0
    return 4 * moved if moved <= ROUNDING_SHARE * largest else 0.0
