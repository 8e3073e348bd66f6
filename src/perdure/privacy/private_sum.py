"""The private sum: charge the ledger, clip every record, add noise.

It knows nothing of learning.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor

from perdure.errors import PrivacyError
from perdure.privacy.adaptive_clipping import Adaptive
from perdure.privacy.clipping.clip import WITHIN, Clip
from perdure.privacy.grid import Grid
from perdure.privacy.ledger.entries import Entry, MechanismName, Stated
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.noise.banded import PARTS, BandedNoise
from perdure.privacy.noise.discrete import discrete_gaussian, exponential
from perdure.privacy.noise.draw_log import DrawLog
from perdure.privacy.noise.key import NoiseKey
from perdure.privacy.settings import Privacy
from perdure.types import Params, Tensors
from perdure.utils.hashing import JSONValue, canonical_text, digest
from perdure.utils.seeding import SECRET_BYTES

MakePrivateSum = Callable[..., "PrivateSum"]
"""Takes the arguments of `PrivateSum`; an audit gives another key through it."""
Clipped = Callable[[Clip], Params | None]
"""From the bound on a record to the clipped sum over records; None where there is no record."""


class ChangedSumError(PrivacyError):
    """A step that is executed again has another sum than noise was drawn for.

    The rest of its block was charged again, under a new entry. Draw the records of the step anew,
    by the coins of that entry, and ask again.
    """


VOTE = 0.5
"""How far one record moves the count beside an adaptive clip norm."""
WITHIN_SHAPE = {WITHIN: torch.Size([])}


class Draw(TypedDict):
    """Which noise of a key is drawn."""

    purpose: str
    entry: str
    step: int
    nonce: str


@dataclass(frozen=True, kw_only=True)
class Votes:
    """How the count beside an adaptive clip norm is noised.

    Args:
        grid: of the count.
        noise: standard deviation over what one record moves it by.
    """

    grid: Grid
    noise: float


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What is fixed before the first draw, experience by experience.

    Args:
        noise: noise multiplier of a step; the last one holds for all that follow.
        excluded: partitions that are out of every pool; empty where none ever is.
    """

    noise: tuple[float, ...]
    excluded: tuple[frozenset[str], ...] = ()

    def noise_in(self, index: int) -> float:
        """Noise multiplier of a step in experience `index`."""
        return self.noise[min(index, len(self.noise) - 1)]

    def excluded_in(self, index: int) -> frozenset[str]:
        """Partitions out of the pools in experience `index`."""
        if not self.excluded:
            return frozenset()
        return self.excluded[min(index, len(self.excluded) - 1)]


@dataclass(frozen=True, kw_only=True)
class ReservedSteps:
    """Steps that a ledger entry pays for.

    Args:
        entry: in the ledger.
        steps: which.
        expected: declared number of records in one of them.
        slots: steps an epoch where the order is fixed.
        grid: that their sums are counted on.
        drawn: the step that is drawn next.
    """

    entry: Entry
    steps: range
    expected: float
    slots: int | None
    grid: Grid
    drawn: int

    @property
    def paid_by(self) -> str:
        """Digest of the entry."""
        return self.entry.digest


@dataclass(frozen=True, kw_only=True, eq=False)
class ReleaseKey:
    """Which of an experience's releases an answer is, and what its noise is keyed by.

    Args:
        partitions: whose records are exposed, each once (sampling rate 1).
        numbers: its places among the releases, so that two of one purpose are two entries with
            noise of their own.
        start: digest of the model.
        data: the records, for the entry's keyed fingerprint.
    """

    partitions: tuple[str, ...]
    numbers: range
    start: str
    data: Tensors


class PrivateSum:
    """Sums over records with noise, and the ledger that they are charged to.

    Guarantee: every sum that leaves was charged to the ledger, on disk, before its noise was drawn;
    one record moves it by at most the clip norm before noise.

    Args:
        privacy: what was asked.
        schedule: what was calibrated.
        ledger: where it is charged.
        key: of noise and coins.
        draws: log of the sums that noise was drawn for; None keeps one in memory.
        independence: by what the gradients of records are known to be independent (see
            `perdure.privacy.guard`); "" where nothing is known.
    """

    def __init__(
        self,
        *,
        privacy: Privacy,
        schedule: Schedule,
        ledger: Ledger,
        key: NoiseKey,
        draws: DrawLog | None = None,
        independence: Stated = "",
    ) -> None:
        self.independence: Stated = independence
        self.privacy = privacy
        self.schedule = schedule
        self.ledger = ledger
        self._key = key
        self._draws = DrawLog(None, key) if draws is None else draws
        self.clip_norm = privacy.clip_norm
        self._chain: BandedNoise | None = None
        self.last_gradient: tuple[Params, float] | None = None
        self.open(0)

    def open(self, index: int) -> None:
        """Go to experience `index`; what was reserved pays for nothing more."""
        self.noise_multiplier = self.schedule.noise_in(index)
        self._blocks: dict[str, ReservedSteps] = {}

    def fingerprint(self, data: Tensors) -> str:
        """Keyed fingerprint of private records; without the key it says nothing about them."""
        return self._key.mac(digest(data))

    def reserve(
        self,
        *,
        scope: Mapping[str, float],
        steps: range,
        start: str,
        data: str,
        expected: float,
        numbers: int,
        slots: int | None = None,
        purpose: str = "gradient",
    ) -> None:
        """Write ahead: charge a block of steps to everyone exposed, on disk before this returns.

        To reserve gradients ends the blocks of every other purpose.

        Args:
            scope: partition to sampling rate.
            steps: the block.
            data: fingerprint of the pooled records.
            start: digest of everything else that determines the steps; a change of it never meets
                the same noise.
            expected: declared number of records in a step.
            numbers: most numbers in a sum, those of all parameters.
            slots: steps an epoch where the order is fixed.
            purpose: `gradient`, or the name of a reference gradient that is drawn beside it.
        """
        grid = Grid.of(numbers, self._gradient_noise(expected))
        entry = self._entry(
            purpose,
            "gaussian" if slots is None else "banded-gaussian",
            self.noise_multiplier,
            self.clip_norm,
            scope,
            steps,
            self._start_of(start, purpose, expected, slots),
            data,
            grid=grid,
            participations=slots and math.ceil(len(steps) / slots),
        )
        block = ReservedSteps(
            entry=self._charge(entry),
            steps=steps,
            expected=expected,
            slots=slots,
            grid=grid,
            drawn=steps.start,
        )
        if purpose != "gradient":
            self._blocks[purpose] = block
            return
        if self.privacy.diagnostics == "raw":
            everyone = dict.fromkeys(scope, 1.0)
            self.ledger.charge(
                self._entry(
                    "diagnostics", "none", 0.0, self.clip_norm, everyone, steps, start, data
                )
            )
        self._blocks = {purpose: block}
        self._chain = None if self.privacy.bands is None else BandedNoise(self.privacy.bands)

    def reserved(self, purpose: str) -> bool:
        """Whether the present block of gradients has one of this purpose beside it."""
        return purpose in self._blocks

    def coins(self, records: Tensor, step: int, purpose: str = "gradient") -> Tensor:
        """(n,) secret uniform numbers that decide who enters the step.

        Args:
            records: (n, 2) int64, id of each record and number of the partition that owns it.
        """
        return self._key.coins(records, entry=self._paid(step, purpose).paid_by, step=step)

    def tags(self, ids: Tensor, purpose: str = "memory") -> Tensor:
        """(n,) each record's own secret number in [0, 1).

        It decides whether memory keeps the record, or its place.
        """
        return self._key.tags(ids, purpose=purpose)

    def secret(self, purpose: str, step: int) -> bytes:
        """Secret bytes from which records draw at random inside a step.

        Examples are dropout, views and the start of an attack.

        Such draws go by a row's place in the batch. Were they public, one record more would hand
        the others known, other draws, and the sum would move by more than the clip norm.

        Returns:
            `SECRET_BYTES` bytes, all of which `perdure.utils.seeding.generator_from` uses.
        """
        entry = self._paid(step).paid_by
        return self._key.stream(purpose=f"draws of {purpose}", entry=entry, step=step)(SECRET_BYTES)

    def gradient(self, clipped: Clipped, params: Params, *, step: int) -> Params:
        """Noised sum of clipped per-record gradients in a step that `reserve` charged.

        Args:
            clipped: from this package's `clipping` or `bookkeeping`.

        Raises:
            ChangedSumError: where the step is executed again with another sum.
        """
        block = self._in_turn(step)
        adaptive = self._adaptive
        clip = Clip(
            norm=self.clip_norm,
            per_layer=self.privacy.clipping == "per-layer",
            counted=adaptive is not None,
            steps=block.grid.steps,
        )
        total = clipped(clip)
        shapes = {name: value.shape for name, value in params.items()}
        units = block.grid.units(total, shapes, self.clip_norm)
        votes = _votes(adaptive, block.expected)
        counted = votes.grid.units(total, WITHIN_SHAPE, VOTE) if votes else units[:0]
        exact = torch.cat([units, counted]) if votes else units
        nonce = self._nonce("gradient", block, step, exact)
        noise = self._gradient_noise(block.expected)
        value = self._noised(units, block, noise, "gradient", step, nonce, chain=self._chain)
        device = next(iter(params.values())).device
        released = block.grid.values(value, shapes, self.clip_norm, device)
        scale = noise * self.clip_norm * (self._chain.deviation if self._chain else 1.0)
        if adaptive and votes:
            self._key.add_noise(
                counted,
                votes.noise * votes.grid.steps,
                purpose="count",
                entry=block.paid_by,
                step=step,
                nonce=nonce,
            )
            within = float(counted) / votes.grid.steps * VOTE
            self.clip_norm = adaptive.updated(self.clip_norm, within, block.expected)
        self.last_gradient = (released, scale)
        self._drawn("gradient", step)
        return released

    def reference(self, clipped: Clipped, params: Params, *, step: int, purpose: str) -> Params:
        """Noised sum of clipped per-record gradients beside the gradient of a step.

        Both were charged by `reserve`.

        Raises:
            ChangedSumError: where the step is executed again with another sum.
        """
        block = self._in_turn(step, purpose)
        shapes = {name: value.shape for name, value in params.items()}
        total = clipped(Clip(norm=self.clip_norm, steps=block.grid.steps))
        units = block.grid.units(total, shapes, self.clip_norm)
        nonce = self._nonce(purpose, block, step, units)
        value = self._noised(units, block, self.noise_multiplier, purpose, step, nonce)
        self._drawn(purpose, step)
        device = next(iter(params.values())).device
        return block.grid.values(value, shapes, self.clip_norm, device)

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise in one coordinate of the last gradient sum.

        It is 0 before the first.
        """
        return self.last_gradient[1] if self.last_gradient else 0.0

    @property
    def signal_to_noise(self) -> float:
        """Energy of the last gradient sum over that of its noise, at no privacy cost.

        It is estimated from what was released.

        (|released|^2 - d s^2) / (d s^2), with d coordinates and noise of standard deviation s; it
        may be negative.
        """
        if self.last_gradient is None:
            return math.nan
        released, scale = self.last_gradient
        energy = sum(float(value.double().square().sum()) for value in released.values())
        noise = scale**2 * sum(value.numel() for value in released.values())
        return energy / noise - 1

    @property
    def release_noise(self) -> float:
        """Noise multiplier of a release in this experience."""
        return self.noise_multiplier * self.privacy.release_noise

    def release(
        self,
        clipped: Clipped,
        *,
        purpose: str,
        occasion: ReleaseKey,
        shapes: Mapping[str, torch.Size],
        clip_norm: float,
    ) -> Params:
        """Noised sum of one clipped row per record.

        Args:
            clipped: from the bound to the clipped sum (see `perdure.queries`).
            purpose: name of the release, for the ledger.
            occasion: which release it is, and of which records.
            shapes: of the sum, also where there is no record.
            clip_norm: bound on the L2 norm of one record's row.

        Raises:
            PrivacyError: where the sum has other names or shapes, whose noise would be shared.
        """
        name = f"release:{purpose}"
        noise = self.release_noise
        grid = Grid.of(sum(map(math.prod, shapes.values())), noise)
        total = clipped(Clip(norm=clip_norm, steps=grid.steps))
        given = None if total is None else {key: value.shape for key, value in total.items()}
        if given is not None and given != dict(shapes):
            raise PrivacyError(
                f"the sum for {purpose!r} has shapes { {k: tuple(v) for k, v in given.items()} }; "
                f"allowed: those of the query's rows, { {k: tuple(v) for k, v in shapes.items()} }"
            )
        units = grid.units(total, shapes, clip_norm)
        draw = self._charge_once(name, occasion, "gaussian", noise, units, clip_norm, grid)
        self._key.add_noise(units, noise * grid.steps, **draw)
        self._seen(draw)
        device = next(iter(occasion.data.values())).device
        return grid.values(units, shapes, clip_norm, device)

    def count(self, counts: Tensor, *, purpose: str, occasion: ReleaseKey) -> Tensor:
        """Counts (bins,) int64 plus integer noise.

        A record is in one bin at most, which it moves by 1.
        """
        name = f"release:{purpose}"
        noise = self.release_noise
        draw = self._charge_once(name, occasion, "discrete-gaussian", noise, counts.cpu())
        drawn = discrete_gaussian(len(counts), noise, self._key.stream(**draw))
        self._seen(draw)
        return counts + drawn.to(counts.device)

    def select(self, scores: Tensor, *, purpose: str, occasion: ReleaseKey) -> Tensor:
        """Places of high scores (m,), as many as the occasion has numbers.

        Each is a draw of the exponential mechanism.

        With `release_noise` s a draw is 2/s-DP and of bounded range, so at most (2/s)^2 / 8 = 1 /
        (2 s^2) of zero-concentrated privacy: as much as a Gaussian release.

        Args:
            scores: one record moves any two by at most 1 against each other.
        """
        name = f"release:{purpose}"
        noise = self.release_noise / 2
        numbers = occasion.numbers
        exact = scores.detach().double().cpu().contiguous().view(torch.int64)
        draw = self._charge_once(name, occasion, "exponential", noise, exact)
        uniform = self._key.uniform(len(scores), **draw)
        self._seen(draw)
        return exponential(scores, len(numbers), noise_multiplier=noise, uniform=uniform)

    # ------------------------------------------------------------------ inside

    @property
    def _adaptive(self) -> Adaptive | None:
        clipping = self.privacy.clipping
        return clipping if isinstance(clipping, Adaptive) else None

    def _gradient_noise(self, expected: float) -> float:
        """Noise multiplier of a gradient, beside a noisy count where there is one."""
        if self._adaptive:
            return self._adaptive.gradient_noise(self.noise_multiplier, expected)
        return self.noise_multiplier

    def _noised(
        self,
        units: Tensor,
        block: ReservedSteps,
        noise: float,
        purpose: str,
        step: int,
        nonce: str,
        chain: BandedNoise | None = None,
    ) -> Tensor:
        """Integers with their noise added, in grid steps."""
        scale = noise * block.grid.steps
        if chain:
            units = chain.weighted(units)
            scale *= chain.gain * PARTS
        self._key.add_noise(
            units, scale, purpose=purpose, entry=block.paid_by, step=step, nonce=nonce
        )
        self.ledger.trace("noise.drawn")
        if step + 1 < block.steps.stop:
            # charged already, and added only once the log has the MAC of the next sum
            self._key.draw_ahead(
                len(units),
                scale,
                purpose=purpose,
                entry=block.paid_by,
                step=step + 1,
                nonce=self._draws.nonce,
            )
        return chain.released(units) if chain else units

    def _nonce(self, purpose: str, block: ReservedSteps, step: int, units: Tensor) -> str:
        """Nonce of a step's noise, once its exact sum is in the log.

        Raises:
            ChangedSumError: where noise was drawn for another sum; the rest of the block was
                charged again.
        """
        nonce = self._draws.nonce_for(f"{purpose} {block.paid_by} {step}", units.numpy())
        if nonce is not None:
            return nonce
        rest = range(step, block.steps.stop)
        again = block.entry.again(rest, block.slots)
        self._blocks[purpose] = replace(
            block, entry=self._charge(again), steps=rest, drawn=rest.start
        )
        if purpose == "gradient" and self._chain and self.privacy.bands is not None:
            self._chain = BandedNoise(self.privacy.bands)
        raise ChangedSumError(
            f"step {step} is executed again with another sum; steps {rest.start} to "
            f"{rest.stop - 1} were charged again"
        )

    def _drawn(self, purpose: str, step: int) -> None:
        """Go to the next step; the last one of a block closes it."""
        block = self._blocks[purpose]
        self._blocks[purpose] = replace(block, drawn=step + 1)
        if step == block.steps.stop - 1:
            self._draws.close(block.paid_by)

    def _in_turn(self, step: int, purpose: str = "gradient") -> ReservedSteps:
        """Block that pays for the step, which is drawn once.

        Another sum must not meet its noise again.
        """
        block = self._paid(step, purpose)
        if step < block.drawn or (step > block.drawn and purpose == "gradient"):
            raise PrivacyError(
                f"step {step} is out of turn: every step is drawn once, next is step {block.drawn}"
            )
        return block

    def _paid(self, step: int, purpose: str = "gradient") -> ReservedSteps:
        block = self._blocks.get(purpose)
        if block is None or step not in block.steps:
            raise PrivacyError(
                f"step {step} was not charged to the ledger; call reserve() for it first"
            )
        return block

    def _charge_once(
        self,
        name: str,
        occasion: ReleaseKey,
        mechanism: MechanismName,
        multiplier: float,
        exact: Tensor,
        clip_norm: float = 1.0,
        grid: Grid | None = None,
    ) -> Draw:
        """Charge a release.

        The `exact` answer, integers, is part of what the entry is for: after a restart, another
        answer is charged again and gets other noise. It goes in under its own name and number, or
        the ledger would tell which answers are equal.
        """
        step = occasion.numbers.start
        entry = self._entry(
            name,
            mechanism,
            multiplier,
            clip_norm,
            dict.fromkeys(occasion.partitions, 1.0),
            occasion.numbers,
            occasion.start,
            self.fingerprint({**occasion.data, f"answer {step} to {name}": exact}),
            grid=grid,
        )
        paid_by = self._charge(entry).digest
        nonce = self._draws.nonce_for(f"{name} {paid_by} {step}", exact.numpy())
        assert nonce is not None, "an entry of a release has one answer"
        return {"purpose": name, "entry": paid_by, "step": step, "nonce": nonce}

    def _seen(self, draw: Draw) -> None:
        """Noise of a release was drawn: sync the log before the release leaves."""
        self.ledger.trace("noise.drawn")
        self._draws.close(draw["entry"])

    def _start_of(self, start: str, purpose: str, expected: float, slots: int | None) -> str:
        """Digest of everything that shapes the noise or the sum of a block."""
        # the gradients beside a reference, whose noise shapes the parameters
        beside = "" if purpose == "gradient" else self._blocks["gradient"].paid_by
        chosen: dict[str, JSONValue] = {
            "version": 2,
            "start": start,
            "beside": beside,
            "clipping": clipping_settings(self.privacy.clipping),
            "bands": self.privacy.bands,
            "slots": slots,
            "expected": expected,
        }
        return hashlib.sha256(canonical_text(chosen).encode()).hexdigest()

    def _charge(self, entry: Entry) -> Entry:
        """Charge the entry, again where its noise may have been drawn and the log does not tell.

        An entry that is in the ledger already and whose draws are known costs nothing more.
        """
        while self.ledger.has(entry) and self._draws.seen(entry.digest):
            entry = replace(entry, attempt=entry.attempt + 1)
        # The log first: an entry that it does not know counts as seen.
        self._draws.open(entry.digest)
        self.ledger.charge(entry)
        return entry

    def _entry(
        self,
        purpose: str,
        mechanism: MechanismName,
        multiplier: float,
        clip_norm: float,
        scope: Mapping[str, float],
        steps: range,
        start: str,
        data: str,
        grid: Grid | None = None,
        participations: int | None = None,
    ) -> Entry:
        sampled = mechanism == "gaussian" and not purpose.startswith("release:")
        return Entry(
            purpose=purpose,
            mechanism=mechanism,
            noise_multiplier=multiplier,
            clip_norm=clip_norm,
            first_step=steps.start,
            steps=len(steps),
            sampling="poisson" if sampled else "none",
            scope=dict(scope),
            grid=grid.facts() if grid else None,
            participations=participations,
            data=data,
            start=start,
            simulated=self._key.simulated,
            # the rows of a release are asked of each record alone
            independence=self.independence
            and ("by construction" if purpose.startswith("release:") else self.independence),
        )


def clipping_settings(clipping: str | Adaptive) -> JSONValue:
    """Every setting of clipping, under no name of a class or field."""
    if isinstance(clipping, Adaptive):
        return [clipping.quantile, clipping.learning_rate, clipping.count_noise]
    return clipping


def _votes(adaptive: Adaptive | None, expected: float) -> Votes | None:
    """Grid and noise of the count beside a gradient; one record moves it by one vote, 1/2."""
    if adaptive is None:
        return None
    noise = adaptive.count_noise * expected / VOTE
    return Votes(grid=Grid.of(1, noise), noise=noise)
