"""The private sum: charge the ledger, clip every record, add noise. It knows nothing of learning."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.errors import PrivacyError
from perdure.privacy.adaptive import Adaptive
from perdure.privacy.clipping import WITHIN, Clip
from perdure.privacy.correlated import Chain
from perdure.privacy.ledger import Entry, Ledger
from perdure.privacy.noise import NoiseKey
from perdure.privacy.policy import Privacy
from perdure.records import Params

Tensors = Mapping[str, Tensor]
Clipped = Callable[[Clip], Params | None]
"""From the bound on a record to the clipped sum over records; None where there is no record."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What is fixed before the first draw, experience by experience.

    Args:
        noise: noise multiplier of a step; the last one holds for all that follow.
        left: partitions that are out of every pool; empty where none ever leaves.
    """

    noise: tuple[float, ...]
    left: tuple[frozenset[str], ...] = ()

    def noise_in(self, index: int) -> float:
        """Noise multiplier of a step in experience `index`."""
        return self.noise[min(index, len(self.noise) - 1)]

    def left_in(self, index: int) -> frozenset[str]:
        """Partitions out of the pools in experience `index`."""
        return self.left[min(index, len(self.left) - 1)] if self.left else frozenset()


@dataclass(frozen=True, kw_only=True)
class Block:
    """Steps that a ledger entry pays for.

    Args:
        entry: its digest. steps: which. expected: declared number of records in one of them.
    """

    entry: str = ""
    steps: range = range(0)
    expected: float = 1.0


class Mechanism:
    """Sums over records with noise, and the ledger that they are charged to.

    Guarantee: every sum that leaves was charged to the ledger, on disk, before its noise was drawn; one record moves
    it by at most the clip norm before noise.

    Args:
        privacy: what was asked. schedule: what was calibrated.
        ledger: where it is charged. key: of noise and coins.
    """

    def __init__(self, *, privacy: Privacy, schedule: Schedule, ledger: Ledger, key: NoiseKey) -> None:
        self.privacy, self.schedule, self.ledger, self._key = privacy, schedule, ledger, key
        self.clip_norm = privacy.clip_norm
        self._chain: Chain | None = None
        self._drawn = 0
        self._last: tuple[Params, float] | None = None
        self.open(0)

    def open(self, index: int) -> None:
        """Go to experience `index`; what was reserved pays for nothing more."""
        self.noise_multiplier, self._block = self.schedule.noise_in(index), Block()

    def fingerprint(self, data: Tensors) -> str:
        """Keyed fingerprint of private records; without the key it says nothing about them."""
        return self._key.mac(digest(data))

    def reserve(
        self, *, scope: Mapping[str, float], steps: range, start: str, data: str, expected: float,
        slots: int | None = None,
    ) -> None:  # fmt: skip
        """Write ahead: charge a block of steps to everyone exposed, on disk before this returns.

        Args:
            scope: partition to sampling rate. steps: the block. data: fingerprint of the pooled records.
            start: digest of everything else that determines the steps; a change of it never meets the same noise.
            expected: declared number of records in a step. slots: steps an epoch where the order is fixed.
        """
        entry = self._charge(
            "gradient", "gaussian" if slots is None else "banded-gaussian", self.noise_multiplier, self.clip_norm,
            scope, steps, start, data, participations=slots and math.ceil(len(steps) / slots),
        )  # fmt: skip
        if self.privacy.diagnostics == "raw":
            everyone = dict.fromkeys(scope, 1.0)
            self._charge("diagnostics", "none", 0.0, self.clip_norm, everyone, steps, start, data)
        self._block = Block(entry=entry, steps=steps, expected=expected)
        self._chain = None if self.privacy.bands is None else Chain(self.privacy.bands)
        self._drawn = steps.start

    def coins(self, n: int, step: int) -> Tensor:
        """(n,) secret uniform numbers that decide who enters the step."""
        return self._key.uniform(n, purpose="coins", entry=self._paid(step), step=step)

    def tags(self, ids: Tensor, purpose: str = "memory") -> Tensor:
        """(n,) each record's own secret number in [0, 1), which decides whether memory keeps it, or its place."""
        return self._key.tags(ids, purpose=purpose)

    def secret(self, purpose: str) -> str:
        """Seed of what records draw at random inside a step (dropout, the start of an attack).

        Such draws go by a row's place in the batch. Were they public, one record more would hand the others known,
        other draws, and the sum would move by more than the clip norm.
        """
        return self._key.mac(f"seed of {purpose}".encode())

    def gradient(self, clipped: Clipped, params: Params, *, step: int) -> Params:
        """Noised sum of clipped per-record gradients in a step that `reserve` charged.

        Args:
            clipped: from this package's `clipping` or `bookkeeping`.
        """
        entry, clipping, expected = self._paid(step), self.privacy.clipping, self._block.expected
        adaptive = clipping if isinstance(clipping, Adaptive) else None
        noise = adaptive.gradient_noise(self.noise_multiplier, expected) if adaptive else self.noise_multiplier
        shapes = {name: value.shape for name, value in params.items()}
        scales = dict.fromkeys(shapes, noise * self.clip_norm)
        if adaptive:
            shapes[WITHIN], scales[WITHIN] = torch.Size(), adaptive.count_noise * expected
        clip = Clip(norm=self.clip_norm, per_layer=clipping == "per-layer", counted=adaptive is not None)
        device = next(iter(params.values())).device
        released = self._noised(clipped(clip), shapes, scales, "gradient", entry, step, device)
        if adaptive:
            counted = float(released.pop(WITHIN))
            self.clip_norm = adaptive.updated(self.clip_norm, counted, expected)
        self._last = released, scales[next(iter(params))] * (self._chain.deviation if self._chain else 1.0)
        return released

    @property
    def signal_to_noise(self) -> float:
        """Energy of the last gradient sum over that of its noise, estimated from what was released: free.

        (|released|^2 - d s^2) / (d s^2), with d coordinates and noise of standard deviation s; it may be negative.
        """
        if self._last is None:
            return math.nan
        released, scale = self._last
        energy = sum(float(value.double().square().sum()) for value in released.values())
        noise = scale**2 * sum(value.numel() for value in released.values())
        return energy / noise - 1

    def release(
        self, clipped: Clipped, *, shapes: Mapping[str, torch.Size], clip_norm: float, purpose: str, number: int,
        partition: str, start: str, data: Tensors,
    ) -> Params:  # fmt: skip
        """Noised sum of one clipped row per record, every record once (sampling rate 1).

        Args:
            number: which release of the experience it is; two of one purpose are two entries with noise of their own.
            data: the records, for the entry's keyed fingerprint.
        """
        name, multiplier = f"release:{purpose}", self.noise_multiplier * self.privacy.release_noise
        steps = range(number, number + 1)
        fingerprint = self.fingerprint(data)
        entry = self._charge(name, "gaussian", multiplier, clip_norm, {partition: 1.0}, steps, start, fingerprint)
        scales, device = dict.fromkeys(shapes, multiplier * clip_norm), next(iter(data.values())).device
        return self._noised(clipped(Clip(norm=clip_norm)), shapes, scales, name, entry, number, device, chained=False)

    def _noised(
        self, total: Params | None, shapes: Mapping[str, torch.Size], scales: Mapping[str, float], purpose: str,
        entry: str, step: int, device: torch.device, chained: bool = True,
    ) -> Params:  # fmt: skip
        noise = self._key.normal(shapes, purpose=purpose, entry=entry, step=step, device=device)
        self.ledger.trace("noise.drawn")
        if self._chain and chained:
            if step != self._drawn:
                raise PrivacyError(f"step {step} is out of turn: correlated noise goes on with step {self._drawn}")
            self._drawn, noise = step + 1, self._chain.next(noise)
        if total is None:
            return {name: scales[name] * value for name, value in noise.items()}
        return {name: total[name].detach() + scales[name] * value for name, value in noise.items()}

    def _paid(self, step: int) -> str:
        if step not in self._block.steps:
            raise PrivacyError(f"step {step} was not charged to the ledger; call reserve() for it first")
        return self._block.entry

    def _charge(
        self, purpose: str, mechanism: str, multiplier: float, clip_norm: float, scope: Mapping[str, float],
        steps: range, start: str, data: str, participations: int | None = None,
    ) -> str:  # fmt: skip
        sampled = mechanism == "gaussian" and purpose == "gradient"
        return self.ledger.charge(Entry(
            purpose=purpose, mechanism=mechanism, noise_multiplier=multiplier, clip_norm=clip_norm,
            first_step=steps.start, steps=len(steps), sampling="poisson" if sampled else "none",
            scope=dict(scope), participations=participations, data=data, start=start,
            simulated=self._key.simulated,
        ))  # fmt: skip


def digest(tensors: Tensors) -> bytes:
    """SHA-256 that changes with any value. Of private records only its keyed MAC may leave the curator."""
    total = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        total.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.digest()
