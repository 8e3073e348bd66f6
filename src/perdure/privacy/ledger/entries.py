"""What was spent: entries, the partitions they touch, and the epsilon that follows. Reads; never writes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, Literal, get_args

from perdure.errors import ConfigError, LedgerError
from perdure.privacy.accounting import calibration as accounting
from perdure.privacy.accounting.accountants import Noise
from perdure.privacy.accounting.calibration import Accountant, Charge, Relation
from perdure.privacy.ledger.storage import Body, canonical, sha256

SCHEMA = 1

Unit = Literal["record", "client"]
Sampling = Literal["poisson", "none"]
Mechanism = Literal["gaussian", "discrete-gaussian", "exponential", "banded-gaussian", "none"]
CHARGED: Mapping[str, Noise] = {
    "gaussian": "gaussian", "discrete-gaussian": "discrete-gaussian", "exponential": "exponential",
    "banded-gaussian": "gaussian", "none": "gaussian",
}  # fmt: skip
"""How a mechanism is accounted: correlated noise as the Gaussian of its strategy matrix, raw data as no noise."""


def _one_of(field: str, value: object, literal: Any) -> None:
    if value not in get_args(literal):
        raise ConfigError.of(field, value, get_args(literal))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One reserved block of steps of one mechanism, and everyone exposed to it.

    Args:
        purpose: what for ("gradient", "reference", "release:fisher").
        mechanism: "gaussian"; "discrete-gaussian" of integer counts; "exponential", a selection (see `Charge`);
            "banded-gaussian", whose noise is correlated over the steps (see `perdure.privacy.noise.banded`); "none" for
            data handed out raw (noise multiplier 0, epsilon infinite).
        noise_multiplier: standard deviation of the noise divided by the clip norm.
        clip_norm: bound on the L2 norm of one unit's contribution.
        first_step: first step of the block in the run.
        steps: how many steps are reserved; unused ones stay charged.
        sampling: "poisson" where it really ran and stayed secret, else "none".
        scope: origin partition to the probability that one of its units is in a step.
        participations: in how many of the steps one unit takes part at most, where their order is fixed; None for
            all of them.
        unit: what the entry protects.
        relation: how neighbouring data sets differ.
        trust: who sees raw data.
        data: keyed fingerprint of the data.
        start: digest of model, optimiser and strategy state at the first step and of all else that decides
            what is released. Noise is keyed by this entry's digest: a change of any of it never meets the same
            noise.
        simulated: whether noise comes from a seed that the user chose.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    purpose: str
    mechanism: str
    noise_multiplier: float
    clip_norm: float
    first_step: int
    steps: int
    sampling: Sampling
    scope: Mapping[str, float]
    participations: int | None = None
    unit: Unit = "record"
    relation: Relation = "add-remove"
    trust: str = "curator"
    data: str
    start: str
    simulated: bool

    def __post_init__(self) -> None:
        scope = {str(partition): float(rate) for partition, rate in self.scope.items()}
        for field, value in (
            ("scope", scope),
            ("noise_multiplier", float(self.noise_multiplier)),
            ("clip_norm", float(self.clip_norm)),
        ):
            object.__setattr__(self, field, value)
        for field, literal in (
            ("mechanism", Mechanism), ("sampling", Sampling), ("unit", Unit), ("relation", Relation)
        ):  # fmt: skip
            _one_of(field, getattr(self, field), literal)
        if self.mechanism == "none" and self.noise_multiplier:
            raise ConfigError.of("noise_multiplier", self.noise_multiplier, "0 where data is handed out raw")
        if not 0 < self.clip_norm < math.inf:
            raise ConfigError.of("clip_norm", self.clip_norm, "finite and above 0")
        if self.steps < 1 or self.first_step < 0:
            raise ConfigError.of("steps", (self.first_step, self.steps), "first_step >= 0 and steps >= 1")
        if self.participations is not None and not 1 <= self.participations <= self.steps:
            raise ConfigError.of("participations", self.participations, f"from 1 to the {self.steps} steps")
        if not self.scope or (self.sampling == "none" and set(self.scope.values()) != {1.0}):
            raise ConfigError.of("scope", self.scope, "at least one partition, at rate 1.0 without sampling")
        for partition in self.scope:
            self.charge([partition])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the entry's canonical JSON; it keys the noise and knows nothing of the chain."""
        return sha256(canonical(asdict(self)))

    def charge(self, partitions: Iterable[str]) -> Charge | None:
        """Return what the entry costs a record that is in all of `partitions`, if it touches any.

        A record is in a step at most once, so its rates add up to a bound on its probability of being there.
        """
        rates = [self.scope[partition] for partition in partitions if partition in self.scope]
        rate = rates[0] if len(rates) == 1 else min(1.0, sum(rates))
        times = self.steps if self.participations is None else self.participations
        return Charge(rate, self.noise_multiplier, times, CHARGED[self.mechanism]) if rates else None


@dataclass(frozen=True)
class Statement:
    """An epsilon with everything it means nothing without."""

    epsilon: float
    delta: float
    unit: str
    relation: str
    accountant: str
    sampling: str
    trust: str
    simulated: bool

    def __str__(self) -> str:
        # rounded up, so that what is printed was never exceeded
        value = "infinite" if math.isinf(self.epsilon) else f"{math.ceil(self.epsilon * 100 - 1e-9) / 100:.2f}"
        relation = self.relation.replace("add-remove", "add/remove")
        delta = f"{self.delta:g}".replace("e-0", "e-")
        facts = (self.unit, relation, f"delta {delta}", self.accountant.upper(), self.sampling, self.trust)
        warning = "; simulation: not a private release" if self.simulated else ""
        return f"epsilon {value} ({', '.join(facts)}{warning})"


class Account:
    """What was spent: partitions with declared sizes, entries in order. The reading side of every ledger."""

    def __init__(self, *, owner: str = "", unit: Unit = "record", relation: Relation = "add-remove") -> None:
        _one_of("unit", unit, Unit)
        _one_of("relation", relation, Relation)
        self.owner, self.unit, self.relation = owner, unit, relation
        self.sizes: dict[str, int] = {}
        self.entries: list[Entry] = []

    @classmethod
    def replay(cls, bodies: Sequence[Body], *, where: str) -> "Account":
        """Rebuild the account that verified lines tell of."""
        account = cls(**header(bodies, where))
        for number, body in enumerate(bodies[1:], 2):
            account.read(body, f"{where}, entry {number}")
        return account

    def read(self, body: Body, where: str) -> None:
        """Take in one verified line."""
        try:
            self.take(body)
        except (KeyError, TypeError, ConfigError) as error:
            raise LedgerError(f"{where}: not a line that this version reads ({error})") from error

    def take(self, body: Body) -> None:
        """Take in one line of this version."""
        kind, content = body["kind"], {name: value for name, value in body.items() if name != "kind"}
        if kind == "partition":
            self.sizes[content["name"]] = content["size"]
        elif kind == "entry":
            self.entries.append(Entry(**content))
        elif kind != "grant":
            raise ConfigError.of("kind", kind, ("partition", "entry", "grant"))

    @property
    def partitions(self) -> tuple[str, ...]:
        """Names of all declared partitions, in order."""
        return tuple(self.sizes)

    @property
    def simulated(self) -> bool:
        """Whether any noise came from a seed that the user chose."""
        return any(entry.simulated for entry in self.entries)

    def charges(self, partition: str) -> tuple[Charge, ...]:
        """All charges of a record of `partition`, in order."""
        return self.exposure([partition])

    def epsilon(
        self, partitions: Iterable[str] | None = None, *, delta: float, accountant: Accountant = "pld"
    ) -> float:
        """Epsilon of a record that is in all of `partitions` (None: of the worst record of one partition).

        Under replace-one, `partitions` are all that the old and the new record touch.
        """
        if partitions is None and accountant == "pld":
            return self.worst(delta)[1]
        histories = self._histories() if partitions is None else {"": self.exposure(list(partitions))}
        spent = (
            accounting.epsilon(history, delta=delta, accountant=accountant, relation=self.relation)
            for history in histories.values()
        )
        return max(spent, default=0.0)

    def worst(self, delta: float) -> tuple[str, float]:
        """Partition whose records spent most (under replace-one perhaps two) and its PLD epsilon."""
        return accounting.worst(self._histories(), delta=delta, relation=self.relation)

    def statement(self, delta: float) -> Statement:
        """Worst epsilon so far, with all that belongs to it."""
        kinds = {entry.sampling for entry in self.entries}
        sampled = "Poisson sampling" if "none" not in kinds else "Poisson sampling and full passes"
        trust = sorted({"trusted curator" if e.trust == "curator" else e.trust for e in self.entries})
        return Statement(
            epsilon=self.epsilon(delta=delta),
            delta=delta,
            unit=self.unit,
            relation=self.relation,
            accountant="pld",
            sampling=sampled if "poisson" in kinds else "no sampling",
            trust=" and ".join(trust) or "trusted curator",
            simulated=self.simulated,
        )

    def exposure(self, partitions: Sequence[str]) -> tuple[Charge, ...]:
        """All charges of a record that is in all of `partitions`, in order."""
        for partition in partitions:
            if partition not in self.sizes:
                raise ConfigError.of("partition", partition, self.sizes)
        charges = (entry.charge(partitions) for entry in self.entries)
        return tuple(charge for charge in charges if charge is not None)

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Partitions that one neighbouring change may touch: one, or under replace-one also any two."""
        groups: list[tuple[str, ...]] = [(partition,) for partition in self.sizes]
        if self.relation == "replace-one":
            groups += list(combinations(self.sizes, 2))
        return {" and ".join(group): group for group in groups}

    def _histories(self) -> dict[str, tuple[Charge, ...]]:
        return {name: self.exposure(group) for name, group in self.groups().items()}


def header(bodies: Sequence[Body], where: str) -> dict[str, Any]:
    """Owner, unit and relation from the first line.

    Raises:
        LedgerError: when it is not the header of a ledger.
    """
    first = bodies[0] if bodies else {}
    if first.get("kind") != "header" or first.get("schema") != SCHEMA:
        raise LedgerError(f"{where}, line 1: not the header of a ledger of schema {SCHEMA}")
    return {name: first[name] for name in ("owner", "unit", "relation")}
