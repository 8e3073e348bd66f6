"""Records that a party holds: the open experience, the memory, and the rows of the current step.

This module adds no noise; the curator answers queries about the records.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from perdure.contract.context import Context
from perdure.contract.exposure import Exposure
from perdure.contract.forward import Forward
from perdure.contract.plan import MODELLED, Plan
from perdure.curator.known_rows import KnownRows
from perdure.curator.memory import Memory, concatenate
from perdure.curator.remembered_rows import (
    Remember,
    as_noted,
    note_rows,
    ranked_by,
    remembered,
)
from perdure.curator.sampling import (
    Opened,
    Pool,
    PrivateSampler,
    refuse_shared_partitions,
    replayed,
    without,
)
from perdure.data.domain import InputDomain
from perdure.data.experience import Experience
from perdure.data.records import Batch
from perdure.errors import DataError, PrivacyError, StrategyError
from perdure.planning.exposure import exposure, reference_exposures
from perdure.privacy.guard.probes import domain_of, probe_rows
from perdure.privacy.private_sum import PrivateSum
from perdure.types import Params
from perdure.utils.modules import untouched
from perdure.utils.seeding import generator


class HeldRecords:
    """Records of one party: the open experience, and the memory of earlier records.

    Args:
        seed: seed of sampling and memory selection (without privacy).
        client: number of the party.
        batch_size: number of new records per step.
        private_sum: decides with secret random numbers which records a step draws and the memory
            keeps; None without privacy.
    """

    def __init__(
        self, *, seed: int, client: int = 0, batch_size: int, private_sum: PrivateSum | None = None
    ) -> None:
        self._seed = seed
        self._client = client
        self._batch_size = batch_size
        self.private_sum = private_sum
        self.memory = Memory()
        self.context: Context
        self.forward: Forward
        self.exposure: Exposure
        self.block: tuple[range, str] = (range(0), "")
        self.fingerprint = ""
        self.samplers: dict[str, PrivateSampler] = {}
        self._known_rows = KnownRows()
        self._pool: Pool | None = None
        # Answers of `remember` for the rows of the experience, from the last step that drew each:
        # name to (n, ...), and the mask NOTED_ROWS. Empty unless memory is updated every step under
        # privacy.
        self._noted: Params = {}
        self._drawn = torch.zeros(0, dtype=torch.int64)
        self._stage_of = torch.zeros(0, dtype=torch.int64)

    # ------------------------------------------------------------------ an experience

    def open(
        self,
        experiences: Sequence[Experience],
        plan: Plan,
        context: Context,
        forward: Forward,
    ) -> None:
        """Open the last of `experiences`, and collect the records that its steps draw, by the plan.

        Args:
            experiences: all experiences so far; the last one is opened.
            plan: records and parameters that the experience is trained on.
            context: public facts of the experience.
            forward: the model, for memories that rank records with it.
        """
        self.context = context
        self.forward = forward
        self.step = -1
        self._releases = 0
        opened = Opened(experiences=experiences, plan=plan, memory=self.memory.rows)
        if not self.private_sum and self._pool and opened.same_as(self._pool.opened):
            return
        self.experiences = experiences
        self._plan = plan
        private_sum = self.private_sum
        experience = experiences[-1]
        size = self._batch_size
        if plan.memory and plan.memory.update == "step" and plan.pool != "experience":
            raise StrategyError(
                f"a memory updated every step needs pool='experience'; given pool={plan.pool!r}"
            )
        self.excluded = (
            private_sum.schedule.excluded_in(experience.index) if private_sum else frozenset()
        )
        current = Batch.current(experience.train, experience.index)
        if plan.pool == "memory":
            self._offer(current)
        pool = Pool(
            current=current,
            new=self._pooled(current),
            stored=None if plan.pool == "memory" else self.stored,
            plan=plan.memory,
            batch_size=size,
            place=(self._seed, self._client, experience.index),
            opened=replace(opened, memory=self.memory.rows),
        )
        if not len(pool.new) and not private_sum:
            raise DataError(
                f"experience {experience.index} has no training records; leave it out of the stream"
            )
        self._pool = pool
        rate = private_sum.privacy.sampling_rate if private_sum else None
        bands = private_sum.privacy.bands if private_sum else None
        self.exposure = exposure(
            experiences, plan, batch_size=size, rate=rate, bands=bands, excluded=self.excluded
        )
        if private_sum:
            self._known_rows.refuse_shared_ids(experience.train)
            references = reference_exposures(
                experiences, plan, batch_size=size, excluded=self.excluded
            )
            self._open_samplers(private_sum, references)

    def reserve(self, steps: range, digest: str) -> None:
        """Charge a block of steps to every exposed partition, before the block draws any noise.

        Args:
            steps: steps of the open experience.
            digest: digest of everything except the records that determines the steps.
        """
        self.block = (steps, digest)
        if self.private_sum and len(steps):
            exposed = self.exposure
            self.private_sum.reserve(
                scope=exposed.scope,
                steps=steps,
                start=digest,
                data=self.fingerprint,
                expected=exposed.expected,
                numbers=self.numbers,
                slots=exposed.slots,
            )

    @property
    def numbers(self) -> int:
        """Number of values in all parameters of the model."""
        return sum(value.numel() for value in self.forward.module.parameters())

    def sample(self, step: int) -> Batch:
        """Draw the rows of one step: by Poisson sampling under privacy, shuffled without privacy.

        Raises:
            PrivacyError: under privacy, if the step was already drawn.
        """
        if self.private_sum is None:
            self.step = step
            batch, share = self.pool.side_by_side(step)
            self.set_memory_share(share)
            return batch
        if step <= self.step:
            raise PrivacyError(
                f"the rows of step {step} were already drawn; only the training loop may draw "
                "rows; use curator.release(...) instead"
            )
        self.step = step
        return self.draw(step)

    def draw(self, step: int) -> Batch:
        """Draw the rows of a private step with the secret numbers of its ledger entry.

        If the step is charged again, under another entry, its rows must be drawn again.
        """
        assert self.private_sum is not None
        sampler = self.samplers["gradient"]
        self._drawn = sampler.positions(self.private_sum, step)
        return sampler.rows.take(self._drawn)

    def set_memory_share(self, share: float) -> None:
        """Set the share of the current batch that comes from memory."""
        if share != self.context.memory_share:
            self.context = replace(self.context, memory_share=share)

    def reference_rows(self, of: int | None) -> Batch | None:
        """Rows from memory for one step's reference gradient (without privacy).

        Args:
            of: index of the earlier experience that the rows come from; None for all.

        Returns:
            The rows; None if no rows of that experience are stored.
        """
        stored = self.pool.stored
        if stored is None:
            raise StrategyError(
                "the memory is empty in the first experience, so there are no rows for a reference "
                "gradient; ask for one from the second experience on"
            )
        among = None if of is None else self.pool.positions_of(of)
        if not len(stored if among is None else among):
            return None
        return replayed(self.pool.stored_rows(stored, f"reference {of}", self.step, among))

    def plans_reference(self, of: int | None) -> bool:
        """Return True if the plan keeps memory for reference gradients of experience `of`.

        The memory may still be empty.

        Args:
            of: index of an earlier experience; None for one gradient over all of them.
        """
        use = self._plan.memory.use if self._plan.memory else ""
        if of is None:
            return use == "reference"
        return use == "references" and 0 <= of < len(self.experiences) - 1

    def next_releases(self, count: int) -> range:
        """Number the next `count` releases of the open experience; every number is used once."""
        first = self._releases
        self._releases += count
        return range(first, self._releases)

    def observe(self, batch: Batch, remember: Remember) -> None:
        """Offer the new rows of a step to a memory that is updated in every step.

        Under privacy, a secret random number of each record decides at the end of the experience if
        memory keeps the record. Until then only the tensors that would be stored with the record
        are saved, computed with the parameters of the last step that drew it.
        """
        if self.private_sum:
            self._note(remember)
            return
        plan = self._plan.memory
        assert plan is not None
        stream = ("memory", self._client, self.experiences[-1].index, self.step)
        new = batch.among(~batch.from_memory)
        # In training mode, as the loss sees these rows.
        with untouched(self.forward.module), torch.no_grad():
            stored = remember(self.forward, new)
        new = replace(new, stored={name: value.detach() for name, value in stored.items()})
        rng = generator(self._seed, *stream)
        task = self.experiences[-1].task
        self.memory.offer(new, plan, rng, stages=self._stages(), task=task)
        self.pool.stored = self.memory.rows

    def store(self, remember: Remember | None) -> None:
        """Offer the finished experience to memory, unless its steps did so already.

        Args:
            remember: function that computes the tensors to store with each row; None for none.
        """
        plan = self._plan.memory
        index = self.experiences[-1].index
        private = self.private_sum is not None
        if plan and self.memory.latest < index and (private or plan.update == "experience"):
            rows = self.pool.current
            if remember is not None:
                rows = remembered(rows, remember, self.forward, one_by_one=private)
            self._offer(as_noted(self._noted, rows))
        if plan:
            self.memory.latest = index

    def close(self) -> None:
        """End the open experience, and drop all references to its records."""
        self._pool = None
        self.samplers = {}
        self._noted = {}

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Memory for a checkpoint's `private/` folder, and public counts of offered records."""
        rows = self.memory.rows
        kept = {} if rows is None else {f"memory.{n}": t for n, t in rows.tensors().items()}
        if not self.private_sum:
            # copies, because a reservoir writes over its rows while the run continues
            kept = {name: value.clone() for name, value in kept.items()}
        noted = {f"noted.{name}": value for name, value in self._noted.items()}
        facts = {"offered": self.memory.offered, "latest": self.memory.latest}
        return kept | noted | {"tags": self.memory.tags}, facts

    def restore(
        self, private: Mapping[str, Tensor], facts: Mapping[str, int], device: str | torch.device
    ) -> None:
        """Restore the memory from tensors and counts that `snapshot` returned."""
        own = {name: value.to(device, copy=True) for name, value in private.items()}
        rows, self._noted = (
            {n.removeprefix(prefix): t for n, t in own.items() if n.startswith(prefix)}
            for prefix in ("memory.", "noted.")
        )
        memory_rows = Batch.from_tensors(rows) if rows else None
        self.memory = Memory(rows=memory_rows, tags=private["tags"], **facts)

    # ------------------------------------------------------------------ its rows

    @property
    def pool(self) -> Pool:
        """Pool of rows of the open experience.

        Raises:
            PrivacyError: if no experience is open.
        """
        if self._pool is None:
            raise PrivacyError("the curator has no open experience; call open() first")
        return self._pool

    @property
    def rows(self) -> Batch:
        """All rows that a step may draw, as one batch."""
        return self.samplers["gradient"].rows if self.samplers else self.pool.rows

    @property
    def drawn_rows(self) -> Batch:
        """Rows of the last private step, in the order in which they were drawn."""
        return self.rows.take(self._drawn)

    @property
    def stored(self) -> Batch | None:
        """Rows of memory that may be drawn, without excluded partitions.

        Under privacy the batch may have no rows. None would show, in tensors stored with synthetic
        rows and so in the ledger's digests, that memory is empty.
        """
        rows = self.memory.rows
        known = rows is not None and (len(rows) > 0 or self.private_sum is not None)
        if not self._plan.memory or rows is None or not known:
            return None
        if not self.excluded:
            return rows
        gone = [e.index for e in self.experiences if e.train.partition in self.excluded]
        return without(rows, gone) if gone else rows

    def rows_of_memory(self) -> tuple[Batch, tuple[str, ...]]:
        """Rows of memory for a release over memory, and the partitions that it exposes.

        Raises:
            PrivacyError: under privacy, if a record may be stored twice.
        """
        if self.private_sum:
            refuse_shared_partitions(self.experiences)
        stored = self.stored
        rows = self.pool.current.take(slice(0, 0)) if stored is None else stored
        names = [experience.train.partition for experience in self.experiences]
        return rows, tuple(name for name in names if name not in self.excluded)

    def rows_of_experience(self) -> tuple[Batch, tuple[str, ...]]:
        """Rows of the open experience for a release over it, and the partition it exposes."""
        return self.pool.current, (self.experiences[-1].train.partition,)

    def synthetic(self, n: int) -> Batch:
        """Return n random rows with the pool's shapes and dtypes, independent of the data.

        Inputs are random values of the declared domain, if one is declared.
        """
        domain = self.experiences[-1].train.domain
        rng = generator(self._seed, "synthetic")
        if domain is not None:
            return self._synthetic(domain.random(n, rng))
        inputs = self.rows.inputs
        drawn = torch.rand(n, *inputs.shape[1:], generator=rng).to(inputs.dtype)
        return self._synthetic(drawn)

    def synthetic_stored(self, n: int) -> Batch:
        """Return n random rows marked as rows from memory, from all earlier experiences in turn.

        They have random values for the tensors that memory stores.
        """
        rng = generator(self._seed, "synthetic stored")
        rows = self.synthetic(n)
        past = self.experiences[:-1] or self.experiences
        of = [past[i % len(past)] for i in range(n)]
        declared = [e.classes[i // len(past) % len(e.classes)] for i, e in enumerate(of)]
        outputs = range(len(self.context.seen))
        numbers = torch.tensor(declared) + len(outputs) * torch.arange(n)
        beside = {
            name: torch.rand(value.shape, generator=rng).to(value)
            if value.is_floating_point()
            else value
            for name, value in rows.stored.items()
        }
        return replace(
            replayed(rows),
            tasks=torch.tensor([e.index for e in of]).to(rows.tasks),
            labels=self.context.task.synthetic(rows.labels, outputs, numbers),
            ids=torch.arange(n).to(rows.ids),
            stored=beside,
        )

    def probes(self) -> Batch:
        """Return synthetic rows, one of every kind of input that the guard tests."""
        rng = generator(self._seed, "probes")
        return self._synthetic(probe_rows(self.domain, rng))

    @property
    def domain(self) -> InputDomain:
        """Domain of the inputs of the open experience; the widest one if none is declared."""
        return domain_of(self.rows.inputs, self.experiences[-1].train.domain)

    def _synthetic(self, inputs: Tensor) -> Batch:
        """Rows with these inputs (n, ...), all classes in turn, and zeros for stored values."""
        n = len(inputs)
        rows = {
            name: torch.zeros(n, *t.shape[1:], dtype=t.dtype)
            for name, t in self.rows.tensors().items()
        }
        classes = torch.nonzero(self.context.current).flatten().tolist()
        rows |= {
            "inputs": inputs,
            "labels": self.context.task.synthetic(rows["labels"], classes, torch.arange(n)),
            "valid": torch.ones(n, dtype=torch.bool),
            "tasks": torch.full((n,), self.experiences[-1].index),
        }
        if "weights" in rows:
            rows["weights"] = torch.ones(n)
        return Batch.from_tensors(rows).map(lambda t: t.to(self.pool.device))

    def _pooled(self, current: Batch) -> Batch:
        """Return the rows of the pool that the plan names, from which steps draw new rows."""
        if self._plan.pool == "memory":
            stored = self.stored
            return current.take(slice(0, 0)) if stored is None else stored
        if self._plan.pool == "experience":
            return current
        pooled = [e for e in self.experiences if e.train.partition not in self.excluded]
        return concatenate([Batch.current(e.train, e.index) for e in pooled])

    def _open_samplers(self, private_sum: PrivateSum, references: Mapping[str, Exposure]) -> None:
        """Prepare Poisson sampling from the pool, and from the rows of every reference gradient."""
        private_sum.open(self.experiences[-1].index)
        seen = self.experiences
        rows = self.pool.rows
        stored = self.stored
        known = self._known_rows
        pool = PrivateSampler.of(rows, seen, self.exposure, "gradient", known)
        self.samplers = {"gradient": pool}
        for name, exposed in references.items():
            back = self.pool.current.take(slice(0, 0)) if stored is None else replayed(stored)
            own = torch.ones_like(back.valid)
            if " " in name:
                own = back.tasks == int(name.split()[-1])
            self.samplers[name] = PrivateSampler.of(back.take(own), seen, exposed, name, known)
        kept = {}
        if references and stored is not None:
            kept = {f"reference {n}": t for n, t in stored.tensors().items()}
        self.fingerprint = known.fingerprint(private_sum, {**rows.tensors(), **kept})

    # ------------------------------------------------------------------ its memory

    def _offer(self, new: Batch) -> None:
        """Offer all rows of the open experience to memory, unless they were offered before."""
        plan = self._plan.memory
        memory = self.memory
        experience = self.experiences[-1]
        if plan is None or memory.latest >= experience.index:
            return
        if self.private_sum:
            offered = memory.offered + experience.train.declared_size
            tags = self.private_sum.tags(new.ids)
            memory.offer_by_coin(new, tags, min(1.0, plan.capacity / offered))
            memory.offered = offered
        else:
            task = experience.task
            modelled = plan.selection in MODELLED
            known = ranked_by(self.forward, new, plan.selection, task) if modelled else None
            rng = generator(self._seed, "memory", self._client, experience.index)
            memory.offer(new, plan, rng, known, self._stages(), task)
        memory.latest = experience.index

    def _stages(self) -> Tensor:
        """(T,) stage of every experience so far; all pieces of a stage share the stage's quotas."""
        new = [each.stage for each in self.experiences[len(self._stage_of) :]]
        if new:
            self._stage_of = torch.cat([self._stage_of, torch.tensor(new)])
        return self._stage_of

    def _note(self, remember: Remember) -> None:
        """Save the results of `remember`, with the present parameters, for the last new rows."""
        current = self.pool.current
        # rows of memory, at positions from len(current) on, keep the tensors stored with them
        at = self._drawn[self._drawn < len(current)]
        new = remembered(current.take(at), remember, self.forward, one_by_one=True)
        note_rows(self._noted, new, at, len(current))
