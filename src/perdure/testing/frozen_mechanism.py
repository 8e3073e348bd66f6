"""Private sum whose answers are recorded in one run and repeated in a second run, for `replay`.

A private sum releases an integer sum with integer noise. The key that draws the noise gets
the exact integers, the ledger entry that covers the draw, and the scale, and it decides which
records enter a step. So all draws are recorded at the key: an error in clipping, sampling,
reserving or counting is visible there.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from perdure.errors import PrivacyError
from perdure.privacy.grid import Grid
from perdure.privacy.ledger.entries import Entry
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.noise.banded import PARTS, BandedNoise
from perdure.privacy.noise.draw_log import DrawLog
from perdure.privacy.noise.key import NoiseKey
from perdure.privacy.private_sum import VOTE, MakePrivateSum, PrivateSum, ReleaseKey
from perdure.privacy.settings import Privacy

ROUNDING = 1e-9
"""Relative rounding error of float64 arithmetic with noise multipliers."""
BESIDE_THE_RATE = 1e-6
"""Relative distance, from the sampling rate, of the sampling number of the removed record."""
ONES = hashlib.sha256(b"perdure replay").digest()


class OtherReleaseError(PrivacyError):
    """The second run of a replay asks for a release that the first run did not have."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Draw:
    """One draw of noise by a private sum.

    Args:
        release: kind of release: gradient, count, reference, or release:NAME.
        step: step of the run.
        exact: (n,) exact values to which noise was added.
        answer: released values.
        allowed: largest change of the exact values by one record for which the ledger was charged;
            0 if the record is not sampled in the step.
        spread: True if the change is the largest minus the smallest difference (a selection), and
            not the L2 norm.
        joint: digest of the entry whose draws are bounded together; "" if each is bounded alone.
    """

    release: str
    step: int
    exact: Tensor
    answer: Tensor
    allowed: float
    spread: bool = False
    joint: str = ""

    def moved(self, other: "Draw") -> float:
        """Distance between the exact values of two runs, which is compared with `allowed`."""
        here = self.exact.double()
        there = other.exact.double()
        # scores may be infinite in both runs
        change = torch.where(here == there, torch.zeros_like(here), here - there)
        if not len(change):
            return 0.0
        return float(change.max() - change.min() if self.spread else change.norm())


@dataclass(kw_only=True, eq=False)
class Tape:
    """Draws of one private sum in order, and all problems with its ledger.

    Args:
        record: id of the record in which the two data sets differ.
        given: draws of the first run, whose answers this run gets; None in the first run.
    """

    record: int
    given: Sequence[Draw] | None = None
    draws: list[Draw] = field(default_factory=list)
    unpaid: list[str] = field(default_factory=list)
    ledger: Ledger | None = None

    def answer(self, own: Draw) -> Tensor:
        """Record a draw, and return the values to release.

        The first run releases its own values, and the second run the values of the first run.

        Raises:
            OtherReleaseError: if the first run had another release at this point.
        """
        place = len(self.draws)
        if self.given is not None:
            known = self.given[place] if place < len(self.given) else None
            asked = (own.release, own.step, tuple(own.exact.shape))
            first = known and (known.release, known.step, tuple(known.exact.shape))
            if known is None or asked != first:
                raise OtherReleaseError(
                    f"the second run asks for {asked} as release {place}, but the first run asked "
                    f"for {first}; the releases of a run may not depend on a record"
                )
            own = Draw(**(vars(own) | {"answer": known.answer}))
        self.draws.append(own)
        return own.answer.clone()


class ReplayKey(NoiseKey):
    """Simulated key whose sampling numbers depend on the record, and which records every draw.

    Args:
        tape: tape of the run.
        privacy: privacy settings of the run.
    """

    __slots__ = ("_beyond", "_drawn", "_privacy", "_spent", "_tape", "expected")

    def __init__(self, tape: Tape, privacy: Privacy) -> None:
        super().__init__(ONES, simulated=True)
        self._tape = tape
        self._privacy = privacy
        self._drawn: dict[tuple[object, ...], Tensor] = {}
        self._spent: dict[tuple[str, int], float] = {}
        self._beyond: set[tuple[str, int]] = set()
        self.expected: dict[str, float] = {}

    def mac(self, message: bytes) -> str:
        """Return the same fingerprint for all data, so that it never differs between runs."""
        return "0" * 64

    def coins(self, records: Tensor, *, entry: str, step: int) -> Tensor:
        """Return (n,) sampling number of each record, independent of the other records.

        The removed record is certainly sampled in even steps: its number is just below the charged
        rate. In odd steps its number is just above the rate, so it may change nothing. A step that
        samples it anyway has a higher sampling rate than the ledger says.
        """
        place, paid = self._paying(entry)
        out = torch.empty(len(records), dtype=torch.float64)
        for owner in sorted(set(records[:, 1].tolist())):
            own = records[:, 1] == owner
            out[own] = super().tags(records[own, 0], f"coins {place} {step} {owner}")
        rate = max(paid.scope.values()) if paid else 1.0
        mine = records[:, 0] == self._tape.record
        within = rate * (1 - BESIDE_THE_RATE)
        beyond = min(rate * (1 + BESIDE_THE_RATE), 1 - 2**-53)
        is_beyond = step % 2 == 1 and rate < 1
        out[mine] = beyond if is_beyond else within
        if is_beyond:
            self._beyond.add((entry, step))
        return out

    def tags(self, ids: Tensor, purpose: str) -> Tensor:
        """(n,) secret number of each record; 0 for the removed record, so that memory keeps it."""
        found = super().tags(ids, purpose)
        return torch.where(ids.cpu() == self._tape.record, torch.zeros_like(found), found)

    def add_noise(
        self, total: Tensor, scale: float, *, purpose: str, entry: str, step: int, nonce: str = ""
    ) -> None:
        """Add noise to `total` and record the draw; in the second run, use the first run's answer.

        The arguments are those of `NoiseKey.add_noise`.
        """
        exact = total.clone()
        super().add_noise(total, scale, purpose=purpose, entry=entry, step=step, nonce=nonce)
        _, paid = self._paying(entry)
        self._check(paid, purpose, step, (purpose, entry, step, nonce), exact)
        unit, slack = self._unit(paid, purpose)
        banded = paid is not None and paid.mechanism == "banded-gaussian"
        times = math.sqrt(paid.participations or paid.steps) if paid and banded else 1.0
        spent = self._spent.get((entry, step), 0.0) + (unit / scale) ** 2
        self._spent[entry, step] = spent
        if paid and spent * paid.noise_multiplier**2 > 1 + ROUNDING:
            self._tape.unpaid.append(
                f"{purpose} of step {step} has a noise multiplier of {spent**-0.5:.4g}, and its "
                f"entry says {paid.noise_multiplier:.4g}"
            )
        own = Draw(
            release=purpose,
            step=step,
            exact=exact,
            answer=total.clone(),
            allowed=0.0 if (entry, step) in self._beyond and not banded else unit * slack * times,
            joint=entry if banded else "",
        )
        total.copy_(self._tape.answer(own))

    def _paying(self, digest: str) -> tuple[int, Entry | None]:
        """Return the ledger entry with this digest, and its position in the ledger."""
        entries = self._tape.ledger.entries if self._tape.ledger else ()
        for place, entry in enumerate(entries):
            if entry.digest == digest:
                return place, entry
        return -1, None

    def _check(
        self,
        paid: Entry | None,
        purpose: str,
        step: int,
        place: tuple[object, ...],
        exact: Tensor,
    ) -> None:
        """Add to the tape's problems a draw that no ledger entry covers, or that reuses noise."""
        if paid is None:
            self._tape.unpaid.append(f"{purpose} of step {step} has no entry in the ledger")
        elif not paid.first_step <= step < paid.first_step + paid.steps:
            self._tape.unpaid.append(f"{purpose} of step {step} is beyond the steps of its entry")
        before = self._drawn.setdefault(place, exact)
        if before.shape != exact.shape or not torch.equal(before, exact):
            self._tape.unpaid.append(f"{purpose} of step {step} meets noise of another sum again")

    def _unit(self, paid: Entry | None, purpose: str) -> tuple[float, float]:
        """Return the integers per clip norm, and the largest change by a record in clip norms."""
        if paid is None or paid.grid is None:
            return 1.0, 1.0
        adaptive = self._privacy.clipping
        if purpose == "count" and not isinstance(adaptive, str):
            noise = adaptive.count_noise * self.expected[paid.digest] / VOTE
            return float(Grid.of(1, noise).steps), 1.0
        unit = paid.grid["steps"]
        if paid.mechanism == "banded-gaussian" and self._privacy.bands is not None:
            unit *= PARTS * BandedNoise(self._privacy.bands).gain
        return unit, 1 + paid.grid["slack"] + paid.grid["rounding"]


def frozen(make: MakePrivateSum, tape: Tape) -> MakePrivateSum:
    """Return a function that makes private sums which draw from a `ReplayKey`.

    Args:
        make: function that makes the private sum under test.
        tape: tape that records the draws.
    """

    def made(**parts: object) -> PrivateSum:
        privacy = parts["privacy"]
        ledger = parts["ledger"]
        assert isinstance(privacy, Privacy) and isinstance(ledger, Ledger)
        tape.ledger = ledger
        key = ReplayKey(tape, privacy)
        mechanism = make(**(parts | {"key": key, "draws": DrawLog(None, key)}))
        listeners: dict[str, Callable[..., object]] = {
            "reserve": _reserving(mechanism, key),
            "count": _answering(mechanism.count, tape, spread=False),
            "select": _answering(mechanism.select, tape, spread=True),
        }
        for name, listener in listeners.items():
            setattr(mechanism, name, listener)
        return mechanism

    return made


def _reserving(mechanism: PrivateSum, key: ReplayKey) -> Callable[..., None]:
    """Return `reserve` of a private sum, which also tells the key the batch size of each entry."""
    real = mechanism.reserve

    def reserve(**facts: object) -> None:
        purpose = facts.get("purpose", "gradient")
        real(**facts)  # type: ignore[arg-type]  # the arguments of `reserve`, whatever they are
        last = [entry for entry in mechanism.ledger.entries if entry.purpose == purpose]
        expected = facts["expected"]
        if last and isinstance(expected, float | int):
            key.expected[last[-1].digest] = float(expected)

    return reserve


def _answering(real: Callable[..., Tensor], tape: Tape, *, spread: bool) -> Callable[..., Tensor]:
    """Return a function that calls `count` or `select` of a private sum, and records the draw.

    One record changes a count, or the difference of two scores, by at most 1.
    """

    def answer(exact: Tensor, *, purpose: str, occasion: ReleaseKey) -> Tensor:
        value = real(exact, purpose=purpose, occasion=occasion)
        own = Draw(
            release=f"release:{purpose}",
            step=occasion.numbers.start,
            exact=exact.detach().cpu().clone(),
            answer=value.detach().clone(),
            allowed=1.0,
            spread=spread,
        )
        return tape.answer(own)

    return answer
