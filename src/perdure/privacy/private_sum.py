"""Private sums: noisy sums over clipped records, charged to a ledger before noise is drawn.

This module does not depend on the learner.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from perdure.errors import PrivacyError
from perdure.privacy.adaptive_clipping import Adaptive
from perdure.privacy.answers import Answers
from perdure.privacy.clipping.clip import Clip
from perdure.privacy.grid import Grid
from perdure.privacy.ledger.entries import Stated
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.noise.banded import PARTS, BandedNoise
from perdure.privacy.noise.draw_log import DrawLog
from perdure.privacy.noise.key import NoiseKey
from perdure.privacy.releases import Clipped, ReleaseKey, Releases
from perdure.privacy.reserved_steps import (
    VOTE,
    WITHIN_SHAPE,
    ChangedSumError,
    ReservedSteps,
    Schedule,
    votes_of,
)
from perdure.privacy.settings import Privacy
from perdure.types import Params
from perdure.utils.hashing import JSONValue, canonical_text
from perdure.utils.seeding import SECRET_BYTES

__all__ = [
    "VOTE",
    "ChangedSumError",
    "MakePrivateSum",
    "PrivateSum",
    "ReleaseKey",
    "Schedule",
    "clipping_settings",
]

MakePrivateSum = Callable[..., "PrivateSum"]
"""Function that takes the arguments of `PrivateSum`; an audit gives one that uses another key."""


class PrivateSum(Releases):
    """Noisy sums over records, charged to a ledger.

    Guarantee: every released sum was charged to the ledger, on disk, before its noise was drawn.
    Before noise, one record changes the sum by at most the clip norm.

    Args:
        privacy: privacy settings of the user.
        schedule: calibrated noise of each experience.
        ledger: ledger that is charged.
        key: key for the noise and for the coins (random numbers that decide which records enter a
            step).
        draws: log of the exact sums for which noise was drawn; None for a log in memory.
        answers: store of released answers; None to keep them in memory.
        independence: how the gradients of records are known to be independent (see
            `perdure.privacy.guard`); "" if not known.
    """

    def __init__(
        self,
        *,
        privacy: Privacy,
        schedule: Schedule,
        ledger: Ledger,
        key: NoiseKey,
        draws: DrawLog | None = None,
        answers: Answers | None = None,
        independence: Stated = "",
    ) -> None:
        super().__init__(
            privacy=privacy,
            schedule=schedule,
            ledger=ledger,
            key=key,
            draws=draws,
            answers=answers,
            independence=independence,
        )
        self.clip_norm = privacy.clip_norm
        self._chain: BandedNoise | None = None
        self.last_gradient: tuple[Params, float] | None = None

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
        """Charge a block of steps to all exposed partitions, on disk, before any noise is drawn.

        Reserving gradients ends the reserved blocks of all other purposes.

        Args:
            scope: partition to sampling rate.
            steps: the steps of the block.
            data: fingerprint of the pooled records.
            start: digest of everything except the records that determines the steps; after any
                change the noise is different.
            expected: declared number of records in a step.
            numbers: largest number of coordinates in a sum, the size of all parameters.
            slots: steps per epoch if each record has a fixed step in it; None for Poisson sampling.
            purpose: `gradient`, or the name of a reference gradient of the same steps.

        Raises:
            PrivacyError: if the noise cannot be drawn; nothing is charged then.
        """
        bands = self.privacy.bands if purpose == "gradient" else None
        gain = 1.0 if bands is None else BandedNoise(bands).gain * PARTS
        grid = Grid.of(numbers, self._gradient_noise(expected), gain=gain)
        votes_of(self._adaptive, expected)
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
        bands = self.privacy.bands
        self._chain = None if bands is None else BandedNoise(bands, steps.start)

    def reserved(self, purpose: str) -> bool:
        """Return True if `reserve` has charged steps for this purpose in the current block."""
        return purpose in self._blocks

    def coins(self, records: Tensor, step: int, purpose: str = "gradient") -> Tensor:
        """Return (n,) secret uniform numbers that decide which records enter the step.

        Args:
            records: (n, 2) int64, id of each record and number of the partition that owns it.
            step: step of the run.
            purpose: purpose of the sum, `gradient` or the name of a reference gradient.
        """
        return self._key.coins(records, entry=self._paid(step, purpose).paid_by, step=step)

    def secret(self, purpose: str, step: int) -> bytes:
        """Return the secret seed for one kind of random numbers inside a step.

        The kinds (`purpose`) are dropout, random views of a record, and the start of an attack.

        Such randomness depends on the position of a row in the batch. If it were public, one more
        record would give the other rows other known randomness, and the sum would change by more
        than the clip norm.

        Returns:
            `SECRET_BYTES` bytes, all of which `perdure.utils.seeding.generator_from` uses.
        """
        entry = self._paid(step).paid_by
        return self._key.stream(purpose=f"draws of {purpose}", entry=entry, step=step)(SECRET_BYTES)

    def gradient(self, clipped: Clipped, params: Params, *, step: int) -> Params:
        """Noisy sum of clipped per-record gradients, for a step that `reserve` has charged.

        Args:
            clipped: function from a clip to the clipped sum, from `perdure.privacy.clipping`.
            params: the summed parameters; each sum has the shape of its parameter.
            step: step of the run.

        Raises:
            ChangedSumError: if the step is executed again with another sum.
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
        votes = votes_of(adaptive, block.expected)
        counted = votes.grid.units(total, WITHIN_SHAPE, VOTE) if votes else units[:0]
        exact = torch.cat([units, counted]) if votes else units
        nonce = self._nonce("gradient", block, step, exact)
        noise = self._gradient_noise(block.expected)
        chain = self._chain
        # with correlated noise, `units` stay exact until the step is finished
        value = self._noised(units, block, noise, "gradient", step, nonce, chain=chain)
        device = next(iter(params.values())).device
        clip_norm = self.clip_norm
        released = block.grid.values(value, shapes, clip_norm, device)
        following = clip_norm
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
            following = adaptive.updated(clip_norm, within, block.expected)
        # The chain changes only after the whole step is drawn, because the step may be asked for
        # again.
        if chain:
            chain.commit(units, value, step)
        scale = noise * clip_norm * (chain.deviation(step) if chain else 1.0)
        self.clip_norm = following
        self.last_gradient = (released, scale)
        self._drawn("gradient", step)
        return released

    def reference(self, clipped: Clipped, params: Params, *, step: int, purpose: str) -> Params:
        """Noisy sum of clipped per-record gradients, released in addition to the step's gradient.

        `reserve` has charged both.

        Args:
            clipped: function from a clip to the clipped sum, from `perdure.privacy.clipping`.
            params: the summed parameters; each sum has the shape of its parameter.
            step: step of the run.
            purpose: name of the reference gradient, as it was reserved.

        Raises:
            ChangedSumError: if the step is executed again with another sum.
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

        It is 0 before the first sum.
        """
        return self.last_gradient[1] if self.last_gradient else 0.0

    @property
    def signal_to_noise(self) -> float:
        """Ratio of the energies of the last gradient sum and of its noise, at no privacy cost.

        It is estimated from released values only.

        (|released|^2 - d s^2) / (d s^2), with d coordinates and noise of standard deviation s; it
        may be negative.
        """
        if self.last_gradient is None:
            return math.nan
        released, scale = self.last_gradient
        energy = sum(float(value.double().square().sum()) for value in released.values())
        noise = scale**2 * sum(value.numel() for value in released.values())
        return energy / noise - 1

    # ------------------------------------------------------------------ inside

    @property
    def _adaptive(self) -> Adaptive | None:
        clipping = self.privacy.clipping
        return clipping if isinstance(clipping, Adaptive) else None

    def _gradient_noise(self, expected: float) -> float:
        """Noise multiplier of the gradient sum of a step with `expected` records.

        It is larger than the charged one if adaptive clipping releases a noisy count too.
        """
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
        """Add the noise of a step to its exact sum; return the noisy sum, in grid steps."""
        scale = noise * block.grid.steps
        if chain:
            units = chain.weighted(units, step)
            scale *= chain.gain * PARTS
        self._key.add_noise(
            units, scale, purpose=purpose, entry=block.paid_by, step=step, nonce=nonce
        )
        self.ledger.trace("noise.drawn")
        if step + 1 < block.steps.stop:
            # the steps are charged; this noise is added only after the log has the MAC of the next
            # sum
            self._key.draw_ahead(
                len(units),
                scale,
                purpose=purpose,
                entry=block.paid_by,
                step=step + 1,
                nonce=self._draws.nonce,
            )
        return chain.released(units, step) if chain else units

    def _nonce(self, purpose: str, block: ReservedSteps, step: int, units: Tensor) -> str:
        """Return the nonce for the noise of a step, after the exact sum was written to the log.

        Raises:
            ChangedSumError: if noise was drawn for another sum; the rest of the block was charged
                again.
        """
        self.ledger.chain.hold()
        nonce = self._draws.nonce_for(purpose, block.paid_by, step, units.numpy())
        if nonce is not None:
            return nonce
        rest = range(step, block.steps.stop)
        again = block.entry.again(rest, block.slots)
        self._blocks[purpose] = replace(
            block, entry=self._charge(again), steps=rest, drawn=rest.start
        )
        if purpose == "gradient" and self._chain and self.privacy.bands is not None:
            self._chain = BandedNoise(self.privacy.bands, rest.start)
        raise ChangedSumError(
            f"step {step} runs again with another sum, or without the log of its first draw; "
            f"steps {rest.start} to {rest.stop - 1} were charged again"
        )

    def _drawn(self, purpose: str, step: int) -> None:
        """Record that a step's noise was drawn; after the last step, close the block's log."""
        block = self._blocks[purpose]
        self._blocks[purpose] = replace(block, drawn=step + 1)
        if step == block.steps.stop - 1:
            self._draws.close(block.paid_by)

    def _in_turn(self, step: int, purpose: str = "gradient") -> ReservedSteps:
        """Return the block of charged steps that contains `step`, if the step is not drawn yet.

        Every step is drawn once, because noise must not be used for two different sums.

        Raises:
            PrivacyError: if the step was not charged or was already drawn, or if another step's
                gradient is next.
        """
        block = self._paid(step, purpose)
        if step < block.drawn or (step > block.drawn and purpose == "gradient"):
            raise PrivacyError(
                f"step {step} is not the next step; each step is drawn once and in order, and the "
                f"next one is step {block.drawn}"
            )
        return block

    def _paid(self, step: int, purpose: str = "gradient") -> ReservedSteps:
        block = self._blocks.get(purpose)
        if block is None or step not in block.steps:
            raise PrivacyError(
                f"step {step} was not charged to the ledger; call reserve() for it first"
            )
        return block

    def _start_of(self, start: str, purpose: str, expected: float, slots: int | None) -> str:
        """Digest of all settings that decide a block's noise or sums, for its ledger entry."""
        # the gradient block beside a reference, because its noise changes the parameters
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


def clipping_settings(clipping: str | Adaptive) -> JSONValue:
    """Describe the clipping in JSON for a digest, without names of classes or fields."""
    if isinstance(clipping, Adaptive):
        return [clipping.quantile, clipping.learning_rate, clipping.count_noise]
    return clipping
