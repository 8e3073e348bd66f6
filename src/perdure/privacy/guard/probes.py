"""Synthetic batches over the declared input domain, in pairs that share some of their rows.

A model that mixes records may do so for some inputs only: negative or large ones, sequences that
are longer than others, or batches above some size. So the guard compares batches in which one row
of every kind is *kept*, and all other rows are filled with one kind of values after another. The
shape stays the same, so on most machines the kept rows must give exactly the same numbers, and
rounding cannot explain a difference.

No such test proves independence; see `independence`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.data.domain import InputDomain
from perdure.errors import GuardError

UNDECLARED = 1e4
"""Largest absolute value of a synthetic input if no range is declared."""

LARGEST_NUMBERS = 2**20
"""Most numbers (4 MiB) of a large batch; such a batch may have fewer rows than expected."""

LARGEST_ROWS = 1024
"""Most rows of a large batch; larger steps are tested with one kind of other rows (`whole`)."""

MOST_NUMBERS = 2**27
"""Most numbers (512 MiB) of a whole batch; larger passes are refused if independence is tested."""

DEVIATIONS = 4
"""Standard deviations by which a Poisson-sampled batch is assumed to exceed its mean size."""

NOT_FINITE = {"not a number": torch.nan, "infinite": torch.inf}
"""Kinds of rows with NaN or infinity, by name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Neighbours:
    """Two batches of one shape that share the rows `kept` and differ in all others.

    Args:
        name: the difference in words, for messages.
        one: inputs (n, ...).
        other: inputs (n, ...).
        kept: positions of the shared rows.
    """

    name: str
    one: Tensor
    other: Tensor
    kept: Tensor

    def to(self, device: torch.device | str) -> "Neighbours":
        """Return the same batches on another device."""
        moved = (tensor.to(device) for tensor in (self.one, self.other, self.kept))
        one, other, kept = moved
        return Neighbours(name=self.name, one=one, other=other, kept=kept)


def domain_of(inputs: Tensor, declared: InputDomain | None) -> InputDomain:
    """Return the declared domain of the inputs; for floats without one, the widest domain.

    Args:
        inputs: (n, ...) tensor; only its shape and dtype are read.
        declared: domain that the records declare; None for none.

    Raises:
        GuardError: if the inputs are not floats and no domain is declared.
    """
    if declared is not None:
        return declared
    if inputs.is_floating_point():
        return InputDomain(shape=tuple(inputs.shape[1:]), dtype=inputs.dtype)
    raise GuardError(
        f"inputs are {inputs.dtype} without a declared domain, so the guard does not know which "
        "values are possible; allowed: floats, or a declared domain; give "
        "Records(domain=InputDomain(shape=..., dtype=..., vocabulary=...))"
    )


def kinds(domain: InputDomain, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """(n, *shape) rows of every kind of input, by the name of the kind; the first are random."""
    rows = _float_kinds(domain, n, generator) if domain.floats else _token_kinds(domain, n)
    return {"random": domain.random(n, generator)} | rows | _sequences(domain, n, generator)


def _float_kinds(domain: InputDomain, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    low, high = domain.range or (-UNDECLARED, UNDECLARED)
    shape = (n, *domain.shape)
    ends = torch.rand(shape, generator=generator) < 0.5
    normal = torch.randn(shape, generator=generator)
    rows = {
        "zero": torch.zeros(shape),
        "lowest": torch.full(shape, low),
        "highest": torch.full(shape, high),
        "constant": torch.full(shape, low + 0.37 * (high - low)),
        "lowest and highest": torch.where(ends, low, high),
        "positive and negative": normal,
        "negative": -3 * normal.abs(),
        "large": 100 * normal,
    }
    rows = {name: value.clamp(low, high) for name, value in rows.items()}
    # Such a record counts as zero; it may not change other rows or make the model fail.
    rows |= {name: torch.full(shape, value) for name, value in NOT_FINITE.items()}
    return {name: value.to(domain.dtype) for name, value in rows.items()}


def _token_kinds(domain: InputDomain, n: int) -> dict[str, Tensor]:
    assert domain.vocabulary is not None
    shape = (n, *domain.shape)
    values = {
        "zero": 0,
        "highest": domain.vocabulary - 1,
        "constant": domain.vocabulary // 2,
    }
    return {name: torch.full(shape, value).to(domain.dtype) for name, value in values.items()}


def _sequences(domain: InputDomain, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Rows of short, half and full sequences with padding after their end, by name."""
    if not domain.sequence_axes or not (domain.floats or domain.padding is not None):
        return {}
    rows = {}
    for name, share in (("short", 0.0), ("half as long", 0.5), ("full length", 1.0)):
        value = domain.random(n, generator)
        if not domain.floats:
            value = _without_padding(domain, value)
        for axis in domain.sequence_axes:
            length = domain.shape[axis]
            keep = max(1, round(share * length))
            value = value.narrow(axis + 1, 0, keep)
            pad = list(value.shape)
            pad[axis + 1] = length - keep
            filler = value.new_full(pad, domain.padding or 0)
            value = torch.cat([value, filler], axis + 1)
        rows[f"sequences, {name}"] = value
    return rows


def _without_padding(domain: InputDomain, tokens: Tensor) -> Tensor:
    """Return the tokens with every padding token replaced by another token."""
    assert domain.vocabulary is not None and domain.padding is not None
    other = (domain.padding + 1) % domain.vocabulary
    return torch.where(tokens == domain.padding, other, tokens)


def kept_rows(domain: InputDomain, generator: torch.Generator) -> Tensor:
    """Return (k, *shape) rows, one of every finite kind, and at least six in all."""
    # Without rows of NaN or infinity, which would make coupled rows NaN for any neighbours.
    one = [rows[:1] for name, rows in kinds(domain, 1, generator).items() if name not in NOT_FINITE]
    return torch.cat([*one, domain.random(max(1, 6 - len(one)), generator)])


def probe_rows(domain: InputDomain, generator: torch.Generator) -> Tensor:
    """Return (k, *shape) rows, one of every kind, including kinds with NaN or infinity."""
    return torch.cat(list(kinds(domain, 1, generator).values()))


def neighbours(
    domain: InputDomain, generator: torch.Generator, *, rows: int | None = None
) -> Iterator[Neighbours]:
    """Yield pairs of batches that share one row of every kind, and differ in all other rows.

    Args:
        domain: domain of the inputs.
        generator: random generator on the CPU.
        rows: number of rows of a batch. None for a small one, of more than 8 rows, which is tested
            with every kind of other rows; a larger batch is tested with the extreme kinds only.
    """
    kept = kept_rows(domain, generator)
    n = max(2 * len(kept), rows or 0)
    places = torch.linspace(0, n - 1, len(kept)).long() if rows else 2 * torch.arange(len(kept))
    fillers = kinds(domain, n, generator)
    one = fillers["random"].index_copy(0, places, kept)
    chosen = {
        "lowest",
        "zero",
        "highest",
        *NOT_FINITE,
        "sequences, short",
        "sequences, full length",
    }
    for name, filler in fillers.items():
        if name != "random" and (not rows or name in chosen):
            other = filler.index_copy(0, places, kept)
            yield Neighbours(name=name, one=one, other=other, kept=places)


def large_batch(domain: InputDomain, expected: float) -> int:
    """Number of rows of a batch of the expected size, limited by memory; 0 for a small batch."""
    size = max(1, domain.numel)
    return min(round(expected), LARGEST_ROWS, LARGEST_NUMBERS // size)


def whole_batch(domain: InputDomain, expected: float, at_once: float) -> int:
    """Number of rows of a batch as large as Poisson sampling can be expected to draw.

    Args:
        domain: domain of the inputs.
        expected: expected number of rows of a step.
        at_once: most rows of one pass through the model.

    Raises:
        GuardError: if the batch would have more than `MOST_NUMBERS` numbers.
    """
    rows = math.ceil(min(at_once, expected + DEVIATIONS * math.sqrt(expected)))
    most = MOST_NUMBERS // max(1, domain.numel)
    if rows > most:
        raise GuardError(
            f"a step may run {rows} records at once through code that is only tested, but the "
            f"guard can test batches of at most {most} such records; set micro_batch_size to "
            f"{most} or less, which changes neither the training nor the privacy cost"
        )
    return rows


def whole(domain: InputDomain, generator: torch.Generator, rows: int) -> Neighbours:
    """Build two batches with `rows` rows that share one row of every kind.

    All other rows are random in the first batch, and extreme in the second.
    """
    kept = kept_rows(domain, generator)
    rows = max(rows, len(kept))
    places = torch.linspace(0, rows - 1, len(kept)).long()
    one = domain.random(rows, generator)
    if domain.floats:
        low, high = domain.range or (-UNDECLARED, UNDECLARED)
        other = torch.rand((rows, *domain.shape), generator=generator).sub_(0.3).sign_()
        other = other.mul_((high - low) / 2).add_((high + low) / 2).to(domain.dtype)
    else:
        assert domain.vocabulary is not None
        other = torch.full_like(one, domain.vocabulary - 1)
    return Neighbours(
        name="extreme, the whole batch",
        one=one.index_copy_(0, places, kept),
        other=other.index_copy_(0, places, kept),
        kept=places,
    )
