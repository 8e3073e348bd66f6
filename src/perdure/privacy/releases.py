"""Releases: noisy sums, counts and selections over all records of an experience."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from perdure.errors import PrivacyError
from perdure.privacy.clipping.clip import Clip
from perdure.privacy.grid import Grid
from perdure.privacy.ledger.entries import Entry, MechanismName
from perdure.privacy.mechanism import Mechanism
from perdure.privacy.noise.discrete import discrete_gaussian, exponential
from perdure.types import Params, Tensors

Clipped = Callable[[Clip], Params | None]
"""Function from the clip of a record to the clipped sum over records; None without records."""

ONLY = "answer"
"""Name of a released value that is a single tensor."""


class Draw(TypedDict):
    """Arguments by which a noise key chooses noise; equal arguments give equal noise."""

    purpose: str
    entry: str
    step: int
    nonce: str


@dataclass(frozen=True, kw_only=True, eq=False)
class ReleaseKey:
    """Identity of a release within an experience, which also decides its noise.

    Args:
        partitions: partitions whose records are exposed, each once (sampling rate 1).
        numbers: positions of the release among all releases of the experience (k of them for a
            top-k), so that two releases with the same purpose have independent noise.
        start: digest of everything else that decides the result, such as the model's parameters.
        data: the records, for the keyed fingerprint in the ledger entry.
    """

    partitions: tuple[str, ...]
    numbers: range
    start: str
    data: Tensors


class Releases(Mechanism):
    """Private releases over all records, each charged before its noise is drawn."""

    @property
    def release_noise(self) -> float:
        """Noise multiplier of a release in the current experience."""
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
        """Noisy sum of one clipped row per record.

        Args:
            clipped: function from a clip to the clipped sum (see `perdure.queries`).
            purpose: name of the release in the ledger.
            occasion: identity of the release, with its records.
            shapes: shapes of the sum, which are needed if there is no record.
            clip_norm: bound on the L2 norm of one record's row.

        Raises:
            PrivacyError: if the sum has other names or shapes than `shapes`.
        """
        noise = self.release_noise
        grid = Grid.of(sum(map(math.prod, shapes.values())), noise)
        device = next(iter(occasion.data.values())).device

        def exact() -> Tensor:
            total = clipped(Clip(norm=clip_norm, steps=grid.steps))
            _refuse_other_shapes(total, shapes, purpose)
            return grid.units(total, shapes, clip_norm)

        def noised(units: Tensor, draw: Draw) -> Params:
            self._key.add_noise(units, noise * grid.steps, **draw)
            return grid.values(units, shapes, clip_norm, device)

        entry = self._release_entry(purpose, occasion, "gaussian", noise, clip_norm, grid)
        answer = self._once(entry, exact, noised)
        return {name: answer[name].to(device) for name in shapes}

    def count(self, counts: Tensor, *, purpose: str, occasion: ReleaseKey) -> Tensor:
        """Return (bins,) int64 counts plus integer noise.

        Each record is in at most one bin, and changes the count of this bin by 1.

        Args:
            counts: (bins,) exact numbers of records.
            purpose: name of the release in the ledger.
            occasion: identity of the release, with its records.
        """
        noise = self.release_noise

        def noised(exact: Tensor, draw: Draw) -> Params:
            return {ONLY: exact + discrete_gaussian(len(exact), noise, self._key.stream(**draw))}

        entry = self._release_entry(purpose, occasion, "discrete-gaussian", noise)
        return self._once(entry, counts.cpu, noised)[ONLY].to(counts.device)

    def select(self, scores: Tensor, *, purpose: str, occasion: ReleaseKey) -> Tensor:
        """Return (k,) indices of high scores, each from one draw of the exponential mechanism.

        k is the length of `occasion.numbers`.

        With `release_noise` s, a draw is 2/s-DP and of bounded range, so it costs at most (2/s)^2 /
        8 = 1 / (2 s^2) of zero-concentrated privacy, as much as a Gaussian release.

        Args:
            scores: (m,) scores; one record changes the difference of any two by at most 1.
            purpose: name of the release in the ledger.
            occasion: identity of the release, with its records.
        """
        noise = self.release_noise / 2

        def exact() -> Tensor:
            return scores.detach().double().cpu().contiguous().view(torch.int64)

        def chosen(_: Tensor, draw: Draw) -> Params:
            uniform = self._key.uniform(len(scores), **draw)
            places = len(occasion.numbers)
            return {ONLY: exponential(scores, places, noise_multiplier=noise, uniform=uniform)}

        entry = self._release_entry(purpose, occasion, "exponential", noise)
        return self._once(entry, exact, chosen)[ONLY].to(scores.device)

    # ------------------------------------------------------------------ inside

    def _once(
        self,
        entry: Entry,
        exact: Callable[[], Tensor],
        noised: Callable[[Tensor, Draw], Params],
    ) -> Params:
        """Charge and draw a release, or return the stored result of an earlier one.

        The ledger must not depend on exact results. So a stored result is returned without
        computing it again. If it is not stored, the release is charged again, unless the log of
        draws shows that no result was returned: an entry is closed in the log before its result is
        returned, and this one is open.

        Args:
            entry: ledger entry of the release, at its first attempt.
            exact: function that computes the exact result, as integers.
            noised: function from the exact result and the noise to draw to the released values.
        """
        self.ledger.chain.hold()
        simulated = self._key.simulated
        while True:
            kept = self._answers.find(entry.digest)
            if kept is not None:
                self._draws.open(entry.digest)
                self.ledger.charge(entry)
                self._draws.close(entry.digest)
                return kept
            left = not simulated and self._draws.closed(entry.digest)
            if not self.ledger.has(entry) or not (left or self._draws.seen(entry.digest)):
                break
            entry = entry.later()
        integers = exact()
        entry, draw = self._draw_of(entry, integers)
        answer = noised(integers, draw)
        self.ledger.trace("noise.drawn")
        self._answers.keep(entry.digest, answer, experience=self.experience)
        self._draws.close(entry.digest)
        return answer

    def _draw_of(self, entry: Entry, integers: Tensor) -> tuple[Entry, Draw]:
        """Charge an entry and choose its noise, before the noise is drawn.

        A simulation has one noise per entry, so there another exact result needs another entry.
        """
        while True:
            self._draws.open(entry.digest)
            self.ledger.charge(entry)
            nonce = self._draws.nonce_for(
                entry.purpose, entry.digest, entry.first_step, integers.numpy(), unseen=True
            )
            if nonce is not None:
                break
            entry = entry.later()
        return entry, {
            "purpose": entry.purpose,
            "entry": entry.digest,
            "step": entry.first_step,
            "nonce": nonce,
        }

    def _release_entry(
        self,
        purpose: str,
        occasion: ReleaseKey,
        mechanism: MechanismName,
        multiplier: float,
        clip_norm: float = 1.0,
        grid: Grid | None = None,
    ) -> Entry:
        """Build the ledger entry of a release, which does not depend on the exact result."""
        name = f"release:{purpose}"
        return self._entry(
            name,
            mechanism,
            multiplier,
            clip_norm,
            dict.fromkeys(occasion.partitions, 1.0),
            occasion.numbers,
            occasion.start,
            # with a label of its own, otherwise equal records would be visible in the ledger
            self.fingerprint(occasion.data, f"{name} {occasion.numbers.start} {occasion.start}"),
            grid=grid,
        )


def _refuse_other_shapes(
    total: Params | None, shapes: Mapping[str, torch.Size], purpose: str
) -> None:
    given = None if total is None else {key: value.shape for key, value in total.items()}
    if given is not None and given != dict(shapes):
        raise PrivacyError(
            f"the sum for {purpose!r} has shapes { {k: tuple(v) for k, v in given.items()} }; "
            f"allowed: the shapes of the query's rows, { {k: tuple(v) for k, v in shapes.items()} }"
        )
