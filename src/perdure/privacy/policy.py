"""What a user asks of privacy, validated once."""

from dataclasses import dataclass
from typing import Literal

from perdure.errors import ConfigError

RANGES = {
    "epsilon": (1e-6, 1e4), "noise_multiplier": (1e-3, 1e6), "clip_norm": (1e-9, 1e9), "release_noise": (1e-3, 1e6),
    "sampling_rate": (1e-9, 1.0),
}  # fmt: skip
"""Least and greatest value: beyond them floating-point numbers overflow, in the accountant or in training."""


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """Record-level differential privacy of everything that leaves a curator.

    Guarantee: for add/remove neighbours, the released model and state are (epsilon, delta)-indistinguishable for a
    record of any one partition, under the trust model of the ledger; the ledger says what was really spent.

    Args:
        epsilon: target for the worst partition; the noise is calibrated for the whole declared stream. Give this or
            `noise_multiplier`, not both.
        noise_multiplier: standard deviation of the noise in units of the clip norm; epsilon is then only reported.
        delta: probability that the guarantee fails; smaller than 1 / number of records.
        clip_norm: bound C on the L2 norm of one record's gradient.
        sampling_rate: probability that a record enters a step; None for batch_size / declared pool size.
        release_noise: noise multiplier of a release after an experience, as a multiple of that of a step.
        seed: None for secret noise from the operating system; a number for reproducible *simulated* noise, which is
            labelled wherever epsilon is printed.

    Raises:
        ConfigError: for a value outside its range.
    """

    epsilon: float | None = None
    noise_multiplier: float | None = None
    delta: float = 1e-5
    clip_norm: float = 1.0
    sampling_rate: float | None = None
    release_noise: float = 4.0
    seed: int | None = None
    unit: Literal["record"] = "record"
    relation: Literal["add-remove"] = "add-remove"

    def __post_init__(self) -> None:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            given = f"epsilon={self.epsilon}, noise_multiplier={self.noise_multiplier}"
            raise ConfigError.of("privacy", given, "exactly one of epsilon and noise_multiplier")
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ConfigError.of(f"privacy.{name}", value, f"a number from {least:g} to {most:g}")
        if not 0 < self.delta < 1:
            raise ConfigError.of("privacy.delta", self.delta, "a number between 0 and 1, below 1 / number of records")
        if self.unit != "record":
            raise ConfigError.of("privacy.unit", self.unit, ("record",))
        if self.relation != "add-remove":
            raise ConfigError.of("privacy.relation", self.relation, ("add-remove",))
