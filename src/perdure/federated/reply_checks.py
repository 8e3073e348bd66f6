"""Checks of every reply of a client, before an aggregator or the server's state sees it.

A reply is rejected by itself, so that a wrong one costs the federation only that client's part of
that exchange. Names, shapes and dtypes must be those of the server's own tensors, and numbers must
be finite. The size must be a whole number within the client's declared sizes, and the exchange must
be the present one. An update far larger than those of most clients is rejected, too.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from perdure.errors import FederationError
from perdure.federated.held_arrays import HeldArray, message_of, name_of
from perdure.federated.ledger_heads import LEDGER
from perdure.federated.updates import checked_record

STATE = "state"
"""Name of the record with tensors of the strategy's state."""
EXCHANGE = "exchange"
"""Name of the record, and of the number in it, with which a client names the exchange."""
UPDATE_FACTOR = 100.0
"""Largest allowed norm of an update, in medians of the norms of a round's updates."""
STATE_FACTOR = 1e4
"""Largest allowed norm of a state's tensor, in medians over clients: importances differ more."""
FEWEST = 3
"""Number of norms from which updates are bounded; among two, nobody knows the wrong one."""
REMEMBERED = 32
"""Number of the last accepted norms, which rounds with fewer than `FEWEST` updates use.

These are bounded by the largest norm of the experience, because honest updates become small while
a model converges, and large again at the next experience.
"""
PIECE = 1 << 16
"""Number of squares that are added in float32; the sums of pieces are added in float64."""
SMALLEST_SQUARE = 1e-20
"""Squared norm from which squares that are too small for float32 do not count."""


class ReplyError(FederationError):
    """A reply that the server must not use.

    Args:
        field: part of the reply that is wrong, such as `arrays head.weight`.
        reason: the value that was found, and the allowed ones.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Contents that a valid reply to an exchange must have.

    Args:
        record: name of the record with tensors: `arrays` or `state`.
        tensors: the server's own tensors before the exchange, on the CPU.
        exchange: number of the exchange.
        private: True if every client must report the head of its ledger.
        sizes: largest number of records of each client, by number; empty if none was declared.
        max_update_norm: largest allowed L2 norm of an update; None for a bound from the median.
        round_state: the server's tensors of the strategy's state that a reply has besides.
    """

    record: str
    tensors: Mapping[str, Tensor]
    exchange: int
    private: bool
    sizes: Mapping[int, int]
    max_update_norm: float | None = None
    round_state: Mapping[str, Tensor] = field(default_factory=dict)


class ReplyChecks:
    """Checks of the replies of a whole run, which remembers the norms of accepted updates.

    Args:
        norms: norms of the last accepted updates of the experience, from a checkpoint.
    """

    def __init__(self, norms: Sequence[float] = ()) -> None:
        self.norms = list(norms)

    def begin(self) -> None:
        """Forget the norms of the last experience, which say nothing about a new one."""
        self.norms = []

    def accept(
        self, replies: Mapping[int, Message], expected: Expected
    ) -> tuple[dict[int, Message], dict[int, ReplyError]]:
        """Separate valid replies from others; a valid one contains checked tensors only.

        Args:
            replies: reply of each client, by number.
            expected: contents of a valid reply.

        Returns:
            Accepted replies, and the reason for every other client.
        """
        accepted: dict[int, Message] = {}
        rejected: dict[int, ReplyError] = {}
        norms: dict[int, dict[str, float]] = {}
        for client, reply in sorted(replies.items()):
            try:
                content, norms[client] = checked_content(reply, client, expected)
            except ReplyError as error:
                rejected[client] = error
            except Exception as error:  # a foreign reply may break any reader of its parts
                rejected[client] = ReplyError("message", f"cannot be read ({error!r})")
            else:
                reply.content = content
                accepted[client] = reply
        for client, outlier in self._outliers(norms, expected).items():
            rejected[client] = outlier
            del accepted[client], norms[client]
        if expected.record == "arrays":
            kept = [each[""] for each in norms.values() if each[""] > 0]
            self.norms = (self.norms + kept)[-REMEMBERED:]
        return accepted, rejected

    def _outliers(
        self, norms: Mapping[int, Mapping[str, float]], expected: Expected
    ) -> dict[int, ReplyError]:
        found: dict[int, ReplyError] = {}
        parts = next(iter(norms.values()), {})
        for part in parts:
            update = part == ""
            positive = [each[part] for each in norms.values() if each[part] > 0]
            factor = UPDATE_FACTOR if update else STATE_FACTOR
            most, told = math.inf, ""
            if len(positive) >= FEWEST:
                most = factor * median(positive)
                told = f"{factor:g} times the median of the clients' norms"
            elif update and self.norms and len(positive + self.norms) >= FEWEST:
                most = factor * max(self.norms)
                told = f"{factor:g} times the largest accepted norm of the experience"
            if update and expected.max_update_norm is not None:
                most = expected.max_update_norm
                told = "federation.max_update_norm"
            for client, each in norms.items():
                if each[part] > most:
                    where = "update" if update else f"{STATE} {part.removeprefix(f'{STATE} ')}"
                    reason = f"its norm {each[part]:.3g} is above {most:.3g}, {told}"
                    found.setdefault(client, ReplyError(where, reason))
        return found


def _norm(value: Tensor, start: Tensor | None = None) -> float:
    """Return the L2 norm of a tensor, or of its difference from `start`.

    For float32 it is exact to a millionth, and takes a quarter of the time of float64.
    """
    if value.dtype == torch.float32:
        squared = _squared(value.reshape(-1), None if start is None else start.reshape(-1))
        if SMALLEST_SQUARE < squared < math.inf:
            return math.sqrt(squared)
    value = value if start is None else value - start
    if not (value.is_floating_point() or value.is_complex()):
        value = value.double()
    wide = torch.complex128 if value.is_complex() else torch.float64
    return float(torch.linalg.vector_norm(value, dtype=wide))


def _squared(value: Tensor, start: Tensor | None) -> float:
    """Add up squares piece by piece, so that a difference never leaves the processor's cache."""
    total = 0.0
    # slices, because `split` takes longer than the sum of a small tensor
    for first in range(0, len(value), PIECE):
        piece = value[first : first + PIECE]
        if start is not None:
            piece = piece - start[first : first + PIECE]
        total += float(torch.dot(piece, piece))
    return total


def checked_content(
    reply: Message, client: int, expected: Expected
) -> tuple[RecordDict, dict[str, float]]:
    """Return the content of a reply with its checked tensors, and their L2 norms.

    Returns:
        The content, and the norm of the update under the name "", those of the state's tensors
        under theirs.

    Raises:
        ReplyError: names the field that is wrong.
    """
    if not reply.has_content():
        raise ReplyError("message", "it has no content")
    content = reply.content
    own = {expected.record, "metrics", EXCHANGE} | ({LEDGER} if expected.private else set())
    if expected.round_state:
        own.add(STATE)
    if set(content) != own:
        raise ReplyError("message", f"has the records {sorted(content)}; allowed: {sorted(own)}")
    _check_exchange(content[EXCHANGE], expected.exchange)
    size = _checked_size(content["metrics"], expected.sizes.get(client))
    update = expected.record == "arrays"
    tensors, norms = _checked_tensors(
        content[expected.record], expected.record, expected.tensors, update=update
    )
    if update:
        norms = {"": math.sqrt(sum(norm**2 for norm in norms.values()))}
    records: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {
        expected.record: checked_record(tensors),
        "metrics": MetricRecord({"num-examples": size}),
    }
    if expected.round_state:
        state, changes = _checked_tensors(content[STATE], STATE, expected.round_state, update=True)
        records[STATE] = checked_record(state)
        norms |= {f"{STATE} {name}": norm for name, norm in changes.items()}
    if expected.private:
        records[LEDGER] = cast(ConfigRecord, content[LEDGER])
    return message_of(records), norms


def _check_exchange(record: Any, exchange: int) -> None:
    given = record.get(EXCHANGE) if isinstance(record, ConfigRecord) else None
    if type(given) is not int or given != exchange:
        raise ReplyError(EXCHANGE, f"is {_short(given)}; allowed: {exchange}, the present one")


def _checked_size(record: Any, most: int | None) -> int:
    given = record.get("num-examples") if isinstance(record, MetricRecord) else None
    if not isinstance(record, MetricRecord) or list(record) != ["num-examples"]:
        raise ReplyError("metrics", "allowed: num-examples only")
    above = f"at most {most}, the declared size of the client" if most is not None else "from 0"
    if type(given) is not int or given < 0 or (most is not None and given > most):
        raise ReplyError("metrics num-examples", f"is {_short(given)}; allowed: whole, {above}")
    return given


def _checked_tensors(
    record: Any, name: str, like: Mapping[str, Tensor], *, update: bool
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the tensors of a record, and their norms, of an update from the server's own."""
    if not isinstance(record, ArrayRecord):
        raise ReplyError(name, f"is a {type(record).__name__}; allowed: an ArrayRecord")
    wrong = sorted(set(record) ^ set(like))
    if wrong:
        raise ReplyError(name, f"differs in {_short(wrong[0])}; allowed: the model's own names")
    tensors = {}
    norms = {}
    for key, own in like.items():
        where = f"{name} {key}"
        value = tensors[key] = _decoded(record[key], own, where)
        norms[key] = _norm(value, own if update else None)
        # a finite change of finite numbers leads to finite numbers, which need no look of their own
        if not math.isfinite(norms[key]) and not math.isfinite(_norm(value)):
            raise ReplyError(where, "has NaN, infinite or far too large numbers; allowed: finite")
        if key.endswith("running_var") and bool((value < 0).any()):
            raise ReplyError(where, "has a negative variance; allowed: numbers from 0")
    return tensors, norms


def _decoded(array: Array, like: Tensor, field: str) -> Tensor:
    """Return the tensor of an array, of which nothing is believed before it was compared."""
    shape, dtype = tuple(like.shape), name_of(like.dtype)
    value = array.tensor if isinstance(array, HeldArray) else None
    own = None if value is None else (tuple(value.shape), name_of(value.dtype))
    found = own or _header(array.data)
    if found != (shape, dtype):
        told = f"has shape {found[0]} and dtype {found[1]}; allowed: shape {shape} and {dtype}"
        raise ReplyError(field, told)
    return torch.from_numpy(np.load(io.BytesIO(array.data))) if value is None else value


def _header(data: bytes) -> tuple[tuple[int, ...], str]:
    """Read shape and dtype of a serialised array without its numbers.

    `np.load` would allocate as many numbers as the header claims.
    """
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, _, dtype = read(stream)
    return shape, str(dtype)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
