"""Privacy settings of a user, which are validated when they are made."""

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
"""Smallest and largest value of each setting; outside of them, floating-point numbers overflow in
the accountant or in training.
"""
EPSILONS = (1e-6, 1e4)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class Privacy(CheckedFields):
    """Settings of record-level differential privacy for everything that a curator releases.

    Guarantee: for add/remove neighbours, the released model and state are (epsilon,
    delta)-indistinguishable for a record of any one partition, under the trust model of the ledger.
    The ledger states the epsilon that was really spent.

    >>> Privacy(epsilon=3, delta=1e-5)            # noise for the whole declared stream
    >>> Privacy(noise_multiplier=1.1)             # noise as given; epsilon is reported
    >>> Privacy(noise_multiplier=1.1, epsilon=3)  # as given; partitions above 3 leave the pools
    >>> Privacy(epsilon=(1, 3, 3))                # a budget for the records of each experience

    Args:
        epsilon: target for the worst partition; the noise is calibrated for the whole declared
            stream. Give one number per experience only if the strategy never uses records of
            earlier experiences. Together with `noise_multiplier` it is a cap: partitions whose
            records would exceed it are not used any more, and the run continues.
        noise_multiplier: standard deviation of the noise in units of the clip norm.
        delta: slack of the guarantee, about the probability that it fails. It should be below 1 /
            number of records; if not, there is a warning, and the statement says so.
        clip_norm: bound C on the L2 norm of one record's gradient; with `Adaptive`, the first
            bound.
        clipping: `flat` clips the whole gradient to C; `per-layer` clips each of L layers to C /
            sqrt(L); `Adaptive` lets C follow a quantile of the gradient norms.
        sampling_rate: probability that a record enters a step; None for batch_size / declared pool
            size.
        release_noise: a release after an experience has this many times the noise multiplier of a
            step.
        bands: None for Poisson sampling with independent noise. A number for noise that is
            correlated over this many steps, without sampling: every record takes part once per
            epoch, at a fixed step (see `perdure.privacy.noise.banded`).
        horizon: number of experiences to calibrate for, if the stream will grow; later experiences
            are assumed to be like the last one. None for the length of the stream.
        spent: charges of the records of every partition before this run, outside its ledger.
        seed: None for secret noise from the operating system; a number for reproducible *simulated*
            noise. Every printed epsilon says if the noise is simulated.
        diagnostics: `released`, or `raw` to show callbacks the batch sizes, losses and clipped
            shares. With `raw`, epsilon is infinite, and every printed epsilon says so.
        custom_forward: mode for user code (a forward pass, losses, an attack, views or clipping
            rules). `tested`: it runs in batches after the guard has tested it over the declared
            domain, and the statement says that the independence of records is tested.
            `record-by-record`: it runs on one record at a time, which is slower and excludes
            attacks; records are then independent by construction, except for state that the module
            keeps. Models of known modules, with strategies and attacks of the library, are
            independent by construction and run in batches in both modes.
        unit: protected unit: a record.
        relation: neighbouring data sets: one record more or less.

    Raises:
        ConfigError: if a value is outside its range.
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
            given = "one number per experience together with noise_multiplier or horizon"
            raise ConfigError.of(
                "privacy.epsilon",
                given,
                "one number per experience without noise_multiplier and "
                "horizon, or one number for all",
            )
        if self.bands is not None and (
            self.sampling_rate is not None or isinstance(self.clipping, Adaptive)
        ):
            given = f"{self.bands} with sampling_rate or adaptive clipping"
            raise ConfigError.of(
                "privacy.bands",
                given,
                "bands without sampling_rate and Adaptive clipping, "
                "because correlated noise uses no sampling",
            )

    @property
    def epsilons(self) -> tuple[float, ...]:
        """All values that were given as epsilon, as a tuple."""
        return (
            self.epsilon
            if isinstance(self.epsilon, tuple)
            else ()
            if self.epsilon is None
            else (self.epsilon,)
        )
