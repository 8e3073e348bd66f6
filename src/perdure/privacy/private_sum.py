"""The private sum: charge the ledger, clip every record, add noise.

It knows nothing of learning.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perdure.errors import PrivacyError
from perdure.privacy.adaptive_clipping import Adaptive
from perdure.privacy.clipping.clip import WITHIN, Clip
from perdure.privacy.ledger.entries import Entry
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.noise.banded import BandedNoise
from perdure.privacy.noise.discrete import discrete_gaussian, exponential
from perdure.privacy.noise.key import NoiseKey
from perdure.privacy.settings import Privacy
from perdure.types import Params, Tensors
from perdure.utils.hashing import JSONValue, canonical_text, digest

Clipped = Callable[[Clip], Params | None]
"""From the bound on a record to the clipped sum over records; None where there is no record."""


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
        entry: its digest.
        steps: which.
        expected: declared number of records in one of them.
        drawn: the step that is drawn next.
    """

    entry: str = ""
    steps: range = range(0)
    expected: float = 1.0
    drawn: int = 0


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
    """

    def __init__(
        self, *, privacy: Privacy, schedule: Schedule, ledger: Ledger, key: NoiseKey
    ) -> None:
        self.privacy = privacy
        self.schedule = schedule
        self.ledger = ledger
        self._key = key
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
            slots: steps an epoch where the order is fixed.
            purpose: `gradient`, or the name of a reference gradient that is drawn beside it.
        """
        # whose noise shapes the parameters
        beside = "" if purpose == "gradient" else self._blocks["gradient"].entry
        # Everything here shapes the noise or the sum.
        chosen = {
            "version": 1,
            "start": start,
            "beside": beside,
            "clipping": clipping_settings(self.privacy.clipping),
            "bands": self.privacy.bands,
            "slots": slots,
            "expected": expected,
        }
        start = hashlib.sha256(canonical_text(chosen).encode()).hexdigest()
        entry = self._charge(
            purpose,
            "gaussian" if slots is None else "banded-gaussian",
            self.noise_multiplier,
            self.clip_norm,
            scope,
            steps,
            start,
            data,
            participations=slots and math.ceil(len(steps) / slots),
        )
        block = ReservedSteps(entry=entry, steps=steps, expected=expected, drawn=steps.start)
        if purpose != "gradient":
            self._blocks[purpose] = block
            return
        if self.privacy.diagnostics == "raw":
            everyone = dict.fromkeys(scope, 1.0)
            self._charge("diagnostics", "none", 0.0, self.clip_norm, everyone, steps, start, data)
        self._blocks = {purpose: block}
        self._chain = None if self.privacy.bands is None else BandedNoise(self.privacy.bands)

    def reserved(self, purpose: str) -> bool:
        """Whether the present block of gradients has one of this purpose beside it."""
        return purpose in self._blocks

    def coins(self, n: int, step: int, purpose: str = "gradient") -> Tensor:
        """(n,) secret uniform numbers that decide who enters the step."""
        return self._key.uniform(
            n, purpose="coins", entry=self._paid(step, purpose).entry, step=step
        )

    def tags(self, ids: Tensor, purpose: str = "memory") -> Tensor:
        """(n,) each record's own secret number in [0, 1).

        It decides whether memory keeps the record, or its place.
        """
        return self._key.tags(ids, purpose=purpose)

    def secret(self, purpose: str, step: int) -> str:
        """Seed of what records draw at random inside a step.

        Examples are dropout, views and the start of an attack.

        Such draws go by a row's place in the batch. Were they public, one record more would hand
        the others known, other draws, and the sum would move by more than the clip norm.
        """
        return self._key.mac(f"seed of {purpose} for {self._paid(step).entry}".encode())

    def gradient(self, clipped: Clipped, params: Params, *, step: int) -> Params:
        """Noised sum of clipped per-record gradients in a step that `reserve` charged.

        Args:
            clipped: from this package's `clipping` or `bookkeeping`.
        """
        block = self._in_turn(step)
        clipping = self.privacy.clipping
        entry = block.entry
        expected = block.expected
        adaptive = clipping if isinstance(clipping, Adaptive) else None
        noise = (
            adaptive.gradient_noise(self.noise_multiplier, expected)
            if adaptive
            else self.noise_multiplier
        )
        shapes = {name: value.shape for name, value in params.items()}
        scales = dict.fromkeys(shapes, noise * self.clip_norm)
        if adaptive:
            shapes[WITHIN] = torch.Size()
            scales[WITHIN] = adaptive.count_noise * expected
        clip = Clip(
            norm=self.clip_norm, per_layer=clipping == "per-layer", counted=adaptive is not None
        )
        device = next(iter(params.values())).device
        released = self._noised(clipped(clip), shapes, scales, "gradient", entry, step, device)
        if adaptive:
            counted = float(released.pop(WITHIN))
            self.clip_norm = adaptive.updated(self.clip_norm, counted, expected)
        self.last_gradient = (
            released,
            scales[next(iter(params))] * (self._chain.deviation if self._chain else 1.0),
        )
        return released

    def reference(self, clipped: Clipped, params: Params, *, step: int, purpose: str) -> Params:
        """Noised sum of clipped per-record gradients beside the gradient of a step.

        Both were charged by `reserve`.
        """
        block = self._in_turn(step, purpose)
        shapes = {name: value.shape for name, value in params.items()}
        scales = dict.fromkeys(shapes, self.noise_multiplier * self.clip_norm)
        total = clipped(Clip(norm=self.clip_norm))
        device = next(iter(params.values())).device
        return self._noised(
            total, shapes, scales, purpose, block.entry, step, device, chained=False
        )

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
        total = clipped(Clip(norm=clip_norm))
        given = None if total is None else {key: value.shape for key, value in total.items()}
        if given is not None and given != dict(shapes):
            raise PrivacyError(
                f"the sum for {purpose!r} has shapes { {k: tuple(v) for k, v in given.items()} }; "
                f"allowed: those of the query's rows, { {k: tuple(v) for k, v in shapes.items()} }"
            )
        entry = self._charge_once(name, occasion, "gaussian", noise, total or {}, clip_norm)
        scales = dict.fromkeys(shapes, noise * clip_norm)
        device = next(iter(occasion.data.values())).device
        step = occasion.numbers.start
        return self._noised(total, shapes, scales, name, entry, step, device, chained=False)

    def count(self, counts: Tensor, *, purpose: str, occasion: ReleaseKey) -> Tensor:
        """Counts (bins,) int64 plus integer noise.

        A record is in one bin at most, which it moves by 1.
        """
        name = f"release:{purpose}"
        noise = self.release_noise
        entry = self._charge_once(name, occasion, "discrete-gaussian", noise, {"counts": counts})
        stream = self._key.stream(purpose=name, entry=entry, step=occasion.numbers.start)
        drawn = discrete_gaussian(len(counts), noise, stream)
        self.ledger.trace("noise.drawn")
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
        entry = self._charge_once(name, occasion, "exponential", noise, {"scores": scores})
        uniform = self._key.uniform(len(scores), purpose=name, entry=entry, step=numbers.start)
        self.ledger.trace("noise.drawn")
        return exponential(scores, len(numbers), noise_multiplier=noise, uniform=uniform)

    def _noised(
        self,
        total: Params | None,
        shapes: Mapping[str, torch.Size],
        scales: Mapping[str, float],
        purpose: str,
        entry: str,
        step: int,
        device: torch.device,
        chained: bool = True,
    ) -> Params:
        # The exact sum keys its noise too. Should code that no digest saw change a sum after a
        # restart, it meets other noise; with the same, the difference of the two answers would be
        # that of the sums.
        answer = self.fingerprint(total) if total else ""
        noise = self._key.normal(
            shapes, purpose=purpose, entry=f"{entry} {answer}", step=step, device=device
        )
        self.ledger.trace("noise.drawn")
        if self._chain and chained:
            noise = self._chain.next(noise)
        if total is None:
            return {name: scales[name] * value for name, value in noise.items()}
        return {name: total[name].detach() + scales[name] * value for name, value in noise.items()}

    def _in_turn(self, step: int, purpose: str = "gradient") -> ReservedSteps:
        """Block that pays for the step, which is drawn once.

        Another sum must not meet its noise again.
        """
        block = self._paid(step, purpose)
        if step < block.drawn or (step > block.drawn and purpose == "gradient"):
            raise PrivacyError(
                f"step {step} is out of turn: every step is drawn once, next is step {block.drawn}"
            )
        self._blocks[purpose] = replace(block, drawn=step + 1)
        return block

    def _paid(self, step: int, purpose: str = "gradient") -> ReservedSteps:
        block = self._blocks.get(purpose, ReservedSteps())
        if step not in block.steps:
            raise PrivacyError(
                f"step {step} was not charged to the ledger; call reserve() for it first"
            )
        return block

    def _charge_once(
        self,
        name: str,
        occasion: ReleaseKey,
        mechanism: str,
        multiplier: float,
        answer: Tensors,
        clip_norm: float = 1.0,
    ) -> str:
        """Charge a release.

        The exact `answer` keys its noise too: after a restart, another question gets other noise.

        It goes in under its own name and number, or the ledger would tell which answers are equal.
        """
        exact = {
            f"answer {occasion.numbers.start} to {name}, {part}": value
            for part, value in answer.items()
        }
        scope = dict.fromkeys(occasion.partitions, 1.0)
        return self._charge(
            name,
            mechanism,
            multiplier,
            clip_norm,
            scope,
            occasion.numbers,
            occasion.start,
            self.fingerprint({**occasion.data, **exact}),
        )

    def _charge(
        self,
        purpose: str,
        mechanism: str,
        multiplier: float,
        clip_norm: float,
        scope: Mapping[str, float],
        steps: range,
        start: str,
        data: str,
        participations: int | None = None,
    ) -> str:
        sampled = mechanism == "gaussian" and not purpose.startswith("release:")
        return self.ledger.charge(
            Entry(
                purpose=purpose,
                mechanism=mechanism,
                noise_multiplier=multiplier,
                clip_norm=clip_norm,
                first_step=steps.start,
                steps=len(steps),
                sampling="poisson" if sampled else "none",
                scope=dict(scope),
                participations=participations,
                data=data,
                start=start,
                simulated=self._key.simulated,
            )
        )


def clipping_settings(clipping: str | Adaptive) -> JSONValue:
    """Every setting of clipping, under no name of a class or field."""
    if isinstance(clipping, Adaptive):
        return [clipping.quantile, clipping.learning_rate, clipping.count_noise]
    return clipping
