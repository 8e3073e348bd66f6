"""Iteration over large tensors in small flat views, which fit into the processor's cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 2**16
"""Numbers in a piece: 256 kB in float32. Temporary tensors of this size reuse memory, while the
operating system provides memory for one of 100 MB page by page, which takes four times as long as
filling it.
"""


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape into flat views of at most `PIECE` numbers.

    The pieces are views, so writing into a piece writes into its tensor. Small tensors, tensors on
    other devices (where many small kernels cost more than memory) and tensors without a flat view
    are returned whole.
    """
    first = tensors[0]
    large = first.numel() > PIECE and first.device.type == "cpu"
    if large and all(tensor.is_contiguous() for tensor in tensors):
        flat = [tensor.detach().view(-1) for tensor in tensors]
        yield from zip(*(torch.split(each, PIECE) for each in flat), strict=True)
    else:
        yield tensors
