"""The private sum: charge the ledger, clip every record, add Gaussian noise. It knows nothing of learning."""

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from perdure.errors import PrivacyError
from perdure.privacy.clipping import Clip, Rows, clipped_sum, per_pass
from perdure.privacy.ledger import Entry, Ledger
from perdure.privacy.noise import NoiseKey
from perdure.privacy.policy import Privacy
from perdure.records import Params

Tensors = Mapping[str, Tensor]


class Mechanism:
    """Gaussian mechanism on sums over records, with its ledger.

    Guarantee: every sum that leaves was charged to the ledger, on disk, before its noise was drawn; one record moves
    it by at most the clip norm before noise.

    Args:
        privacy: what was asked. noise_multiplier: the calibrated one, of a step.
        ledger: where it is charged. key: of noise and coins.
    """

    def __init__(self, *, privacy: Privacy, noise_multiplier: float, ledger: Ledger, key: NoiseKey) -> None:
        self.privacy, self.noise_multiplier, self.ledger, self._key = privacy, noise_multiplier, ledger, key
        self._reserved, self._steps = "", range(0)

    def fingerprint(self, data: Tensors) -> str:
        """Keyed fingerprint of private records; without the key it says nothing about them."""
        return self._key.mac(digest(data))

    def reserve(self, *, scope: Mapping[str, float], steps: range, start: str, data: str) -> None:
        """Write ahead: charge a block of steps to everyone exposed, on disk before this returns.

        Args:
            scope: partition to sampling rate. steps: the block. data: fingerprint of the pooled records.
            start: digest of everything else that determines the steps; a change of it never meets the same noise.
        """
        multiplier, clip_norm = self.noise_multiplier, self.privacy.clip_norm
        self._reserved = self._charge("gradient", multiplier, clip_norm, scope, steps, start, data)
        self._steps = steps

    def lapse(self) -> None:
        """What was reserved pays for nothing more: the curator opens other records."""
        self._reserved, self._steps = "", range(0)

    def coins(self, n: int, step: int) -> Tensor:
        """(n,) secret uniform numbers that decide who enters the step."""
        return self._key.uniform(n, purpose="coins", entry=self._block(step), step=step)

    def tags(self, ids: Tensor) -> Tensor:
        """(n,) each record's own secret number in [0, 1), which decides whether memory keeps it."""
        return self._key.tags(ids, purpose="memory")

    def secret(self, purpose: str) -> str:
        """Seed of what records draw at random inside a step (dropout, the start of an attack).

        Such draws go by a row's place in the batch. Were they public, one record more would hand the others known,
        other draws, and the sum would move by more than the clip norm.
        """
        return self._key.mac(f"seed of {purpose}".encode())

    def gradient(self, clipped: Callable[[Clip], Params | None], params: Params, *, step: int) -> Params:
        """Noised sum of clipped per-record gradients in a step that `reserve` charged.

        Args:
            clipped: from the bound to the clipped sum, from this package's `clipping` or `bookkeeping`.
        """
        entry, clip_norm = self._block(step), self.privacy.clip_norm
        shapes = {name: value.shape for name, value in params.items()}
        device = next(iter(params.values())).device
        scale = self.noise_multiplier * clip_norm
        return self._noised(clipped(Clip(norm=clip_norm)), shapes, scale, "gradient", entry, step, device)

    def release(
        self, rows: Rows, params: Params, data: Tensors, *,
        shapes: Mapping[str, torch.Size], clip_norm: float, purpose: str, number: int, partition: str, start: str,
    ) -> Params:  # fmt: skip
        """Noised sum of one clipped row per record, every record once (sampling rate 1).

        Args:
            number: which release of the experience it is; two of one purpose are two entries with noise of their own.
        """
        name, multiplier = f"release:{purpose}", self.noise_multiplier * self.privacy.release_noise
        steps = range(number, number + 1)
        entry = self._charge(name, multiplier, clip_norm, {partition: 1.0}, steps, start, self.fingerprint(data))
        total = clipped_sum(rows, params, data, Clip(norm=clip_norm), per_pass(params))
        device = next(iter(data.values())).device
        return self._noised(total, shapes, multiplier * clip_norm, name, entry, number, device)

    def _noised(
        self, total: Params | None, shapes: Mapping[str, torch.Size], scale: float, purpose: str, entry: str, step: int,
        device: torch.device,
    ) -> Params:  # fmt: skip
        noise = self._key.normal(shapes, purpose=purpose, entry=entry, step=step, device=device)
        self.ledger.trace("noise.drawn")
        if total is None:
            return {name: scale * value for name, value in noise.items()}
        return {name: total[name].detach() + scale * value for name, value in noise.items()}

    def _block(self, step: int) -> str:
        if step not in self._steps:
            raise PrivacyError(f"step {step} was not charged to the ledger; call reserve() for it first")
        return self._reserved

    def _charge(
        self, purpose: str, multiplier: float, clip_norm: float, scope: Mapping[str, float], steps: range, start: str,
        data: str,
    ) -> str:  # fmt: skip
        return self.ledger.charge(Entry(
            purpose=purpose, mechanism="gaussian", noise_multiplier=multiplier, clip_norm=clip_norm,
            first_step=steps.start, steps=len(steps), sampling="poisson" if purpose == "gradient" else "none",
            scope=dict(scope), data=data, start=start, simulated=self._key.simulated,
        ))  # fmt: skip


def digest(tensors: Tensors) -> bytes:
    """SHA-256 that changes with any value. Of private records only its keyed MAC may leave the curator."""
    total = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        total.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.digest()
