"""Rows of an open experience, and the choice of the rows of each step.

No record leaves the curator through this module.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from perdure.contract.exposure import Exposure
from perdure.contract.plan import MemoryPlan, Plan
from perdure.curator.known_rows import KnownRows
from perdure.curator.memory import concatenate
from perdure.curator.record_groups import RecordGroups, partition_index
from perdure.data.experience import Experience
from perdure.data.records import Batch
from perdure.data.row_view import RowView, rows_at
from perdure.errors import PrivacyError
from perdure.privacy.private_sum import PrivateSum
from perdure.utils.seeding import generator

SHUFFLED_AT_ONCE = 2**20
"""Largest number of bytes of a tensor that is shuffled once an epoch, instead of in each step."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """Experiences, plan and memory rows of a pool, to decide if the pool can be used again."""

    experiences: Sequence[Experience]
    plan: Plan
    memory: Batch | None

    def same_as(self, other: "Opened") -> bool:
        """Return True if a pool that was made from `other` can be used again.

        A federation opens the same experience in every round. A pool with a memory that changes in
        every step cannot be used again, because its rows may be overwritten.
        """
        moves = self.plan.memory is not None and self.plan.memory.update == "step"
        return (
            not moves
            and self.plan == other.plan
            and self.memory is other.memory
            and len(self.experiences) == len(other.experiences)
            and all(map(operator.is_, self.experiences, other.experiences))
        )


@dataclass(kw_only=True, eq=False)
class Pool:
    """Pool of rows that batches are drawn from.

    Args:
        current: rows of the experience itself.
        new: rows that are drawn as new rows.
        stored: rows of memory, for rehearsal or for reference gradients.
        plan: plan of the memory.
        batch_size: number of new rows per step.
        place: seed, client and experience, from which the shuffles are derived.
        opened: experiences, plan and memory rows from which the pool was made.
    """

    current: Batch
    new: Batch
    stored: Batch | None
    plan: MemoryPlan | None
    batch_size: int
    place: tuple[int, int, int]
    opened: Opened
    _orders: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    _epochs: dict[str, tuple[int, "ShuffledRows"]] = field(default_factory=dict)
    _positions: dict[int, Tensor] = field(default_factory=dict)
    _constants: dict[str, "ConstantTensors"] = field(default_factory=dict)

    @property
    def rehearsed(self) -> Batch | None:
        """Rows of memory that are in a batch together with new rows; None for none."""
        return self.stored if self.plan and self.plan.rehearsed else None

    @cached_property
    def rows(self) -> Batch:
        """New and rehearsed rows as one pool, if the memory does not change in each step."""
        back = self.rehearsed
        return self.new if back is None else concat_new_and_stored(self.new, back)

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self.new.inputs.device

    def side_by_side(self, step: int) -> tuple[Batch, float]:
        """Rows of one step without privacy, and the share of rows from memory.

        Shuffled new rows come first, then the rows from memory.
        """
        if self.plan and self.plan.use == "pooled":
            return self._shuffled_rows("pool", self.rows, step), 0.0
        new = self._shuffled_rows("new", self.new, step)
        if self.rehearsed is None:
            return new, 0.0
        back = self.stored_rows(self.rehearsed, "memory", step)
        return concat_new_and_stored(new, back), len(back) / (len(new) + len(back))

    def stored_rows(self, back: Batch, what: str, step: int, among: Tensor | None = None) -> Batch:
        """Rows of memory for one step.

        The order is new in every epoch; if memory changes in each step, the rows are drawn anew.

        Args:
            back: rows of memory.
            what: name of the random stream, such as `memory` or a reference gradient.
            step: number of the step.
            among: positions to draw from; None for all.
        """
        assert self.plan is not None
        size = self.plan.batch_size or self.batch_size
        n = len(back) if among is None else len(among)
        if self.plan.update == "experience":
            drawn = self.shuffled(what, n, size, step)
        else:
            drawn = torch.randperm(n, generator=self._drawn(what, step))[:size]
        drawn = drawn.to(self.device)
        return back.at(drawn if among is None else among[drawn])

    def positions_of(self, experience: int) -> Tensor:
        """Positions of the memory rows of an earlier experience.

        They are cached if memory does not change in each step: searching all rows in every step is
        slow, and copying the rows of the experience is slower.
        """
        assert self.stored is not None and self.plan is not None
        found = self._positions.get(experience)
        if found is None or self.plan.update == "step":
            found = torch.nonzero(self.stored.tasks == experience).flatten()
            self._positions[experience] = found
        return found

    def shuffled(self, what: str, n: int, size: int, step: int) -> Tensor:
        """Return the positions of one batch, in a new random order in every epoch.

        The last batch of an epoch may be smaller.

        Args:
            what: name of the random stream.
            n: number of rows to draw from.
            size: number of rows in a batch.
            step: number of the step.
        """
        epoch, i = divmod(step, -(-n // size))
        return self._order(what, n, epoch)[i * size : (i + 1) * size]

    def rest(self) -> None:
        """Free the copies of shuffled rows; the next step makes them again."""
        self._epochs.clear()

    def _order(self, what: str, n: int, epoch: int) -> Tensor:
        if self._orders.get(what, (-1,))[0] != epoch:
            self._orders[what] = (epoch, torch.randperm(n, generator=self._drawn(what, epoch)))
        return self._orders[what][1]

    def _shuffled_rows(self, what: str, rows: Batch, step: int) -> Batch:
        """Rows of one step, in a new random order in every epoch (see `shuffled`)."""
        n = len(rows)
        size = self.batch_size
        epoch, i = divmod(step, -(-n // size))
        if n <= size:
            return rows.at(self._order(what, n, epoch))
        known, shuffled = self._epochs.get(what, (-1, None))
        if shuffled is None or known != epoch:
            if what not in self._constants:
                self._constants[what] = ConstantTensors(rows)
            shuffled = ShuffledRows(rows, self._order(what, n, epoch), self._constants[what])
            self._epochs[what] = (epoch, shuffled)
        return shuffled.between(i * size, (i + 1) * size)

    def _drawn(self, what: str, number: int) -> torch.Generator:
        seed, client, experience = self.place
        return generator(seed, "order", what, client, experience, number)


class ConstantTensors:
    """Tensors of a pool that have one value for all rows, so that no step need choose rows.

    Most pools have three: the experience, the marks of memory and the marks of padding.

    Args:
        rows: rows of the pool.
    """

    def __init__(self, rows: Batch) -> None:
        marks = {"tasks": rows.tasks, "from_memory": rows.from_memory, "valid": rows.valid}
        self._firsts = {
            name: value[:1].clone()
            for name, value in marks.items()
            if not isinstance(value, RowView) and bool((value == value[:1]).all())
        }
        self._known: dict[int, dict[str, Tensor]] = {}

    @property
    def names(self) -> frozenset[str]:
        """Names of the tensors."""
        return frozenset(self._firsts)

    def of(self, count: int) -> dict[str, Tensor]:
        """Return the tensors of a batch with `count` rows, by name, which it may write to."""
        if count not in self._known:
            self._known[count] = {n: value.repeat(count) for n, value in self._firsts.items()}
        return {name: value.clone() for name, value in self._known[count].items()}


class ShuffledRows:
    """Rows of an epoch in the order of its steps.

    Small tensors, such as labels, are shuffled once, so that a step only takes a part of them.

    Args:
        rows: rows to shuffle.
        order: (n,) int64 positions of all rows.
        constants: tensors of the rows that are the same in every order.
    """

    def __init__(self, rows: Batch, order: Tensor, constants: ConstantTensors) -> None:
        self._constants = constants
        own = rows.tensors().items()
        self._rows = {name: value for name, value in own if name not in constants.names}
        self._order = order.to(rows.inputs.device)
        self._unpadded = rows.unpadded
        self._shuffled = {
            name: value.index_select(0, self._order)
            for name, value in self._rows.items()
            if not isinstance(value, RowView) and value.nbytes <= SHUFFLED_AT_ONCE
        }

    def between(self, start: int, stop: int) -> Batch:
        """Return the rows of one step; `stop` may be behind the last row."""
        taken = {name: value[start:stop] for name, value in self._shuffled.items()}
        if len(self._shuffled) < len(self._rows):
            order = self._order[start:stop]
            for name, value in self._rows.items():
                if name not in taken:
                    taken[name] = rows_at(value, order)
        taken |= self._constants.of(min(stop, len(self._order)) - start)
        batch = Batch.from_tensors(taken)
        if self._unpadded:
            vars(batch)["unpadded"] = True  # a cached property, known for all steps
        return batch


@dataclass(frozen=True, kw_only=True, eq=False)
class PrivateSampler:
    """Sampler of the rows of a private step, by a secret random number of each record.

    It uses Poisson sampling, or a fixed step of the epoch for each record.

    Args:
        rows: rows to draw from.
        records: groups of rows that are one record.
        exposure: probability, or number of times, that a record is drawn.
        purpose: purpose of the noisy sum over the drawn rows.
    """

    rows: Batch
    records: RecordGroups
    exposure: Exposure
    purpose: str = "gradient"

    @classmethod
    def of(
        cls,
        rows: Batch,
        experiences: Sequence[Experience],
        exposure: Exposure,
        purpose: str,
        known: KnownRows,
    ) -> "PrivateSampler":
        """Prepare sampling from rows of these experiences, with cached groups of rows."""
        found = known.groups(purpose, rows.ids, partition_index(rows.tasks, experiences))
        return cls(rows=rows, records=found, exposure=exposure, purpose=purpose)

    def positions(self, mechanism: PrivateSum, step: int) -> Tensor:
        """Return the positions of the rows of a step, on the device of the rows."""
        records = self.records
        exposed = self.exposure
        coins = mechanism.coins(records.whose, step, self.purpose)
        if exposed.slots is None:
            hit = (coins < exposed.rate).nonzero().flatten()
            # numbers below the rate, divided by it, are uniform again
            drawn = records.rows(hit, coins[hit] / exposed.rate)
        else:
            place = (mechanism.tags(records.ids, "place in an epoch") * exposed.slots).long()
            hit = (place == step % exposed.slots).nonzero().flatten()
            drawn = records.rows(hit, coins[hit])
        return drawn.to(self.rows.inputs.device)


def concat_new_and_stored(new: Batch, back: Batch) -> Batch:
    """Combine new rows and rows from memory, which are marked as such, into one batch."""
    return concatenate([with_blanks(new, back.stored), replayed(back)])


def replayed(back: Batch) -> Batch:
    """Return the rows, marked as coming from memory."""
    return Batch.from_tensors(back.tensors() | {"from_memory": torch.ones_like(back.from_memory)})


def without(rows: Batch, tasks: Sequence[int]) -> Batch:
    """Return the rows that come from other experiences than `tasks`."""
    return rows.take(~torch.isin(rows.tasks, torch.tensor(tasks, device=rows.tasks.device)))


def with_blanks(new: Batch, stored: Mapping[str, Tensor]) -> Batch:
    """Add zeros to new rows for the tensors that memory stores with its rows.

    New and stored rows then fit into one batch.
    """
    blanks = {
        f"stored.{name}": value.new_zeros(len(new), *value.shape[1:])
        for name, value in stored.items()
    }
    return Batch.from_tensors(new.tensors() | blanks)


def refuse_shared_partitions(experiences: Sequence[Experience]) -> None:
    """Refuse a sum over memory if one record may be stored twice.

    This is so if two experiences have the same partition.
    """
    names = [experience.train.partition for experience in experiences]
    if len(set(names)) < len(names):
        raise PrivacyError(
            "experiences share records, so a sum over memory would count one record twice; "
            "use a strategy that asks for sums over the experience only"
        )
