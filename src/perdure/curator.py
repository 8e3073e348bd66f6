"""The curator holds private records and answers releases; nothing else ever touches them.

Without privacy a release is the exact sum, at full speed. With privacy every row is clipped, the ledger is written,
and only then noise is drawn.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from perdure.errors import DataError, PrivacyError
from perdure.facts import exposure
from perdure.fisher import CHUNK
from perdure.gradients import Losses, clipped_gradient, mean_gradient
from perdure.identity import copies, owners
from perdure.memory import Memory, concatenate
from perdure.privacy.clipping import WITHIN, Clip
from perdure.privacy.discrete import Frequency, Quantile, Utility, best, counted
from perdure.privacy.mechanism import Mechanism, Occasion, digest
from perdure.queries import Gram, Of, Query, bounded_sum, exact_sum, numbers_of, shapes_of, tried
from perdure.records import Batch, Params, Records
from perdure.seeds import generator
from perdure.strategy import Context, Forward, Plan
from perdure.streams import Experience

QUESTIONS = 16
"""Synthetic records that a question is tried on."""


class Curator:
    """Holds the records of one party.

    Args:
        seed: of sampling and memory selection (without privacy).
        client: the party's number; 0 when there is only one.
        batch_size: new records a step.
        mechanism: clips, charges and noises; None for exact sums.
        micro_batch_size: rows of one pass through the model; None for a whole batch.
    """

    def __init__(
        self, *, seed: int, client: int = 0, batch_size: int, mechanism: Mechanism | None = None,
        micro_batch_size: int | None = None,
    ) -> None:  # fmt: skip
        self._memory = Memory()
        self.private = mechanism is not None
        self._seed, self._client, self._batch_size, self._mechanism = seed, client, batch_size, mechanism
        self._rows: Batch | None = None
        self._at_once = micro_batch_size
        self._seen: Diagnostics | None = None

    # ------------------------------------------------------------------ an experience

    def open(self, experiences: Sequence[Experience], plan: Plan, context: Context, forward: Forward) -> None:
        """Pool the records of the current experience (the last given), earlier ones and memory as planned."""
        self.context, self._plan, self._experience, self._forward = context, plan, experiences[-1], forward
        mechanism, index = self._mechanism, experiences[-1].index
        left = mechanism.schedule.left_in(index) if mechanism else frozenset()
        first = 0 if plan.pool == "all" else len(experiences) - 1
        pooled = [e for e in experiences[first:] if e.train.partition not in left]
        self._new = concatenate([Batch.current(e.train, e.index) for e in pooled])
        self._stored = self._memory.rows if plan.memory and len(self._memory) else None
        if self._stored is not None and left:
            self._stored = without(self._stored, [e.index for e in experiences if e.train.partition in left])
        if self._stored is not None:
            self._new = with_blanks(self._new, self._stored.stored)
        self._rows = self._new if self._stored is None else concatenate([self._new, _replayed(self._stored)])
        if not len(self._rows) and not mechanism:
            raise DataError(f"experience {index} has no training records; leave it out of the stream")
        rate, bands = (mechanism.privacy.sampling_rate, mechanism.privacy.bands) if mechanism else (None, None)
        self.exposure = exposure(experiences, plan, batch_size=self._batch_size, rate=rate, bands=bands, left=left)
        if mechanism:
            refuse_shared_ids(experiences[-1].train)
            mechanism.open(index)
            self._copies = copies(self._rows.ids, owners(self._rows.tasks, experiences))
            self._fingerprint = mechanism.fingerprint(self._rows.tensors())
        self._orders: dict[str, tuple[int, Tensor]] = {}
        self._releases = 0

    def reserve(self, steps: range, start: str) -> None:
        """Charge a block of steps to everyone exposed, before the first of them draws noise.

        Args:
            start: digest of everything but the records that determines what the steps do.
        """
        if self._mechanism:
            exposed = self.exposure
            self._mechanism.reserve(
                scope=exposed.scope, steps=steps, start=start, data=self._fingerprint, expected=exposed.expected,
                slots=exposed.slots,
            )  # fmt: skip

    def sample(self, step: int) -> Batch:
        """Rows of one step: by coins over the whole pool under privacy, else shuffled, new and stored side by side."""
        if self._mechanism:
            return self._pool.take(self._drawn(self._mechanism, step).to(self._device))
        index = self._shuffled("new", len(self._new), self._batch_size, step)
        if self._stored is not None and self._plan.memory:
            size = self._plan.memory.batch_size or self._batch_size
            stored = self._shuffled("memory", len(self._stored), size, step)
            index = torch.cat([index, stored + len(self._new)])
        return self._pool.take(index.to(self._device))

    def close(self, remember: Callable[[Forward, Batch], Mapping[str, Tensor]]) -> None:
        """Offer the finished experience to memory and let go of its records."""
        plan, index = self._plan.memory, self._experience.index
        if plan:
            new = self._current()
            with torch.no_grad():
                stored = {f"stored.{name}": value for name, value in remember(self._forward, new).items()}
            new = Batch.from_tensors(new.tensors() | stored)
            if self._mechanism:
                offered = self._memory.offered + self._experience.train.declared_size
                tags = self._mechanism.tags(new.ids)
                self._memory.offer_by_coin(new, tags, min(1.0, plan.capacity / offered))
                self._memory.offered = offered
            else:
                self._memory.offer(new, plan, generator(self._seed, "memory", self._client, index))
        self._rows = self._stored = None
        self._new = self._new.take(slice(0, 0))

    @property
    def stored(self) -> int:
        """Number of rows in memory.

        Raises:
            PrivacyError: under privacy, where the number depends on the records.
        """
        self._open_to("the number of stored records")
        return len(self._memory)

    @property
    def diagnostics(self) -> "Diagnostics | None":
        """Statistics of the last step; None before the first.

        Raises:
            PrivacyError: under privacy, unless `Privacy(diagnostics="raw")` gave up the guarantee.
        """
        self._open_to("the loss, size and clipped share of a batch")
        return self._seen

    def snapshot(self) -> tuple[dict[str, Tensor], int]:
        """Memory for a checkpoint's `private/` folder, and how many records it was offered by declared sizes."""
        rows = self._memory.rows
        kept = {f"memory.{name}": value for name, value in rows.tensors().items()} if rows is not None else {}
        return kept | {"tags": self._memory.tags}, self._memory.offered

    def restore(self, private: Mapping[str, Tensor], offered: int, device: str | torch.device) -> None:
        """Undo `snapshot`."""
        rows = {n.removeprefix("memory."): t.to(device) for n, t in private.items() if n != "tags"}
        kept = Batch.from_tensors(rows) if rows else None
        self._memory = Memory(rows=kept, offered=offered, tags=private["tags"])

    def synthetic(self, n: int) -> Batch:
        """Return n rows like those of the open pool that owe nothing to any record."""
        place = generator(self._seed, "synthetic")
        rows = {name: torch.zeros(n, *t.shape[1:], dtype=t.dtype) for name, t in self._pool.tensors().items()}
        classes = torch.nonzero(self.context.current).flatten().cpu()
        rows |= {
            "inputs": torch.rand(rows["inputs"].shape, generator=place).to(rows["inputs"].dtype),
            "labels": classes[torch.arange(n) % len(classes)], "valid": torch.ones(n, dtype=torch.bool),
            "tasks": torch.full((n,), self._experience.index),
        }  # fmt: skip
        return Batch.from_tensors(rows).map(lambda t: t.to(self._device))

    # ------------------------------------------------------------------ releases

    def gradient(self, losses: Losses, params: Params, batch: Batch, step: int) -> Params:
        """Mean gradient of the rows' losses; under privacy the noised sum of clipped ones over the expected size.

        Guarantee: under privacy one record moves the sum by at most the clip norm, and the step was charged by
        `reserve` before its noise is drawn.
        """
        if self._mechanism:
            total = self._mechanism.gradient(partial(self._clipped, losses, params, batch), params, step=step)
            return {name: value / self.exposure.expected for name, value in total.items()}
        mean, loss = mean_gradient(self._forward, losses, params, batch, self._at_once)
        self._seen = Diagnostics(rows=len(batch), loss=loss)
        return mean

    def release(self, query: Query, *, clip_norm: float, purpose: str) -> Params:
        """Sum over the current experience's records of clip(query(record), clip_norm), plus noise under privacy.

        Args:
            query: one row per record (see `perdure.queries`). purpose: its name in the ledger.
            clip_norm: bound on the L2 norm of one record's row, all names together.
        """
        current, module = self._current(), self._forward.module
        if self._mechanism is None:
            return exact_sum(query, self._forward, current, CHUNK)
        data, params = current.tensors(), {name: value.detach() for name, value in module.named_parameters()}
        released = self._mechanism.release(
            lambda clip: bounded_sum(query, module, params, data, clip), purpose=purpose,
            occasion=self._occasion(tried(query, self._forward, self.synthetic(QUESTIONS))),
            shapes=shapes_of(query, self._forward, data), clip_norm=clip_norm,
        )  # fmt: skip
        return query.unpacked(released) if isinstance(query, Gram) else released

    def count(self, of: Of, *, bins: int, purpose: str) -> Tensor:
        """(bins,) int64: how many records of the current experience are in each bin, plus integer noise under privacy.

        Args:
            of: batch -> (n,) bins from 0 on, whole numbers; a record outside is in none. purpose: as in `release`.
        """
        counts = counted(numbers_of(of, self._current(), alone=self.private), bins, strict=not self.private)
        if self._mechanism is None:
            return counts
        shown = {"bins": numbers_of(of, self.synthetic(QUESTIONS), alone=True)}
        return self._mechanism.count(counts, purpose=purpose, occasion=self._occasion(shown))

    def select(self, of: Of, utility: Utility, *, purpose: str) -> Tensor:
        """(k,) int64: the places of the best scores, best first; drawn by the exponential mechanism under privacy.

        Args:
            of: batch -> (n,) numbers, of which `utility` makes scores. purpose: as in `release`.
        """
        if type(utility) not in (Frequency, Quantile):
            raise PrivacyError(f"{type(utility).__name__} has no known sensitivity; allowed: Frequency, Quantile")
        scores = utility.scores(numbers_of(of, self._current(), alone=self.private), strict=not self.private)
        if self._mechanism is None:
            return best(scores, utility.k)
        shown = {"numbers": numbers_of(of, self.synthetic(QUESTIONS), alone=True)}
        return self._mechanism.select(scores, purpose=purpose, occasion=self._occasion(shown, utility.k))

    def raw(self, reason: str) -> Batch:
        """Hand out the pooled records themselves; refused under privacy.

        Raises:
            PrivacyError: under privacy, where it would make epsilon infinite.
        """
        if self._mechanism:
            raise PrivacyError(
                f"raw records were asked for ({reason}): that has no finite epsilon; ask for a release instead, "
                "curator.release(query, clip_norm=...)"
            )
        return self._pool

    @property
    def signal_to_noise(self) -> float:
        """Estimated energy of the last gradient over that of its noise; a function of what was released."""
        return self._mechanism.signal_to_noise if self._mechanism else float("inf")

    @property
    def clip_norm(self) -> float:
        """The bound C on one record's gradient; infinite without privacy."""
        return self._mechanism.clip_norm if self._mechanism else float("inf")

    @property
    def declared_size(self) -> int:
        """Public number of records of the current experience."""
        return self._experience.train.declared_size

    # ------------------------------------------------------------------ inside

    @property
    def _pool(self) -> Batch:
        if self._rows is None:
            raise PrivacyError("the curator holds no open experience; call open() first")
        return self._rows

    @property
    def _device(self) -> torch.device:
        return self._pool.inputs.device

    def _drawn(self, mechanism: Mechanism, step: int) -> Tensor:
        """Positions of a private step's rows: each record by its own coin, or at its own place of the epoch."""
        records, exposed = self._copies, self.exposure
        coins = mechanism.coins(len(records.counts), step)
        if exposed.slots is None:
            hit = coins < exposed.rate
            return records.rows(hit, coins[hit] / exposed.rate)  # below the rate, divided by it: uniform again
        place = (mechanism.tags(records.ids, "place in an epoch") * exposed.slots).long()
        hit = place == step % exposed.slots
        return records.rows(hit, coins[hit])

    def _shuffled(self, what: str, n: int, size: int, step: int) -> Tensor:
        """Positions of one batch in a fresh order every epoch; the last batch of an epoch may be smaller."""
        epoch, i = divmod(step, -(-n // size))
        if self._orders.get(what, (-1,))[0] != epoch:
            place = ("order", what, self._client, self._experience.index, epoch)
            self._orders[what] = (epoch, torch.randperm(n, generator=generator(self._seed, *place)))
        return self._orders[what][1][i * size : (i + 1) * size]

    def _clipped(self, losses: Losses, params: Params, batch: Batch, clip: Clip) -> Params | None:
        """Clipped sum by book-keeping where every layer has a rule, else record by record."""
        if not self._shows:
            return self._sum(losses, params, batch, clip)
        total = self._sum(losses, params, batch, replace(clip, counted=True)) or {}
        within = float(total.get(WITHIN, 0.0)) if clip.counted else float(total.pop(WITHIN, 0.0))
        with torch.no_grad():
            loss = losses(self._forward, batch).sum() / max(1, len(batch))
        self._seen = Diagnostics(rows=len(batch), loss=loss, clipped=0.5 - within / max(1, len(batch)))
        return total or None

    def _sum(self, losses: Losses, params: Params, batch: Batch, clip: Clip) -> Params | None:
        return clipped_gradient(self._forward, losses, params, batch, clip, self._at_once)

    @property
    def _shows(self) -> bool:
        return self._mechanism is not None and self._mechanism.privacy.diagnostics == "raw"

    def _open_to(self, what: str) -> None:
        if self._mechanism and not self._shows:
            raise PrivacyError(
                f"{what} would leave the curator without noise; signal_to_noise is free, a release is paid for, and "
                "Privacy(diagnostics='raw') shows it and labels the run as not private"
            )

    def _current(self) -> Batch:
        """Return the rows of the current experience alone, also where earlier ones are pooled with it."""
        mine = self._new.tasks == self._experience.index
        return self._new if bool(mine.all()) else self._new.take(mine)

    def _occasion(self, shown: Params, releases: int = 1) -> Occasion:
        """The next release (or releases) of the experience.

        Args:
            shown: what the question makes of synthetic records. It keys the noise: another question is another entry,
                also where its answer happens to be the same, which would tell that it is.
        """
        self._releases += releases
        return Occasion(
            partition=self._experience.train.partition, data=self._current().tensors(),
            numbers=range(self._releases - releases, self._releases),
            start=digest({**dict(self._forward.module.named_parameters()), **prefixed(shown)}).hex(),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Diagnostics:
    """What one step saw of the records.

    Args:
        rows: how many. loss: () their mean loss. clipped: share of them that was clipped; 0 without privacy.
    """

    rows: int
    loss: Tensor
    clipped: float = 0.0


def prefixed(shown: Params) -> Params:
    """The same under names that no parameter has."""
    return {f"shown {name}": value.detach() for name, value in shown.items()}


def without(rows: Batch, tasks: Sequence[int]) -> Batch:
    """Rows of other experiences than `tasks`."""
    return rows.take(~torch.isin(rows.tasks, torch.tensor(tasks, device=rows.tasks.device)))


def refuse_shared_ids(records: Records) -> None:
    """Refuse records that count as one record although a release has a row for each of them."""
    if len(torch.unique(records.ids)) < len(records):
        raise PrivacyError(
            f"records of {records.partition!r} share an id: a release would count one record twice; "
            "give every record of an experience its own id"
        )


def with_blanks(new: Batch, stored: Mapping[str, Tensor]) -> Batch:
    """New rows with zeros where memory rows have something stored, so that both fit into one batch."""
    blanks = {f"stored.{name}": value.new_zeros(len(new), *value.shape[1:]) for name, value in stored.items()}
    return Batch.from_tensors(new.tensors() | blanks)


def _replayed(stored: Batch) -> Batch:
    return Batch.from_tensors(stored.tensors() | {"from_memory": torch.ones_like(stored.from_memory)})
