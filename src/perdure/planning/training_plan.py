"""Number of steps of each experience and exposure of each partition, from declared sizes only."""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property

from perdure.contract.exposure import Exposure
from perdure.contract.plan import Plan
from perdure.contract.strategy import Strategy
from perdure.data.experience import Experience, Stream
from perdure.data.records import Spent
from perdure.planning.exposure import block_of_steps, exposure, pool_size, split_steps
from perdure.privacy.accounting.charges import Charge, History
from perdure.privacy.ledger.entries import Stated
from perdure.privacy.private_sum import Schedule
from perdure.privacy.settings import Privacy

NOBODY: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Participation:
    """Rounds in which a client of a federation trains, which are public and known in advance.

    Args:
        rounds: number of training rounds of an experience, which divide its steps.
        taken: numbers of the client's rounds, from 0, for each of its experiences.
    """

    rounds: int
    taken: tuple[frozenset[int], ...]


@dataclass(frozen=True, kw_only=True)
class LostLedgers:
    """Ledgers that a client lost with its disk, as far as a server knows them.

    Args:
        count: number of lost ledgers.
        charges: upper bound of their charges, by partition.
        noise: noise multiplier of a step in each experience, of the last one of them. A later
            ledger never has less noise, so that bounds computed from it hold for all.
        independence: how records were known to be independent in these charges.
    """

    count: int
    charges: Mapping[str, History]
    noise: tuple[float, ...]
    independence: Stated = ""


def charge_of(spent: Spent) -> Charge:
    """Return the charge for a release to which all records were exposed once."""
    return Charge(1.0, spent.noise_multiplier, 1, "grid-gaussian")


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingPlan:
    """Plan of training on a stream: pools of records, numbers of steps, blocks.

    The plan depends on public facts only and reads no record, so the noise of a run can be
    calibrated before the run begins.

    Args:
        stream: stream to train on; only its declared sizes and classes are used, never its records.
        strategy: strategy that plans each experience.
        batch_size: expected number of new records in a step.
        epochs: number of passes over the records of an experience; None if `iterations` is given.
        iterations: number of steps in an experience; None if `epochs` is given.
        blocks: number of blocks in an experience; each block is one charge in the ledger.
        privacy: settings of differential privacy, or None.
        schedule: calibrated noise and excluded partitions of every experience.
        carried: earlier charges of a warm-started model, by partition.
        carried_at_most: upper bound of earlier charges for a partition of a later experience, whose
            records are not known.
        participation: rounds in which a client of a federation trains; None for all steps. The
            noise is calibrated for these rounds only, without amplification by the choice of
            clients, because the choice is public.
        lost: ledgers that a client lost before this plan; None for none.
    """

    stream: Stream
    strategy: Strategy
    batch_size: int
    epochs: int | None = None
    iterations: int | None = None
    blocks: int = 1
    privacy: Privacy | None = None
    schedule: Schedule | None = None
    carried: Mapping[str, tuple[Charge, ...]] = field(default_factory=dict)
    carried_at_most: tuple[Charge, ...] = ()
    participation: Participation | None = None
    lost: LostLedgers | None = None

    def spent_before(self, partition: str) -> list[Charge]:
        """Return the charges of a partition's records before this plan."""
        if self.privacy is None:
            return [*self.carried.get(partition, self.carried_at_most)]
        before = (*self.privacy.spent, *map(charge_of, self.spent_by_records(partition)))
        lost = self.lost.charges.get(partition, ()) if self.lost else ()
        return [*before, *lost, *self.carried.get(partition, self.carried_at_most)]

    def spent_by_records(self, partition: str) -> tuple[Spent, ...]:
        """Return the earlier releases of a partition's records, which the records carry.

        For a partition that is not in the stream yet, all releases of the stream are assumed.
        """
        return self._spent.get(partition, self._spent_by_any)

    @cached_property
    def _spent(self) -> dict[str, tuple[Spent, ...]]:
        """Return the earlier releases of each partition's records, each once, by partition."""
        found: dict[str, dict[Spent, None]] = {}
        for experience in self.stream:
            records = experience.train
            found.setdefault(records.partition, {}).update(dict.fromkeys(records.spent))
        return {partition: tuple(spent) for partition, spent in found.items()}

    @cached_property
    def _spent_by_any(self) -> tuple[Spent, ...]:
        return tuple(dict.fromkeys(each for spent in self._spent.values() for each in spent))

    def of(self, experience: Experience) -> Plan:
        """Return the strategy's plan of an experience.

        Under privacy the strategy gets the experience without its training records.
        """
        # asked several times for every piece of a stream; an experience never changes
        plan = self._plans.get(experience)
        if plan is None:
            shown = experience.without_records() if self.privacy else experience
            plan = self._plans[experience] = self.strategy.plan(shown)
        return plan

    @cached_property
    def _plans(self) -> dict[Experience, Plan]:
        """Cache of the plans of this training, by experience."""
        return {}

    def upto(self, index: int) -> Sequence[Experience]:
        """Return the experiences of the stream up to and including `index`."""
        return self.stream.upto(index)

    def exposure(self, experiences: Sequence[Experience], excluded: Set[str] = NOBODY) -> Exposure:
        """Return the exposure of every partition in the last of `experiences`.

        Args:
            experiences: all experiences so far; the exposure is for the last one.
            excluded: partitions that are left out of all pools.
        """
        rate = self.privacy.sampling_rate if self.privacy else None
        bands = self.privacy.bands if self.privacy else None
        return exposure(
            experiences,
            self.of(experiences[-1]),
            batch_size=self.batch_size,
            rate=rate,
            bands=bands,
            excluded=excluded,
        )

    @property
    def most_expected(self) -> float:
        """Largest declared number of records in a step, over all experiences of the stream."""
        return max(self.exposure(self.upto(each.index)).expected for each in self.stream)

    def steps_of(self, experiences: Sequence[Experience], excluded: Set[str] = NOBODY) -> int:
        """Return the number of optimiser steps in the last of `experiences`.

        Args:
            experiences: all experiences so far; the number is for the last one.
            excluded: partitions that are left out of all pools.
        """
        plan = self.of(experiences[-1])
        if not plan.train:
            return 0
        if self.iterations is not None:
            return self.iterations
        size, _ = pool_size(experiences, plan, excluded)
        rate = self.privacy.sampling_rate if self.privacy else None
        steps_an_epoch = 1 / rate if rate else max(1.0, size / self.batch_size)
        return math.ceil((self.epochs or 1) * steps_an_epoch)

    def charged_blocks(
        self, experiences: Sequence[Experience], excluded: Set[str] = NOBODY
    ) -> list[range]:
        """Return the blocks of steps of the last of `experiences` that this party trains."""
        steps = self.steps_of(experiences, excluded)
        own = self.participation
        index = experiences[-1].index
        if own is None or index >= len(own.taken):
            return split_steps(steps, self.blocks)
        blocks = (block_of_steps(steps, own.rounds, number) for number in sorted(own.taken[index]))
        return [block for block in blocks if len(block)]

    def steps(self, index: int) -> int:
        """Return the number of optimiser steps in experience `index`."""
        excluded = self.schedule.excluded_in(index) if self.schedule else NOBODY
        return self.steps_of(self.upto(index), excluded)

    def steps_before(self, index: int) -> int:
        """Return the number of optimiser steps in all experiences before experience `index`.

        An experience without steps counts as one step, so that the numbers rise.
        """
        known, steps = self._counted
        if index < known:
            known = steps = 0
        steps += sum(max(1, self.steps(each)) for each in range(known, index))
        self._counted[:] = index, steps
        return steps

    @cached_property
    def _counted(self) -> list[int]:
        """Cache: experience that was asked for last, and the number of steps before it."""
        return [0, 0]

    def block(self, index: int, number: int, of: int) -> range:
        """Return the steps of one part of an experience.

        Args:
            index: index of the experience.
            number: number of the part, from 0.
            of: number of parts of the experience.
        """
        return block_of_steps(self.steps(index), of, range(of)[number])

    def remaining_blocks(self, index: int, step: int) -> list[range]:
        """Return the blocks of experience `index` that are not complete after `step` steps."""
        return [block for block in split_steps(self.steps(index), self.blocks) if block.stop > step]

    def declared_pool_size(self, index: int) -> int:
        """Return the declared number of records on which experience `index` is trained."""
        size, _ = pool_size(self.upto(index), self.of(self.stream[index]))
        return round(size)
