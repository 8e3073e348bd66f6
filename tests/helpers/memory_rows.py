"""Rows for a memory, and the randomness that places them."""

import torch

from perdure.data.records import Batch


def rows(labels, task=0, first_id=0, stored=None):
    n = len(labels)
    ids = first_id + torch.arange(n)
    return Batch(
        inputs=ids[:, None].float(),
        labels=torch.tensor(labels, dtype=torch.int64),
        ids=ids,
        tasks=torch.full((n,), task),
        from_memory=torch.zeros(n, dtype=torch.bool),
        valid=torch.ones(n, dtype=torch.bool),
        stored=stored or {},
    )


def place(seed=0):
    return torch.Generator().manual_seed(seed)
