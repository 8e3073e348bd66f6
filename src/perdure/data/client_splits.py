"""Splitting a stream over the clients of a simulated federation.

In a real federation the split is a fact; here it follows from a seed. A record's client is decided
by a hash of its identity and by its label's shares, so that a record that turns up in several
experiences stays with one client.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from perdure.data.experience import Experience, Stream
from perdure.data.records import Records
from perdure.data.scenarios import public_coin
from perdure.errors import ConfigError
from perdure.utils.seeding import derive

Shares = Callable[[str, int], Tensor]
"""(partition, label) -> (clients,) float64 shares of that label's records, adding up to 1."""


def dirichlet(
    stream: Stream, *, clients: int, alpha: float, min_size: int = 1, seed: int = 0
) -> list[Stream]:
    """Split every experience over the clients by a Dirichlet distribution of label shares.

        shares of label y ~ Dir(alpha, ..., alpha)
        client(record) = the share its coin in [0, 1) falls into

    Clients that end up with less than `min_size` records of an experience get some of the largest
    client's, one at a time. Test records stay whole and public. Sizes are declared; partitions are
    called client-3/experience-0.

    Args:
        stream: what is split.
        clients: how many.
        alpha: concentration; towards 0 every label belongs to one client, towards infinity all
            clients are alike.
        min_size: records that every client has in every experience, at least.
        seed: of shares and coins, public.

    Raises:
        ConfigError: for a value out of range, or an experience with fewer than clients * min_size
            records.

    Source: Hsu, Qi, Brown 2019, "Measuring the effects of non-identical data distribution for
    federated visual classification", section 3.
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError.of("alpha", alpha, "a finite number above 0")

    def shares(partition: str, label: int) -> Tensor:
        draw = np.random.default_rng(derive(seed, "dirichlet", partition, label))
        return torch.from_numpy(draw.dirichlet(np.full(clients, alpha)))

    return _split(stream, clients, min_size, seed, shares)


def iid(stream: Stream, *, clients: int, min_size: int = 1, seed: int = 0) -> list[Stream]:
    """Split every experience over the clients evenly.

    Every record goes to each client with the same probability.

    Args:
        stream: what is split.
        clients: how many.
        min_size: records that every client has in every experience, at least.
        seed: of the coins, public.

    Raises:
        ConfigError: for a value out of range, or an experience with fewer than clients * min_size
            records.
    """
    return _split(
        stream,
        clients,
        min_size,
        seed,
        lambda partition, label: torch.ones(clients).double() / clients,
    )


def _split(stream: Stream, clients: int, min_size: int, seed: int, shares: Shares) -> list[Stream]:
    for field, value in (("clients", clients), ("min_size", min_size)):
        if value < 1:
            raise ConfigError.of(field, value, "whole numbers from 1")
    homes: dict[str, dict[int, int]] = {}
    owners = [
        _owners(
            e,
            homes.setdefault(e.train.partition, {}),
            clients,
            min_size,
            derive(seed, "owner"),
            shares,
        )
        for e in stream
    ]
    return [_of_client(stream, owners, client) for client in range(clients)]


def _owners(
    experience: Experience,
    homes: dict[int, int],
    clients: int,
    min_size: int,
    seed: int,
    shares: Shares,
) -> Tensor:
    """(n,) client of each training record; `homes` remembers it by record id."""
    records = experience.train
    if len(records) < clients * min_size:
        allowed = (
            f"at most {len(records) // clients}: experience {experience.index} has "
            f"{len(records)} records"
        )
        raise ConfigError.of("min_size", min_size, f"{allowed} for {clients} clients")
    coins = public_coin(records.ids, seed=seed)
    owners = _by_coin(records, coins, shares)
    ids = records.ids.tolist()
    movable = torch.tensor([i not in homes for i in ids])
    owners = torch.tensor(
        [homes.get(i, owner) for i, owner in zip(ids, owners.tolist(), strict=True)]
    )
    owners = _levelled(owners, movable, coins, clients, min_size)
    homes.update(zip(ids, owners.tolist(), strict=True))
    return owners


def _by_coin(records: Records, coins: Tensor, shares: Shares) -> Tensor:
    """(n,) client whose share of the label the record's coin falls into."""
    labels, row = torch.unique(records.labels.cpu(), return_inverse=True)
    table = torch.stack([shares(records.partition, label) for label in labels.tolist()]).cumsum(1)
    # the last share ends at 1 up to rounding, and no coin may fall beyond it
    return (coins[:, None] >= table[row, :-1]).sum(1)


def _levelled(
    owners: Tensor, movable: Tensor, coins: Tensor, clients: int, min_size: int
) -> Tensor:
    """Move records of the largest client to the smallest until all have `min_size`.

    The highest coin moves first.
    """
    owners = owners.clone()
    sizes = torch.bincount(owners, minlength=clients)
    while sizes.min() < min_size:
        spare = torch.bincount(owners[movable], minlength=clients).clamp(max=1) * sizes
        giver = int(spare.argmax())
        receiver = int(sizes.argmin())
        if spare[giver] <= min_size:
            raise ConfigError.of(
                "min_size",
                min_size,
                "less: the records that could be moved belong to clients since earlier experiences",
            )
        row = torch.where(movable & (owners == giver), coins, -1.0).argmax()
        owners[row] = receiver
        sizes[giver] -= 1
        sizes[receiver] += 1
    return owners


def _of_client(stream: Stream, owners: list[Tensor], client: int) -> Stream:
    experiences = []
    for experience, owner in zip(stream, owners, strict=True):
        train = experience.train
        mine = train.take(torch.nonzero(owner == client).flatten().to(train.inputs.device))
        mine = replace(mine, partition=f"client-{client}/{train.partition}")
        experiences.append(replace(experience, train=mine))
    return replace(stream, experiences=tuple(experiences))
