"""Curator of one party, which answers all queries about its private records.

Without privacy a release is the exact sum, at full speed. With privacy every row is clipped, the
ledger is written, and only then is noise drawn.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from perdure.contract.context import Context
from perdure.contract.curator import Losses, Of, Over, Query, Utility
from perdure.contract.exposure import Exposure
from perdure.curator.diagnostics import Diagnostics
from perdure.curator.held_records import HeldRecords
from perdure.curator.sampling import PrivateSampler, replayed
from perdure.data.records import Batch
from perdure.errors import PrivacyError
from perdure.privacy.clipping.clip import WITHIN, Clip
from perdure.privacy.guard.loss_checks import check_losses
from perdure.privacy.guard.neighbour_checks import check_neighbours, explained
from perdure.privacy.guard.probes import neighbours
from perdure.privacy.noise.discrete import Frequency, Quantile, best, counted
from perdure.privacy.private_sum import ChangedSumError, PrivateSum, ReleaseKey
from perdure.queries.batch_gradients import clipped_gradient, divided, mean_gradient
from perdure.queries.evaluation import (
    bounded_sum,
    evaluate_on_synthetic,
    exact_sum,
    shapes_of,
    unpacked,
)
from perdure.queries.per_record import CHUNK, numbers_of
from perdure.types import Params
from perdure.utils.hashing import digest
from perdure.utils.modules import evaluating, statistics_of
from perdure.utils.seeding import generator

Watched = Callable[[bool], AbstractContextManager[None]]
"""Function that returns a context manager, which refuses writes to tensors in a private pass.

Its argument is True to compare values, and False to compare version counters only.
"""

SYNTHETIC_RECORDS = 16
"""Number of synthetic records on which a query is evaluated, to tell different queries apart."""


def unwatched(values: bool) -> AbstractContextManager[None]:
    """Return a context manager for a forward pass in which writes to tensors are not checked."""
    return nullcontext()


@contextmanager
def noted() -> Iterator[None]:
    """Context manager that adds a note to an error of a query on synthetic records."""
    try:
        yield
    except Exception as error:
        error.add_note(
            "this error came from a test with synthetic records (single ones, extreme values, NaN "
            "and infinity), because an error on private records would reveal information about them"
        )
        raise


class LocalCurator:
    """Curator that answers queries about the records of one party (see `perdure.Curator`).

    Args:
        held: the records, and the private sum that adds noise.
        micro_batch_size: number of rows in one pass through the model; None for a whole batch.
        alone: run the model on each record alone in private gradients.
        watched: function that returns a context manager for a private pass, which refuses writes
            to parameters, buffers and state.
    """

    def __init__(
        self,
        held: HeldRecords,
        *,
        micro_batch_size: int | None = None,
        alone: bool = False,
        watched: Watched = unwatched,
    ) -> None:
        self._held = held
        self._micro_batch_size = micro_batch_size
        self._alone = alone
        self._watched = watched
        self._last_step: Diagnostics | None = None

    # ------------------------------------------------------------------ public facts

    @property
    def step(self) -> int:
        """Number of the current step in the open experience; -1 before the first step."""
        return self._held.step

    @property
    def private(self) -> bool:
        """True if answers are noisy and charged to the ledger."""
        return self._held.private_sum is not None

    @property
    def context(self) -> Context:
        """Public facts of the open experience."""
        return self._held.context

    @property
    def statistics(self) -> Params:
        """Current running means and variances of the model; empty under privacy."""
        return {} if self._held.private_sum else statistics_of(self._held.forward.module)

    @property
    def exposure(self) -> Exposure:
        """Exposure of every partition in a step of the open experience."""
        return self._held.exposure

    @property
    def exposures(self) -> dict[str, Exposure]:
        """Exposure for every sum of a private step: the gradient and its reference gradients."""
        return {name: sampler.exposure for name, sampler in self._held.samplers.items()}

    @property
    def signal_to_noise(self) -> float:
        """Estimated ratio of the last gradient's energy to its noise's energy, from the release."""
        return self._held.private_sum.signal_to_noise if self._held.private_sum else float("inf")

    @property
    def noise_variance(self) -> float:
        """Variance of the noise in one coordinate of the last gradient; 0 without privacy."""
        if self._held.private_sum is None:
            return 0.0
        return (self._held.private_sum.deviation / self.exposure.expected) ** 2

    @property
    def clip_norm(self) -> float:
        """The bound C on one record's gradient; infinite without privacy."""
        return self._held.private_sum.clip_norm if self._held.private_sum else float("inf")

    @property
    def declared_size(self) -> int:
        """Declared number of records of the open experience."""
        return self._held.experiences[-1].train.declared_size

    def synthetic(self, n: int) -> Batch:
        """Return n random rows with the pool's shapes and dtypes, independent of the data."""
        return self._held.synthetic(n)

    # ------------------------------------------------------------------ refused under privacy

    @property
    def stored(self) -> int:
        """Number of rows in memory.

        Raises:
            PrivacyError: under privacy, because the number depends on the records.
        """
        self._refuse_raw("the number of stored records")
        return len(self._held.memory)

    @property
    def diagnostics(self) -> "Diagnostics | None":
        """Statistics of the last step; None before the first step.

        Raises:
            PrivacyError: under privacy, unless `Privacy(diagnostics="raw")` removes the guarantee.
        """
        self._refuse_raw("the loss, size and clipped share of a batch")
        return self._last_step

    def raw(self, reason: str) -> Batch:
        """Return the pooled records themselves, without noise.

        Raises:
            PrivacyError: under privacy, because epsilon would be infinite.
        """
        if self._held.private_sum:
            raise PrivacyError(
                f"raw records were asked for ({reason}), which has no finite epsilon; use a "
                "release instead, curator.release(query, clip_norm=...)"
            )
        return self._held.rows

    # ------------------------------------------------------------------ releases

    def gradient(self, losses: Losses, params: Params, batch: Batch, step: int) -> Params:
        """Mean gradient of the rows' losses; under privacy, the noisy sum over the expected size.

        Guarantee: under privacy one record changes the sum by at most the clip norm, and
        `HeldRecords.reserve` charged the step before its noise is drawn.

        Args:
            losses: function from (forward, batch) to one loss per row.
            params: parameters of the gradient.
            batch: rows of the step.
            step: number of the step in the experience.
        """
        if self._held.private_sum:
            clipped = partial(self._clipped, losses, params, batch)
            total = self._held.private_sum.gradient(clipped, params, step=step)
            return divided(total, self.exposure.expected, params)
        mean, found = self._mean(losses, params, batch)
        self._last_step = Diagnostics(rows=len(batch), losses=found)
        return mean

    def reference(self, losses: Losses, params: Params, *, of: int | None = None) -> Params:
        """Mean gradient over rows of memory, for a strategy whose plan keeps memory for references.

        Guarantee: as for `gradient`; every step of a block is charged before its first reference is
        drawn.

        Args:
            losses: function from (forward, batch) to one loss per row.
            params: parameters of the gradient.
            of: earlier experience whose rows are drawn; None for all, depending on the plan's
                `use`. The gradient is 0 if there are no rows, because nothing was stored or the
                partitions are excluded from every pool.

        Raises:
            PrivacyError: if the plan does not contain the reference.
        """
        name = "reference" if of is None else f"reference {of}"
        if self._held.private_sum is None:
            rows = self._held.reference_rows(of)
            return zeros_like(params) if rows is None else self._mean(losses, params, rows)[0]
        if name not in self._held.samplers:
            if not self._held.plans_reference(of):
                raise PrivacyError(
                    f"the gradient {name!r} was not planned, so no ledger entry covers it; return "
                    "a plan that reads it, Plan(memory=MemoryPlan(use='reference'))"
                )
            return zeros_like(params)
        sampler = self._held.samplers[name]
        step = self._held.step
        self._reserve_reference(self._held.private_sum, sampler, losses, params)
        total = None
        while total is None:
            batch = sampler.rows.take(sampler.positions(self._held.private_sum, step))
            clipped = partial(self._clipped, losses, params, batch)
            # If the step was charged again, its rows are drawn again.
            with suppress(ChangedSumError):
                total = self._held.private_sum.reference(clipped, params, step=step, purpose=name)
        return divided(total, sampler.exposure.expected, params)

    def release(
        self, query: Query, *, clip_norm: float, purpose: str, over: Over = "experience"
    ) -> Params:
        """Sum of query(record) over records; under privacy, rows are clipped and noise is added.

        Without privacy the sum is exact: nothing is clipped.

        Args:
            query: query with one row per record, a tensor or named tensors (see `perdure.queries`).
            clip_norm: bound on the L2 norm of one record's row, all names together; used under
                privacy only.
            purpose: name of the release in the ledger.
            over: "experience" for the records of the open experience; "memory" for the stored
                records, which exposes all partitions so far.
        """
        rows, exposed = self._rows_over(over)
        forward = self._held.forward
        if self._held.private_sum is None:
            return exact_sum(query, forward, rows, CHUNK)
        module = forward.module
        data = rows.tensors()
        params = {name: value.detach() for name, value in module.named_parameters()}
        with self._watched(True), noted():
            probes = self._held.probes().tensors()
            bounded_sum(query, module, params, probes, Clip(norm=clip_norm))
        shown = evaluate_on_synthetic(query, forward, self.synthetic(SYNTHETIC_RECORDS))

        def clipped(clip: Clip) -> Params | None:
            with self._watched(True):
                return bounded_sum(query, module, params, data, clip)

        released = self._held.private_sum.release(
            clipped,
            purpose=purpose,
            occasion=self._release_key(shown, rows, exposed),
            shapes=shapes_of(query, forward, data),
            clip_norm=clip_norm,
        )
        return unpacked(query, released)

    def count(self, of: Of, *, bins: int, purpose: str) -> Tensor:
        """Return (bins,) int64 numbers of records in each bin, plus integer noise under privacy.

        Args:
            of: function from a batch to (n,) bins, whole numbers from 0; a record outside is not
                counted.
            bins: public number of bins.
            purpose: name of the release in the ledger.
        """
        rows, exposed = self._held.rows_of_experience()
        self._try_on_probes(of)
        with self._watched(True):
            numbers = numbers_of(of, rows, alone=self.private)
        counts = counted(numbers, bins, strict=not self.private)
        if self._held.private_sum is None:
            return counts
        shown = {"bins": numbers_of(of, self.synthetic(SYNTHETIC_RECORDS), alone=True)}
        key = self._release_key(shown, rows, exposed)
        return self._held.private_sum.count(counts, purpose=purpose, occasion=key)

    def select(self, of: Of, utility: Utility, *, purpose: str) -> Tensor:
        """(k,) int64 positions of the best scores; under privacy, by the exponential mechanism.

        Args:
            of: function from a batch to (n,) numbers, from which `utility` computes the scores.
            utility: `Frequency` or `Quantile`.
            purpose: name of the release in the ledger.

        Raises:
            PrivacyError: if the utility has no known sensitivity.
        """
        if type(utility) not in (Frequency, Quantile):
            name = type(utility).__name__
            raise PrivacyError(
                f"utility {name} has no known sensitivity; allowed utilities: Frequency, Quantile"
            )
        rows, exposed = self._held.rows_of_experience()
        self._try_on_probes(of)
        with self._watched(True):
            numbers = numbers_of(of, rows, alone=self.private)
        scores = utility.scores(numbers, strict=not self.private)
        if self._held.private_sum is None:
            return best(scores, utility.k)
        shown = {"numbers": numbers_of(of, self.synthetic(SYNTHETIC_RECORDS), alone=True)}
        key = self._release_key(shown, rows, exposed, utility.k)
        return self._held.private_sum.select(scores, purpose=purpose, occasion=key)

    # ------------------------------------------------------------------ inside

    def _try_on_probes(self, of: Of) -> None:
        """Run the function `of` on synthetic records, before it runs on private ones.

        An error on private records would reveal information about them.
        """
        if self.private:
            with self._watched(True), noted():
                numbers_of(of, self._held.probes(), alone=True)

    def _rows_over(self, over: Over) -> tuple[Batch, tuple[str, ...]]:
        """Rows that a release sums over, and the partitions that it exposes."""
        held = self._held
        return held.rows_of_memory() if over == "memory" else held.rows_of_experience()

    def _mean(self, losses: Losses, params: Params, rows: Batch) -> tuple[Params, Tensor]:
        return mean_gradient(self._held.forward, losses, params, rows, self._micro_batch_size)

    def _reserve_reference(
        self, private_sum: PrivateSum, sampler: PrivateSampler, losses: Losses, params: Params
    ) -> None:
        """Charge the reference gradients of a block before the first is drawn, once per loss."""
        if private_sum.reserved(sampler.purpose):
            return
        steps, start = self._held.block
        exposed = sampler.exposure
        synthetic = replayed(self.synthetic(SYNTHETIC_RECORDS))
        stored = self._held.synthetic_stored(SYNTHETIC_RECORDS)
        places = torch.arange(SYNTHETIC_RECORDS, device=stored.inputs.device)
        forward = self._held.forward

        def of(inputs: Tensor, at: Tensor) -> Tensor:
            return losses(forward, replace(stored.take(at), inputs=inputs))

        with torch.no_grad(), evaluating(forward.module):
            name = f"the losses of {sampler.purpose!r}"
            check_losses(of, stored.inputs, places, name)
            self._check_neighbours(losses, name)
            self._try_gradient(losses, params, synthetic, name)
            shown = digest({"losses": losses(forward, synthetic)}).hex()
        private_sum.reserve(
            scope=exposed.scope,
            steps=steps,
            start=start + shown,
            data=self._held.fingerprint,
            expected=exposed.expected,
            numbers=self._held.numbers,
            purpose=sampler.purpose,
        )

    def _try_gradient(self, losses: Losses, params: Params, rows: Batch, name: str) -> None:
        """Clip the gradients of many, of one and of no synthetic records, as a step will do."""
        for n in (len(rows), 1, 0):
            some = rows.take(slice(0, n))
            with torch.enable_grad(), self._watched(True), explained(name, f"{n} rows"):
                clipped_gradient(
                    self._held.forward,
                    losses,
                    params,
                    some,
                    Clip(norm=1.0),
                    self._micro_batch_size,
                    alone=self._alone,
                )

    def _check_neighbours(self, losses: Losses, name: str) -> None:
        """Refuse losses of a reference gradient in which a row depends on other rows."""
        private_sum = self._held.private_sum
        if self._alone or (private_sum and private_sum.independence == "by construction"):
            return
        forward = self._held.forward
        pairs = list(neighbours(self._held.domain, generator(0, "references")))
        n = len(pairs[0].one)
        rows = self._held.synthetic_stored(2 * n)
        device = rows.inputs.device

        def of(inputs: Tensor, at: Tensor) -> Tensor:
            return losses(forward, replace(rows.take(at), inputs=inputs))

        moved = [pair.to(device) for pair in pairs]
        places = torch.arange(2 * n, device=device)
        facts = (places[:n], places[n:].flip(0))
        with self._watched(True):
            check_neighbours(forward.module, of, moved, facts, name, layers=False)

    def _clipped(self, losses: Losses, params: Params, batch: Batch, clip: Clip) -> Params | None:
        """Clipped sum of the rows' gradients; raw diagnostics save loss and clipped share."""
        forward = self._held.forward
        size = self._micro_batch_size
        counting = replace(clip, counted=True) if self._raw_diagnostics else clip
        with self._watched(False):
            total = clipped_gradient(
                forward, losses, params, batch, counting, size, alone=self._alone
            )
        if not self._raw_diagnostics:
            return total
        total = total or {}
        within = float(total.get(WITHIN, 0.0))
        if not clip.counted:
            total.pop(WITHIN, None)
        with torch.no_grad():
            # no losses for an empty batch, on which a model may fail
            loss = losses(forward, batch).mean() if len(batch) else torch.zeros(())
        clipped = 0.5 - within / max(1, len(batch))
        self._last_step = Diagnostics(rows=len(batch), losses=loss, clipped=clipped)
        return total or None

    @property
    def _raw_diagnostics(self) -> bool:
        return (
            self._held.private_sum is not None
            and self._held.private_sum.privacy.diagnostics == "raw"
        )

    def _refuse_raw(self, what: str) -> None:
        if self._held.private_sum and not self._raw_diagnostics:
            raise PrivacyError(
                f"{what} has no noise, so it may not be read; use signal_to_noise (costs no "
                "privacy), a release (costs privacy), or Privacy(diagnostics='raw'), which shows "
                "it and labels the run as not private"
            )

    def _release_key(
        self, shown: Params, rows: Batch, exposed: tuple[str, ...], releases: int = 1
    ) -> ReleaseKey:
        """Key of the next release of the experience, or of several.

        Args:
            shown: results of the query on synthetic records. They are part of the key: another
                query gets another entry, and never the stored answer of this one.
            rows: records that the query is about.
            exposed: partitions of the records.
            releases: number of releases.
        """
        params: Mapping[str, Tensor] = dict(self._held.forward.module.named_parameters())
        # No parameter name has a space, so the names cannot be equal.
        answers = {f"shown {name}": value.detach() for name, value in shown.items()}
        return ReleaseKey(
            partitions=exposed,
            data=rows.tensors(),
            numbers=self._held.next_releases(releases),
            start=digest({**params, **answers}).hex(),
        )


def zeros_like(params: Params) -> Params:
    """Build a gradient that is 0 everywhere."""
    return {name: torch.zeros_like(value) for name, value in params.items()}
