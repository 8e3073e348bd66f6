"""Steps before a robust aggregator: mix clients' updates, so that honest ones resemble each other.

Robust aggregators take updates that differ for updates of an attacker. With clients whose records
differ, honest updates differ, too. A pre-aggregator replaces the updates u_1, ..., u_n of a round
by linear combinations

    v_i = sum_j W_ij u_j

whose weights W depend on the inner products of the updates only. One pre-aggregator is one
dataclass.

>>> from flwr.serverapp.strategy import Krum
>>> Federation(
...     clients=15,
...     rounds=10,
...     aggregator=Krum(num_malicious_nodes=3),
...     pre_aggregators=[NearestNeighbours(hostile=3)],
... )
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from torch import Generator, Tensor

from perdure.errors import ConfigError, FederationError
from perdure.federated.held_arrays import message_of, read_only
from perdure.federated.messages import read_metric
from perdure.federated.updates import checked_record
from perdure.types import Params
from perdure.utils.checked_fields import CheckedFields


class PreAggregator(Protocol):
    """Weights of the mixed updates of one round."""

    def weights(self, gram: Tensor, generator: Generator) -> Tensor:
        """Compute the weights W (m, n) of m mixed updates.

        Args:
            gram: (n, n) inner products of the clients' updates, float64.
            generator: public randomness of the round.

        Raises:
            FederationError: if there are too few updates.
        """


@dataclass(frozen=True, kw_only=True)
class NearestNeighbours(CheckedFields):
    """Replace each update by the mean of the n - f updates that are nearest to it, with its own.

    Guarantee: none about privacy. It lowers the error that heterogeneity causes in every robust
    aggregator that tolerates f hostile clients.

    Args:
        hostile: number f of hostile clients that are tolerated; less than half of a round's.

    Source: Allouah, Farhadkhani, Guerraoui, Gupta, Pinot and Stephan, Fixing by Mixing: A Recipe
    for Optimal Byzantine ML under Heterogeneity, AISTATS 2023, algorithm 2.
    """

    hostile: int

    def __post_init__(self) -> None:
        if self.hostile < 1:
            raise ConfigError.of("pre_aggregators.hostile", self.hostile, "whole numbers from 1")

    def weights(self, gram: Tensor, generator: Generator) -> Tensor:
        """Compute the weights (n, n): 1 / (n - f) for each of the nearest updates.

        Raises:
            FederationError: if at most 2 f clients have sent an update.
        """
        n = len(gram)
        if n <= 2 * self.hostile:
            raise FederationError(
                f"{n} updates with {self.hostile} hostile ones cannot be mixed; allowed: more than "
                f"{2 * self.hostile} clients a round"
            )
        squares = gram.diagonal()
        distances = squares[:, None] + squares[None, :] - 2 * gram
        distances.fill_diagonal_(-math.inf)  # rounding must not put another one before itself
        nearest = distances.argsort(dim=1, stable=True)[:, : n - self.hostile]
        return torch.zeros_like(gram).scatter_(1, nearest, 1 / (n - self.hostile))


@dataclass(frozen=True, kw_only=True)
class Buckets(CheckedFields):
    """Put updates into random buckets of a size s, and replace each bucket by its mean.

    A hostile client spoils its bucket: f hostile clients of n become f of n / s, which the
    aggregator must still tolerate.

    Args:
        size: number s of updates in a bucket; the last one may have fewer.

    Source: Karimireddy, He and Jaggi, Byzantine-Robust Learning on Heterogeneous Datasets via
    Bucketing, ICLR 2022, algorithm 1.
    """

    size: int = 2

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ConfigError.of("pre_aggregators.size", self.size, "whole numbers from 2")

    def weights(self, gram: Tensor, generator: Generator) -> Tensor:
        """Compute the weights (m, n) of m buckets: the inverse size of a bucket for its members."""
        order = torch.randperm(len(gram), generator=generator)
        rows = []
        for bucket in torch.split(order, self.size):
            row = torch.zeros(len(gram), dtype=gram.dtype)
            row[bucket] = 1 / len(bucket)
            rows.append(row)
        return torch.stack(rows)


@dataclass(frozen=True, kw_only=True)
class ClipUpdates(CheckedFields):
    """Shorten updates that are longer than a bound C: u min(1, C / |u|).

    Args:
        norm: bound C; None for the median of the round's norms.

    Source: Sun, Kairouz, Suresh and McMahan, Can You Really Backdoor Federated Learning?,
    arXiv:1911.07963, 2019, section 5.
    """

    norm: float | None = None

    def __post_init__(self) -> None:
        if self.norm is not None and not 0 < self.norm < math.inf:
            raise ConfigError.of("pre_aggregators.norm", self.norm, "a number above 0, or None")

    def weights(self, gram: Tensor, generator: Generator) -> Tensor:
        """Compute the weights (n, n), a diagonal of factors."""
        norms = gram.diagonal().clamp(min=0.0).sqrt()
        bound = norms.median() if self.norm is None else torch.tensor(self.norm, dtype=gram.dtype)
        factors = torch.where(norms > bound, bound / norms, 1.0)
        return torch.diag(factors)


# --------------------------------------------------------------------------- a whole round


def mixed(
    models: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor],
    steps: Sequence[PreAggregator],
    generator: Generator,
) -> tuple[list[Params], Tensor]:
    """Mix the models of a round, one step after another.

    Args:
        models: parameters and buffers of each client's model, by name.
        base: parameters and buffers that the clients began with; an update is the difference.
        steps: steps, in order.
        generator: public randomness of the round.

    Returns:
        The mixed models, in the dtypes of `base`, and their weights (m, n).
    """
    weights = torch.eye(len(models), dtype=torch.float64)
    gram = torch.zeros_like(weights)
    updates: dict[str, Tensor] = {}
    for name, start in base.items():
        own = torch.stack([model[name] for model in models]) - start
        updates[name] = own
        wide = torch.view_as_real(own) if own.is_complex() else own
        flat = wide.double().flatten(1)
        gram += flat @ flat.mT
    for each in steps:
        step = each.weights(gram, generator)
        weights = step @ weights
        gram = step @ gram @ step.mT
    found: list[Params] = [{} for _ in weights]
    for name, own in updates.items():
        precise = torch.promote_types(own.dtype, torch.float64)
        moves = torch.tensordot(weights.to(precise), own.to(precise), 1)
        for model, move in zip(found, moves, strict=True):
            model[name] = (base[name] + move).to(base[name].dtype)
    return found, weights


def pre_aggregated_replies(
    replies: Sequence[Message],
    base: Mapping[str, Tensor],
    steps: Sequence[PreAggregator],
    generator: Generator,
) -> list[Message]:
    """Mix the models in the replies to a round.

    A mixed reply has the size of the clients that it stands for: its own, or all of its bucket.

    Args:
        replies: valid replies, each with the records `arrays` and `metrics`.
        base: parameters and buffers that the clients began with.
        steps: steps, in order.
        generator: public randomness of the round.

    Returns:
        The replies with mixed models; fewer than given if there are buckets.
    """
    if not steps or not replies:
        return list(replies)
    models = [
        {
            name: read_only(array)
            for name, array in cast(ArrayRecord, reply.content["arrays"]).items()
        }
        for reply in replies
    ]
    sizes = torch.tensor([read_metric(reply, "num-examples") for reply in replies])
    found, weights = mixed(models, base, steps, generator)
    fewer = len(found) < len(replies)
    held = (weights > 0).to(sizes.dtype) @ sizes if fewer else sizes
    for reply, model, size in zip(replies, found, held.tolist(), strict=False):
        content = dict(reply.content)
        content["arrays"] = checked_record(model)
        content["metrics"] = MetricRecord({"num-examples": int(size)})
        reply.content = message_of(content)
    return list(replies[: len(found)])
