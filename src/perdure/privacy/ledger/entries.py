"""Entries of a ledger: one charge each, with the partitions it touches."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

from perdure.errors import ConfigError
from perdure.privacy.accounting.charges import Charge, Noise, Relation
from perdure.privacy.ledger.storage import canonical_json, sha256

Unit = Literal["record", "client"]
Sampling = Literal["poisson", "none"]
MechanismName = Literal["gaussian", "discrete-gaussian", "exponential", "banded-gaussian", "none"]
Stated = Literal["", "by construction", "tested"]
CHARGED: Mapping[str, Noise] = {
    "gaussian": "gaussian",
    "discrete-gaussian": "discrete-gaussian",
    "exponential": "exponential",
    "banded-gaussian": "gaussian",
    "none": "gaussian",
}
"""Mechanism of an entry to the kind of noise that its cost is computed for.

Correlated noise costs as much as one Gaussian mechanism; raw data counts as no noise.
"""


STATED: tuple[Stated, ...] = ("", "tested", "by construction")
"""Kinds of knowledge about the independence of records, the weakest first."""


def weakest(said: Iterable[Stated]) -> Stated:
    """Return the weakest of several statements on independence; the strongest if there are none."""
    return min(said, key=STATED.index, default=STATED[-1])


def require_one_of(field: str, value: object, literal: Any) -> None:
    """Refuse a value that is not in a Literal type."""
    if value not in get_args(literal):
        raise ConfigError.of(field, value, get_args(literal))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Ledger entry: one reserved block of steps of one mechanism, and the exposed partitions.

    Args:
        purpose: use of the answer ("gradient", "reference", "release:fisher").
        mechanism: "gaussian"; "discrete-gaussian" for integer counts; "exponential" for a selection
            (see `Charge`); "banded-gaussian" for noise that is correlated over the steps (see
            `perdure.privacy.noise.banded`); "none" for raw data (noise multiplier 0, epsilon
            infinite).
        noise_multiplier: standard deviation of the noise divided by the clip norm.
        clip_norm: bound on the L2 norm of one unit's contribution.
        first_step: first step of the block in the run.
        steps: number of reserved steps; unused steps stay charged.
        sampling: "poisson" if Poisson sampling really ran and stayed secret; "none" in all other
            cases.
        scope: partition to the probability that one of its units is in a step.
        grid: for integer noise, all facts on which its cost depends (see
            `perdure.privacy.grid.Grid.facts`); None for noise from outside perdure.
        attempt: number of times that these steps were charged before, because their sums changed
            or their noise may have been used.
        participations: largest number of these steps in which one unit takes part, if the order is
            fixed; None for all steps.
        unit: protected unit, `record` or `client`.
        relation: how neighbouring data sets differ.
        trust: party that sees raw data.
        data: keyed fingerprint of the data.
        start: digest of model, optimiser and strategy state at the first step, and of everything
            else that decides the released values. The digest of the entry is part of the noise key,
            so after any change the noise is different.
        simulated: True if the noise comes from a seed that the user chose.
        independence: how the contribution of a record is known to be independent of other records,
            "by construction" or "tested"; "" if not known.

    Raises:
        ConfigError: if a value is not allowed.
    """

    purpose: str
    mechanism: str
    noise_multiplier: float
    clip_norm: float
    first_step: int
    steps: int
    sampling: Sampling
    scope: Mapping[str, float]
    grid: Mapping[str, float] | None = None
    attempt: int = 0
    participations: int | None = None
    unit: Unit = "record"
    relation: Relation = "add-remove"
    trust: str = "curator"
    data: str
    start: str
    simulated: bool
    independence: Stated = ""

    def __post_init__(self) -> None:
        scope = {str(partition): float(rate) for partition, rate in self.scope.items()}
        for field, value in (
            ("scope", scope),
            ("noise_multiplier", float(self.noise_multiplier)),
            ("clip_norm", float(self.clip_norm)),
        ):
            object.__setattr__(self, field, value)
        for field, literal in (
            ("mechanism", MechanismName),
            ("sampling", Sampling),
            ("unit", Unit),
            ("relation", Relation),
            ("independence", Stated),
        ):
            require_one_of(field, getattr(self, field), literal)
        if self.mechanism == "none" and self.noise_multiplier:
            raise ConfigError.of(
                "noise_multiplier",
                self.noise_multiplier,
                "0 without a mechanism, because raw data has no noise",
            )
        if self.grid and CHARGED[self.mechanism] != "gaussian":
            raise ConfigError.of("grid", dict(self.grid), f"None for {self.mechanism} noise")
        if not 0 < self.clip_norm < math.inf:
            raise ConfigError.of("clip_norm", self.clip_norm, "finite and above 0")
        if self.steps < 1 or self.first_step < 0:
            raise ConfigError.of(
                "steps", (self.first_step, self.steps), "first_step >= 0 and steps >= 1"
            )
        if self.participations is not None and not 1 <= self.participations <= self.steps:
            raise ConfigError.of(
                "participations", self.participations, f"a number from 1 to steps = {self.steps}"
            )
        if not self.scope or (self.sampling == "none" and set(self.scope.values()) != {1.0}):
            raise ConfigError.of(
                "scope",
                self.scope,
                "at least one partition, and rate 1.0 for each without sampling",
            )
        for partition in self.scope:
            self.charge([partition])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the entry's canonical JSON.

        It is part of the noise key, and does not depend on other lines of the ledger.
        """
        return sha256(canonical_json(asdict(self)))

    def again(self, steps: range, slots: int | None) -> "Entry":
        """Return an entry that charges some steps of this one again, for new noise.

        Args:
            steps: the remaining steps of the block.
            slots: number of steps per epoch if the order of the records is fixed.
        """
        times = None if slots is None else math.ceil(len(steps) / slots)
        return replace(
            self,
            first_step=steps.start,
            steps=len(steps),
            participations=times,
            attempt=self.attempt + 1,
        )

    def later(self) -> "Entry":
        """Return an entry that charges all steps of this one again, for new noise."""
        return replace(self, attempt=self.attempt + 1)

    @property
    def draws(self) -> int:
        """Number of integers that are drawn in all steps together."""
        return int(self.grid["numbers"]) * self.steps if self.grid else 0

    def charge(self, partitions: Iterable[str]) -> Charge | None:
        """Return the charge of a record that is in all of `partitions`; None if none is touched.

        A record is in a step at most once, so the sum of its rates bounds the probability that it
        is in the step.
        """
        kind = "grid-gaussian" if self.grid else CHARGED[self.mechanism]
        rates = [self.scope[partition] for partition in partitions if partition in self.scope]
        rate = rates[0] if len(rates) == 1 else min(1.0, sum(rates))
        times = self.steps if self.participations is None else self.participations
        return Charge(rate, self.noise_multiplier, times, kind) if rates else None
