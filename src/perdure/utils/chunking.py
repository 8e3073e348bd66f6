"""Cut batches into pieces that fit into memory."""

from collections.abc import Iterator, Mapping

from torch import Tensor


def chunks(tensors: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """Cut the rows into pieces of at most `size`.

    Clipping is per record, so the sum does not change.
    """
    n = len(next(iter(tensors.values())))
    for start in range(0, n, size):
        yield {name: value[start : start + size] for name, value in tensors.items()}
