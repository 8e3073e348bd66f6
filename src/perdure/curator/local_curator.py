"""The curator holds private records and answers releases; nothing else ever touches them.

Without privacy a release is the exact sum, at full speed. With privacy every row is clipped, the
ledger is written, and only then noise is drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from perdure.contract.context import Context
from perdure.contract.forward import Forward
from perdure.contract.plan import Plan
from perdure.curator.held_records import HeldRecords, Remember
from perdure.curator.sampling import PrivateSampler, replayed
from perdure.data.experience import Experience
from perdure.data.records import Batch
from perdure.errors import PrivacyError
from perdure.planning.exposure import Exposure
from perdure.privacy.clipping.clip import WITHIN, Clip
from perdure.privacy.guard.loss_checks import check_losses
from perdure.privacy.noise.discrete import Frequency, Quantile, Utility, best, counted
from perdure.privacy.private_sum import PrivateSum, ReleaseKey
from perdure.queries.batch_gradients import Losses, clipped_gradient, mean_gradient
from perdure.queries.evaluation import bounded_sum, evaluate_on_synthetic, exact_sum, shapes_of
from perdure.queries.gram import Gram
from perdure.queries.per_record import CHUNK, Of, Query, numbers_of
from perdure.types import Params
from perdure.utils.hashing import digest
from perdure.utils.modules import evaluating, statistics_of

QUESTIONS = 16
"""Synthetic records that a question is tried on."""
Over = Literal["experience", "memory"]


class LocalCurator:
    """Holds the records of one party.

    Args:
        seed: of sampling and memory selection (without privacy).
        client: the party's number; 0 when there is only one.
        batch_size: new records a step.
        mechanism: clips, charges and noises; None for exact sums.
        micro_batch_size: rows of one pass through the model; None for a whole batch.
    """

    def __init__(
        self,
        *,
        seed: int,
        client: int = 0,
        batch_size: int,
        mechanism: PrivateSum | None = None,
        micro_batch_size: int | None = None,
    ) -> None:
        self._held = HeldRecords(
            seed=seed, client=client, batch_size=batch_size, mechanism=mechanism
        )
        self._mechanism = mechanism
        self._micro_batch_size = micro_batch_size
        self.private = mechanism is not None
        self._last_step: Diagnostics | None = None

    # ------------------------------------------------------------------ an experience

    def open(
        self, experiences: Sequence[Experience], plan: Plan, context: Context, forward: Forward
    ) -> None:
        """Pool the records of the current experience, earlier ones and memory as planned.

        The current experience is the last given.
        """
        self.context = context
        self._forward = forward
        self._releases = 0
        self._held.open(experiences, plan, forward)

    def reserve(self, steps: range, start: str) -> None:
        """Charge a block of steps to everyone exposed, before the first of them draws noise.

        Args:
            start: digest of everything but the records that determines what the steps do.
        """
        self._block = steps, start
        if self._mechanism and len(steps):
            exposed = self._held.exposure
            self._mechanism.reserve(
                scope=exposed.scope,
                steps=steps,
                start=start,
                data=self._held.fingerprint,
                expected=exposed.expected,
                slots=exposed.slots,
            )

    def sample(self, step: int) -> Batch:
        """Rows of one step.

        Under privacy they are drawn by coins over the whole pool, else shuffled, new and stored
        side by side.
        """
        batch, share = self._held.sample(step)
        if share != self.context.memory_share:
            self.context = replace(self.context, memory_share=share)
        return batch

    def observe(self, batch: Batch, remember: Remember) -> None:
        """Offer the new rows of a step to a memory that is updated every step.

        Under privacy a record's own coin decides for it at the end of the experience; what is
        stored beside it is that of the last step it was in.
        """
        self._held.observe(batch, remember)

    def store(self, remember: Remember) -> None:
        """Offer the finished experience to memory, where it was not offered before."""
        self._held.store(remember)

    def close(self) -> None:
        """Let go of the records of the experience."""
        self._held.close()

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Memory for a checkpoint's `private/` folder, and its public counts of offered rows."""
        return self._held.snapshot()

    def restore(
        self, private: Mapping[str, Tensor], facts: Mapping[str, int], device: str | torch.device
    ) -> None:
        """Undo `snapshot`."""
        self._held.restore(private, facts, device)

    def synthetic(self, n: int) -> Batch:
        """Return n rows like those of the open pool that owe nothing to any record."""
        return self._held.synthetic(n, self.context)

    @property
    def statistics(self) -> Params:
        """Running means and variances of the model now.

        None under privacy, where the guard allows no such layer.
        """
        return {} if self._mechanism else statistics_of(self._forward.module)

    @property
    def exposure(self) -> Exposure:
        """Who is exposed in a step of the open experience, and how often."""
        return self._held.exposure

    @property
    def exposures(self) -> dict[str, Exposure]:
        """Statistics by what is drawn in a private step: the gradient and every reference.

        None without privacy.
        """
        return {name: drawing.exposure for name, drawing in self._held.drawings.items()}

    @property
    def stored(self) -> int:
        """Number of rows in memory.

        Raises:
            PrivacyError: under privacy, where the number depends on the records.
        """
        self._open_to("the number of stored records")
        return len(self._held.memory)

    @property
    def diagnostics(self) -> "Diagnostics | None":
        """Statistics of the last step; None before the first.

        Raises:
            PrivacyError: under privacy, unless `Privacy(diagnostics="raw")` gave up the guarantee.
        """
        self._open_to("the loss, size and clipped share of a batch")
        return self._last_step

    # ------------------------------------------------------------------ releases

    def gradient(self, losses: Losses, params: Params, batch: Batch, step: int) -> Params:
        """Mean gradient of the rows' losses.

        Under privacy it is the noised sum of clipped gradients over the expected size.

        Guarantee: under privacy one record moves the sum by at most the clip norm, and the step was
        charged by `reserve` before its noise is drawn.
        """
        if self._mechanism:
            total = self._mechanism.gradient(
                partial(self._clipped, losses, params, batch), params, step=step
            )
            return {name: value / self.exposure.expected for name, value in total.items()}
        mean, loss = mean_gradient(self._forward, losses, params, batch, self._micro_batch_size)
        self._last_step = Diagnostics(rows=len(batch), loss=loss)
        return mean

    def reference(self, losses: Losses, params: Params, *, of: int | None = None) -> Params:
        """Mean gradient over stored rows, for a strategy whose plan keeps memory for references.

        As private as a step.

        Guarantee: that of `gradient`; every step of a block is charged before the first of its
        references is drawn.

        Args:
            of: the earlier experience whose rows are drawn; None for all, as the plan's `use` says.
                The gradient is 0 where there are none, because nothing was stored or the partitions
                left every pool.
        """
        name = "reference" if of is None else f"reference {of}"
        if self._mechanism is None:
            rows = self._held.recalled(of)
            return (
                nothing(params)
                if rows is None
                else mean_gradient(self._forward, losses, params, rows, self._micro_batch_size)[0]
            )
        if name not in self._held.drawings:
            if not self._held.planned(of):
                raise PrivacyError(
                    f"{name} was not planned; see MemoryPlan.use for what a memory may be kept for"
                )
            return nothing(params)
        drawing = self._held.drawings[name]
        step = self._held.step
        self._reserve_reference(self._mechanism, drawing, losses)
        batch = drawing.rows.take(drawing.positions(self._mechanism, step))
        clipped = partial(self._clipped, losses, params, batch)
        total = self._mechanism.reference(clipped, params, step=step, purpose=name)
        return {key: value / drawing.exposure.expected for key, value in total.items()}

    def release(
        self, query: Query, *, clip_norm: float, purpose: str, over: Over = "experience"
    ) -> Params:
        """Sum over records of clip(query(record), clip_norm), plus noise under privacy.

        Args:
            query: one row per record (see `perdure.queries.evaluation`).
            purpose: its name in the ledger.
            clip_norm: bound on the L2 norm of one record's row, all names together.
            over: the records of the current experience, or those in memory, which exposes all
                partitions seen.
        """
        rows, exposed = self._records(over)
        module = self._forward.module
        if self._mechanism is None:
            return exact_sum(query, self._forward, rows, CHUNK)
        data = rows.tensors()
        params = {name: value.detach() for name, value in module.named_parameters()}
        released = self._mechanism.release(
            lambda clip: bounded_sum(query, module, params, data, clip),
            purpose=purpose,
            occasion=self._occasion(
                evaluate_on_synthetic(query, self._forward, self.synthetic(QUESTIONS)),
                rows,
                exposed,
            ),
            shapes=shapes_of(query, self._forward, data),
            clip_norm=clip_norm,
        )
        return query.unpacked(released) if isinstance(query, Gram) else released

    def count(self, of: Of, *, bins: int, purpose: str) -> Tensor:
        """(bins,) int64: number of records of the current experience in each bin.

        Under privacy integer noise is added.

        Args:
            of: batch -> (n,) bins from 0 on, whole numbers; a record outside is in none.
            purpose: as in `release`.
        """
        rows, exposed = self._records("experience")
        counts = counted(numbers_of(of, rows, alone=self.private), bins, strict=not self.private)
        if self._mechanism is None:
            return counts
        shown = {"bins": numbers_of(of, self.synthetic(QUESTIONS), alone=True)}
        return self._mechanism.count(
            counts, purpose=purpose, occasion=self._occasion(shown, rows, exposed)
        )

    def select(self, of: Of, utility: Utility, *, purpose: str) -> Tensor:
        """(k,) int64: the places of the best scores, best first.

        Under privacy they are drawn by the exponential mechanism.

        Args:
            of: batch -> (n,) numbers, of which `utility` makes scores.
            purpose: as in `release`.
        """
        if type(utility) not in (Frequency, Quantile):
            raise PrivacyError(
                f"{type(utility).__name__} has no known sensitivity; allowed: Frequency, Quantile"
            )
        rows, exposed = self._records("experience")
        scores = utility.scores(numbers_of(of, rows, alone=self.private), strict=not self.private)
        if self._mechanism is None:
            return best(scores, utility.k)
        shown = {"numbers": numbers_of(of, self.synthetic(QUESTIONS), alone=True)}
        return self._mechanism.select(
            scores, purpose=purpose, occasion=self._occasion(shown, rows, exposed, utility.k)
        )

    def raw(self, reason: str) -> Batch:
        """Hand out the pooled records themselves; refused under privacy.

        Raises:
            PrivacyError: under privacy, where it would make epsilon infinite.
        """
        if self._mechanism:
            raise PrivacyError(
                f"raw records were asked for ({reason}): that has no finite epsilon; ask for "
                "a release instead, "
                "curator.release(query, clip_norm=...)"
            )
        return self._pool

    @property
    def signal_to_noise(self) -> float:
        """Estimated energy of the last gradient over that of its noise.

        It is a function of what was released.
        """
        return self._mechanism.signal_to_noise if self._mechanism else float("inf")

    @property
    def noise_variance(self) -> float:
        """Variance of the noise in one coordinate of the last gradient.

        It is that of the gradient as `gradient` gave it; 0 without privacy.
        """
        return (self._mechanism.deviation / self.exposure.expected) ** 2 if self._mechanism else 0.0

    @property
    def clip_norm(self) -> float:
        """The bound C on one record's gradient; infinite without privacy."""
        return self._mechanism.clip_norm if self._mechanism else float("inf")

    @property
    def declared_size(self) -> int:
        """Public number of records of the current experience."""
        return self._held.experiences[-1].train.declared_size

    # ------------------------------------------------------------------ inside

    @property
    def _pool(self) -> Batch:
        return self._held.rows

    def _records(self, over: Over) -> tuple[Batch, tuple[str, ...]]:
        """Rows that a release sums over, and the partitions that it exposes."""
        if over == "memory":
            return self._held.in_memory()
        return self._held.pool.current, (self._held.experiences[-1].train.partition,)

    def _reserve_reference(
        self, mechanism: PrivateSum, drawing: PrivateSampler, losses: Losses
    ) -> None:
        """Charge the block's reference gradients before the first is drawn.

        Another loss is another entry.
        """
        if mechanism.reserved(drawing.purpose):
            return
        steps, start = self._block
        exposed = drawing.exposure
        tried = self.synthetic(QUESTIONS)

        def of(inputs: Tensor, labels: Tensor) -> Tensor:
            rows = replayed(tried).take(slice(0, len(inputs)))
            return losses(self._forward, replace(rows, inputs=inputs, labels=labels))

        with torch.no_grad(), evaluating(self._forward.module):
            check_losses(of, tried.inputs, tried.labels, f"the losses of {drawing.purpose!r}")
            shown = digest({"losses": losses(self._forward, replayed(tried))}).hex()
        mechanism.reserve(
            scope=exposed.scope,
            steps=steps,
            start=start + shown,
            data=self._held.fingerprint,
            expected=exposed.expected,
            purpose=drawing.purpose,
        )

    def _clipped(self, losses: Losses, params: Params, batch: Batch, clip: Clip) -> Params | None:
        """Clipped sum by book-keeping where every layer has a rule, else record by record."""
        if not self._raw_diagnostics:
            return self._sum(losses, params, batch, clip)
        total = self._sum(losses, params, batch, replace(clip, counted=True)) or {}
        within = float(total.get(WITHIN, 0.0)) if clip.counted else float(total.pop(WITHIN, 0.0))
        with torch.no_grad():
            loss = losses(self._forward, batch).sum() / max(1, len(batch))
        self._last_step = Diagnostics(
            rows=len(batch), loss=loss, clipped=0.5 - within / max(1, len(batch))
        )
        return total or None

    def _sum(self, losses: Losses, params: Params, batch: Batch, clip: Clip) -> Params | None:
        return clipped_gradient(self._forward, losses, params, batch, clip, self._micro_batch_size)

    @property
    def _raw_diagnostics(self) -> bool:
        return self._mechanism is not None and self._mechanism.privacy.diagnostics == "raw"

    def _open_to(self, what: str) -> None:
        if self._mechanism and not self._raw_diagnostics:
            raise PrivacyError(
                f"{what} would leave the curator without noise; signal_to_noise is free, a "
                "release is paid for, and "
                "Privacy(diagnostics='raw') shows it and labels the run as not private"
            )

    def _occasion(
        self, shown: Params, rows: Batch, exposed: tuple[str, ...], releases: int = 1
    ) -> ReleaseKey:
        """The next release (or releases) of the experience.

        Args:
            shown: what the question makes of synthetic records. It keys the noise: another question
                is another entry, also where its answer happens to be the same, which would tell
                that it is.
            rows: that it is asked about.
            exposed: their partitions.
        """
        self._releases += releases
        return ReleaseKey(
            partitions=exposed,
            data=rows.tensors(),
            numbers=range(self._releases - releases, self._releases),
            start=digest(
                {**dict(self._forward.module.named_parameters()), **prefixed(shown)}
            ).hex(),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Diagnostics:
    """What one step saw of the records.

    Args:
        rows: how many.
        loss: () their mean loss.
        clipped: share of them that was clipped; 0 without privacy.
    """

    rows: int
    loss: Tensor
    clipped: float = 0.0


def nothing(params: Params) -> Params:
    """A gradient of 0."""
    return {name: torch.zeros_like(value) for name, value in params.items()}


def prefixed(shown: Params) -> Params:
    """The same under names that no parameter has."""
    return {f"shown {name}": value.detach() for name, value in shown.items()}
