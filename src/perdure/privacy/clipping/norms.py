"""L2 norms of per-record rows that do not overflow or underflow, for rows of any length.

If a norm is computed too small, the record is clipped too little. In float32 the square of a number
below 1e-19 is 0 (or has lost digits), and above 1.8e19 it is infinite. Before a normalisation
layer, inputs of length 1e19 come with gradients of length 1e-19: the square of the input is finite,
the square of the gradient is 0, and so is their product; but the gradient of the weight, whose norm
is the product of the two lengths, has norm 1.

So a norm is taken in float32 only if no digits can be lost, and in float64 in all other cases: a
square of a float32 number, and the product of two such squares, is far inside the range of float64.
Norms, clip factors and values computed from them are in float64, which is cheap for n numbers.
"""

import torch
from torch import Tensor

LONGEST = 2.0**80
"""Rows of a larger norm (1.2e24) count as infinite, and their records as zero.

It keeps later results in range, also on processors that treat denormal numbers as 0: these may
count as 0 in a norm and not in a sum, but such a number times a row is below 1e-13.
"""

SURE = (2.0**-40, 2.0**60)
"""Range of norms that are computed in float32: in it squares stay finite, and entries whose squares
are lost are too small to matter.
"""


def at_least_float32(x: Tensor) -> Tensor:
    """Convert to float32; a float64 tensor is returned unchanged."""
    return x if x.dtype == torch.float64 else x.float()


def at_least(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor to a precision, unless its own precision is wider."""
    return x.to(torch.promote_types(x.dtype, dtype))


def squared_row_norms(*tables: Tensor) -> list[Tensor]:
    """Squared L2 norms of rows, in float64.

    Neither the squares nor products of two squares overflow or underflow.

    Args:
        tables: tensors (n, ...) in float32 or wider; one call with several tables is faster than
            several calls.

    Returns:
        (n,) squared norms for each table; infinity for a row with NaN or infinity, or longer than
        `LONGEST`.
    """
    on_cpu = all(table.device.type == "cpu" for table in tables)
    if not on_cpu or any(table.dtype == torch.float64 for table in tables):
        # on an accelerator float64 takes no longer, and waiting for the result of a check would
        return [_wide(table).square() for table in tables]
    quick = torch.stack([_quick(table) for table in tables])
    norms = quick.double()
    if not torch.equal(quick, quick.clamp(*SURE)):
        for own, table in zip(norms, tables, strict=True):
            doubtful = ~((own >= SURE[0]) & (own <= SURE[1]))
            if bool(doubtful.any()):
                own[doubtful] = _wide(table[doubtful])
    return list(norms.square_())


def _quick(table: Tensor) -> Tensor:
    """(n,) norms in float32, in two stages: one sum of millions of numbers loses three digits."""
    inner = torch.linalg.vector_norm(table.flatten(2), dim=2) if table.dim() > 2 else table
    norms: Tensor = torch.linalg.vector_norm(inner, dim=1)
    return norms


def _wide(table: Tensor) -> Tensor:
    """(n,) norms in float64; infinite for rows that are longer than `LONGEST` or contain NaN."""
    norms = torch.linalg.vector_norm(table.flatten(1), dim=1, dtype=torch.float64)
    return torch.where(norms <= LONGEST, norms, torch.inf)
