"""What a party holds: the rows of the open experience, memory, and which of them a step draws.

Nothing here adds noise or leaves the curator, who answers for it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from perdure.contract.context import Context
from perdure.contract.forward import Forward, cross_entropy_of
from perdure.contract.plan import MODELLED, Plan
from perdure.curator.memory import Memory, concatenate
from perdure.curator.sampling import (
    Pool,
    PrivateSampler,
    refuse_shared_ids,
    refuse_shared_partitions,
    replayed,
    without,
)
from perdure.data.experience import Experience
from perdure.data.records import Batch
from perdure.errors import DataError, PrivacyError, StrategyError
from perdure.planning.exposure import Exposure, exposure, references
from perdure.privacy.private_sum import PrivateSum
from perdure.queries.per_record import CHUNK, rows_one_by_one
from perdure.types import Params
from perdure.utils.modules import evaluating, untouched
from perdure.utils.seeding import generator

Remember = Callable[[Forward, Batch], Params]
"""What memory stores beside each row, name to (n, ...)."""

WHEN = "(whether it was noted)"
"""Name beside those that `remember` gives; none of them has brackets."""


class HeldRecords:
    """Records of one party.

    Args:
        seed, client: of sampling and memory selection (without privacy).
        batch_size: new records a step.
        mechanism: its coins decide who is drawn and kept; None without privacy.
    """

    def __init__(
        self, *, seed: int, client: int, batch_size: int, mechanism: PrivateSum | None
    ) -> None:
        self._seed = seed
        self._client = client
        self._batch_size = batch_size
        self._mechanism = mechanism
        self.memory = Memory()
        self.exposure: Exposure
        self.fingerprint = ""
        self.drawings: dict[str, PrivateSampler] = {}
        self._pool: Pool | None = None
        self._noted: Params = {}

    # ------------------------------------------------------------------ an experience

    def open(self, experiences: Sequence[Experience], plan: Plan, forward: Forward) -> None:
        """Pool the records of the current experience, earlier ones and memory as planned.

        The current experience is the last given.
        """
        self.experiences = experiences
        self._plan = plan
        self._forward = forward
        self.step = -1
        mechanism = self._mechanism
        experience = experiences[-1]
        size = self._batch_size
        if plan.memory and plan.memory.update == "step" and plan.pool != "experience":
            raise StrategyError(
                f"a memory updated every step needs pool='experience'; given pool={plan.pool!r}"
            )
        self.left = mechanism.schedule.left_in(experience.index) if mechanism else frozenset()
        current = Batch.current(experience.train, experience.index)
        if plan.pool == "memory":
            self._offer(current)
        self._pool = Pool(
            current=current,
            new=self._pooled(current),
            stored=None if plan.pool == "memory" else self.back,
            plan=plan.memory,
            batch_size=size,
            place=(self._seed, self._client, experience.index),
        )
        if not len(self._pool.new) and not mechanism:
            raise DataError(
                f"experience {experience.index} has no training records; leave it out of the stream"
            )
        rate, bands = (
            (mechanism.privacy.sampling_rate, mechanism.privacy.bands)
            if mechanism
            else (None, None)
        )
        self.exposure = exposure(
            experiences, plan, batch_size=size, rate=rate, bands=bands, left=self.left
        )
        if mechanism:
            refuse_shared_ids(experience.train)
            self._by_coin(mechanism, references(experiences, plan, batch_size=size, left=self.left))

    def sample(self, step: int) -> tuple[Batch, float]:
        """Rows of one step, and the share from memory where these were drawn apart."""
        if self._mechanism is None:
            self.step = step
            return self.pool.side_by_side(step)
        if step <= self.step:
            raise PrivacyError(
                f"step {step} was drawn already; rows of a step are for the loop, ask for a release"
            )
        self.step = step
        drawing = self.drawings["gradient"]
        self._drawn = drawing.positions(self._mechanism, step)
        return drawing.rows.take(self._drawn), 0.0

    def recalled(self, of: int | None) -> Batch | None:
        """Stored rows of one step's reference gradient (without privacy).

        Of an earlier experience, or of all.

        None where nothing of that experience was stored.
        """
        back = self.pool.stored
        if back is None:
            raise StrategyError(
                "memory is empty: there is no reference gradient before the second experience"
            )
        back = back if of is None else back.take(back.tasks == of)
        return (
            replayed(self.pool.recalled(back, f"reference {of}", self.step)) if len(back) else None
        )

    def planned(self, of: int | None) -> bool:
        """Whether the plan keeps memory for a reference gradient of that name.

        It need not have anyone left to draw.
        """
        use = self._plan.memory.use if self._plan.memory else ""
        return (
            use == "reference"
            if of is None
            else use == "references" and 0 <= of < len(self.experiences) - 1
        )

    def observe(self, batch: Batch, remember: Remember) -> None:
        """Offer the new rows of a step to memory.

        Under privacy only note what is to be stored beside them.
        """
        if self._mechanism:
            self._note(remember)
            return
        plan = self._plan.memory
        place = ("memory", self._client, self.experiences[-1].index, self.step)
        assert plan is not None
        # in training mode, as the loss sees these rows
        with untouched(self._forward.module), torch.no_grad():
            stored = remember(self._forward, new := batch.take(~batch.from_memory))
        new = replace(new, stored={name: value.detach() for name, value in stored.items()})
        self.memory.offer(new, plan, generator(self._seed, *place), stages=self._stages())
        self.pool.stored = self.memory.rows

    def store(self, remember: Remember) -> None:
        """Offer the finished experience to memory, where it was not offered before."""
        plan = self._plan.memory
        index = self.experiences[-1].index
        private = self._mechanism is not None
        if plan and self.memory.latest < index and (private or plan.update == "experience"):
            self._offer(
                self._as_noted(
                    remembered(self.pool.current, remember, self._forward, alone=private)
                )
            )
        if plan:
            self.memory.latest = index

    def close(self) -> None:
        """Let go of the records of the experience."""
        self._pool = None
        self.drawings = {}
        self._noted = {}

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Memory for a checkpoint's `private/` folder, and its public counts of offered rows."""
        rows = self.memory.rows
        kept = (
            {f"memory.{name}": value for name, value in rows.tensors().items()}
            if rows is not None
            else {}
        )
        noted = {f"noted.{name}": value for name, value in self._noted.items()}
        facts = {"offered": self.memory.offered, "latest": self.memory.latest}
        return kept | noted | {"tags": self.memory.tags}, facts

    def restore(
        self, private: Mapping[str, Tensor], facts: Mapping[str, int], device: str | torch.device
    ) -> None:
        """Undo `snapshot`."""
        rows, noted = (
            {
                n.removeprefix(prefix): t.to(device)
                for n, t in private.items()
                if n.startswith(prefix)
            }
            for prefix in ("memory.", "noted.")
        )
        self._noted = noted
        self.memory = Memory(
            rows=Batch.from_tensors(rows) if rows else None, tags=private["tags"], **facts
        )

    # ------------------------------------------------------------------ its rows

    @property
    def pool(self) -> Pool:
        """Rows of the open experience.

        Raises:
            PrivacyError: when none is open.
        """
        if self._pool is None:
            raise PrivacyError("the curator holds no open experience; call open() first")
        return self._pool

    @property
    def rows(self) -> Batch:
        """All rows that a step may draw."""
        return self.drawings["gradient"].rows if self.drawings else self.pool.rows

    @property
    def back(self) -> Batch | None:
        """Rows of memory that may be drawn, those of partitions that left excepted."""
        rows = self.memory.rows
        if not self._plan.memory or rows is None or not len(rows):
            return None
        gone = [e.index for e in self.experiences if e.train.partition in self.left]
        return without(rows, gone) if gone else rows

    def in_memory(self) -> tuple[Batch, tuple[str, ...]]:
        """Rows of memory for a sum over them, and the partitions that it exposes.

        Raises:
            PrivacyError: under privacy, where a record may be stored twice.
        """
        if self._mechanism:
            refuse_shared_partitions(self.experiences)
        back = self.back
        names = [experience.train.partition for experience in self.experiences]
        rows = self.pool.current.take(slice(0, 0)) if back is None else back
        return rows, tuple(name for name in names if name not in self.left)

    def synthetic(self, n: int, context: Context) -> Batch:
        """Return n rows like those of the open pool that owe nothing to any record."""
        place = generator(self._seed, "synthetic")
        rows = {
            name: torch.zeros(n, *t.shape[1:], dtype=t.dtype)
            for name, t in self.rows.tensors().items()
        }
        classes = torch.nonzero(context.current).flatten().cpu()
        rows |= {
            "inputs": torch.rand(rows["inputs"].shape, generator=place).to(rows["inputs"].dtype),
            "labels": classes[torch.arange(n) % len(classes)],
            "valid": torch.ones(n, dtype=torch.bool),
            "tasks": torch.full((n,), self.experiences[-1].index),
        }
        return Batch.from_tensors(rows).map(lambda t: t.to(self.pool.device))

    def _pooled(self, current: Batch) -> Batch:
        """Rows that batches are drawn from in the role of new ones."""
        if self._plan.pool == "memory":
            return current.take(slice(0, 0)) if self.back is None else self.back
        if self._plan.pool == "experience":
            return current
        pooled = [e for e in self.experiences if e.train.partition not in self.left]
        return concatenate([Batch.current(e.train, e.index) for e in pooled])

    def _by_coin(self, mechanism: PrivateSum, asked: Mapping[str, Exposure]) -> None:
        """Lay out what is drawn by coins.

        The pool, and the stored rows of every reference gradient.
        """
        mechanism.open(self.experiences[-1].index)
        seen = self.experiences
        rows = self.pool.rows
        back = self.back
        self.drawings = {"gradient": PrivateSampler.of(rows, seen, self.exposure, "gradient")}
        for name, exposed in asked.items():
            stored = self.pool.current.take(slice(0, 0)) if back is None else replayed(back)
            own = (
                stored.tasks == int(name.split()[-1])
                if " " in name
                else torch.ones_like(stored.valid)
            )
            self.drawings[name] = PrivateSampler.of(stored.take(own), seen, exposed, name)
        kept = (
            {f"reference {n}": t for n, t in back.tensors().items()}
            if asked and back is not None
            else {}
        )
        self.fingerprint = mechanism.fingerprint({**rows.tensors(), **kept})

    # ------------------------------------------------------------------ its memory

    def _offer(self, new: Batch) -> None:
        """Offer the whole experience to memory, once."""
        plan = self._plan.memory
        memory = self.memory
        experience = self.experiences[-1]
        if plan is None or memory.latest >= experience.index:
            return
        if self._mechanism:
            offered = memory.offered + experience.train.declared_size
            memory.offer_by_coin(
                new, self._mechanism.tags(new.ids), min(1.0, plan.capacity / offered)
            )
            memory.offered = offered
        else:
            known = self._known(new, plan.selection) if plan.selection in MODELLED else None
            place = generator(self._seed, "memory", self._client, experience.index)
            memory.offer(new, plan, place, known, self._stages())
        memory.latest = experience.index

    def _stages(self) -> Tensor:
        """(T,) stage of every experience so far; the pieces of one stage share its quotas."""
        return torch.tensor([experience.task for experience in self.experiences])

    def _known(self, rows: Batch, selection: str) -> Tensor:
        """Features (n, f) of the rows, or their cross entropy (n,) over all classes."""
        ask = self._forward.features if selection == "herding" else self._forward
        with torch.no_grad(), evaluating(self._forward.module):
            answers = torch.cat([ask(piece) for piece in torch.split(rows.inputs, CHUNK)])
        return answers if selection == "herding" else cross_entropy_of(answers, rows.labels)

    def _note(self, remember: Remember) -> None:
        """Keep what is stored beside the new rows of the last step.

        It is computed at the parameters of the moment.
        """
        current = self.pool.current
        at = self._drawn[self._drawn < len(current)]
        new = remembered(current.take(at), remember, self._forward, alone=True)
        if not self._noted:
            self._noted = {
                n: t.new_zeros(len(current), *t.shape[1:]) for n, t in new.stored.items()
            }
            self._noted[WHEN] = torch.zeros(
                len(current), dtype=torch.bool, device=current.inputs.device
            )
        for name, value in new.stored.items():
            self._noted[name][at] = value
        self._noted[WHEN][at] = True

    def _as_noted(self, new: Batch) -> Batch:
        """Rows with what was noted of them, where anything was."""
        if not self._noted:
            return new
        when = self._noted[WHEN]
        stored = {
            name: torch.where(when.view(-1, *[1] * (value.dim() - 1)), self._noted[name], value)
            for name, value in new.stored.items()
        }
        return replace(new, stored=stored)


def remembered(rows: Batch, remember: Remember, forward: Forward, *, alone: bool = False) -> Batch:
    """Rows with what `remember` says beside them, in evaluation mode.

    Args:
        alone: ask it about each row by itself, so that what is stored beside a record depends on no
            other.
    """
    with torch.no_grad(), evaluating(forward.module):
        stored = (
            rows_one_by_one(remember, forward, rows)
            if alone and len(rows)
            else remember(forward, rows)
        )
    return replace(rows, stored={name: value.detach() for name, value in stored.items()})
