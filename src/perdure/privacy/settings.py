"""Privacy settings of a user, validated once."""

from dataclasses import dataclass
from typing import Literal

from perdure.errors import ConfigError
from perdure.privacy.accounting.charges import Charge
from perdure.privacy.adaptive_clipping import Adaptive
from perdure.utils.checked_fields import CheckedFields

RANGES = {
    "noise_multiplier": (1e-3, 1e6),
    "clip_norm": (1e-9, 1e9),
    "release_noise": (1e-3, 1e6),
    "sampling_rate": (1e-9, 1.0),
    "bands": (1, 10_000),
    "horizon": (1, 100_000),
}
"""Least and greatest value: beyond them floating-point numbers overflow, in the accountant or in
training.
"""
EPSILONS = (1e-6, 1e4)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class Privacy(CheckedFields):
    """Record-level differential privacy of everything that leaves a curator.

    Guarantee: for add/remove neighbours, the released model and state are (epsilon,
    delta)-indistinguishable for a record of any one partition, under the trust model of the ledger;
    the ledger says what was really spent.

    >>> Privacy(epsilon=3, delta=1e-5)            # noise for the whole declared stream
    >>> Privacy(noise_multiplier=1.1)             # noise as given; epsilon is reported
    >>> Privacy(noise_multiplier=1.1, epsilon=3)  # as given; partitions above 3 leave the pools
    >>> Privacy(epsilon=(1, 3, 3))                # a budget for the records of each experience

    Args:
        epsilon: target for the worst partition; the noise is calibrated for the whole declared
            stream. One number an experience where no strategy uses records again. Beside a
            `noise_multiplier` it is a cap: partitions whose records would exceed it leave every
            pool, and the run goes on.
        noise_multiplier: standard deviation of the noise in units of the clip norm.
        delta: slack of the guarantee, about the probability that it fails; below 1 / number of
            records, else a warning comes out and the statement says so.
        clip_norm: bound C on the L2 norm of one record's gradient; where it is `Adaptive`, the
            first one.
        clipping: `flat`, the whole gradient; `per-layer`, each of L layers to C / sqrt(L); or
            `Adaptive`.
        sampling_rate: probability that a record enters a step; None for batch_size / declared pool
            size.
        release_noise: noise multiplier of a release after an experience, as a multiple of that of a
            step.
        bands: None for Poisson sampling with independent noise. A number for noise correlated over
            so many steps, without sampling: every record takes part once an epoch, at a step of its
            own (see `perdure.privacy.noise.banded`).
        horizon: experiences to calibrate for, where more will come than the stream has; they are
            taken to be like its last one. None for the length of the stream.
        spent: what the records of every partition were exposed to elsewhere, before.
        seed: None for secret noise from the operating system; a number for reproducible *simulated*
            noise, which is labelled wherever epsilon is printed.
        diagnostics: `released`, or `raw` to let callbacks see batch sizes, losses and clipped
            shares: epsilon is then infinite, and everything that prints it says so.
        custom_forward: `tested`: a model with a forward pass, losses, an attack, views or clipping
            rules of the user's own runs in batches once the guard has probed it over the declared
            domain, and the statement says that the independence of records is tested.
            `record-by-record`: such a model sees one record at a time, more slowly, without an
            attack, and no record can depend on another by construction, save for state that the
            module keeps. Models of known modules, with strategies and attacks of the library, are
            independent by construction and run in batches under both.

    Raises:
        ConfigError: for a value outside its range.
    """

    epsilon: float | tuple[float, ...] | None = None
    noise_multiplier: float | None = None
    delta: float = 1e-5
    clip_norm: float = 1.0
    clipping: Literal["flat", "per-layer"] | Adaptive = "flat"
    sampling_rate: float | None = None
    release_noise: float = 4.0
    bands: int | None = None
    horizon: int | None = None
    spent: tuple[Charge, ...] = ()
    seed: int | None = None
    diagnostics: Literal["released", "raw"] = "released"
    custom_forward: Literal["tested", "record-by-record"] = "tested"
    unit: Literal["record"] = "record"
    relation: Literal["add-remove"] = "add-remove"

    def __post_init__(self) -> None:
        if self.epsilon is None and self.noise_multiplier is None:
            allowed = (
                "epsilon (the noise follows), noise_multiplier (epsilon follows), or both "
                "(epsilon is a cap)"
            )
            raise ConfigError.of("privacy", "neither epsilon nor noise_multiplier", allowed)
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and least <= value <= most):
                raise ConfigError.of(
                    f"privacy.{name}", value, f"a number from {least:g} to {most:g}"
                )
        for value in self.epsilons:
            if not (_is_number(value) and EPSILONS[0] <= value <= EPSILONS[1]):
                raise ConfigError.of(
                    "privacy.epsilon", value, "a number from {:g} to {:g}".format(*EPSILONS)
                )
        if not (_is_number(self.delta) and 0 < self.delta < 1):
            raise ConfigError.of(
                "privacy.delta", self.delta, "a number between 0 and 1, below 1 / number of records"
            )
        self._check_choices()

    def _check_choices(self) -> None:
        for name, allowed in (
            ("clipping", ("flat", "per-layer")),
            ("unit", ("record",)),
            ("relation", ("add-remove",)),
            ("diagnostics", ("released", "raw")),
            ("custom_forward", ("tested", "record-by-record")),
        ):
            value = getattr(self, name)
            if value not in allowed and not (name == "clipping" and isinstance(value, Adaptive)):
                options = ", ".join(allowed) + (", Adaptive(...)" if name == "clipping" else "")
                raise ConfigError.of(f"privacy.{name}", value, options)
        if isinstance(self.epsilon, tuple) and (
            self.noise_multiplier is not None or self.horizon is not None
        ):
            given = "one number an experience, with noise_multiplier or horizon"
            raise ConfigError.of(
                "privacy.epsilon", given, "one number an experience by itself, or one in all"
            )
        if self.bands is not None and (
            self.sampling_rate is not None or isinstance(self.clipping, Adaptive)
        ):
            given = f"{self.bands} with sampling_rate or adaptive clipping"
            raise ConfigError.of(
                "privacy.bands", given, "bands with neither: correlated noise is not sampled"
            )

    @property
    def epsilons(self) -> tuple[float, ...]:
        """All that was given as epsilon."""
        return (
            self.epsilon
            if isinstance(self.epsilon, tuple)
            else ()
            if self.epsilon is None
            else (self.epsilon,)
        )
