"""Randomised smoothing: the class that most noisy copies of an input get, with its radius."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.adversarial.certificates.card import Certificate
from perdure.adversarial.certificates.interval_bounds import refuse_misfits
from perdure.adversarial.robust_accuracy import fixed
from perdure.errors import ConfigError
from perdure.utils.checked_fields import CheckedFields

ABSTAINED = -1
"""Class of a record for which the votes are too close."""


@dataclass(frozen=True, kw_only=True)
class Smoothing(CheckedFields):
    """Classifier that answers with the class most noisy copies of an input get.

        g(x) = argmax_c P[f(x + u) = c],  u ~ N(0, deviation^2 I)

    No change of a record with an L2 norm below `radii` moves its class, if the certificate holds.
    The base model should be trained on inputs with the same noise: `Views` of a function that adds
    normal noise. A copy whose logits are NaN votes for no class.

    Guarantee: the certificate of a record is wrong with a probability of at most `alpha`, over the
    noise. None for privacy: answers are exact statistics of inputs, so they must be public.

    Args:
        predict: module, or another function (k, ...) -> (k, C) logits.
        deviation: standard deviation of the noise, in units of the inputs.
        alpha: probability of a wrong certificate or prediction, for each record.
        samples: noisy copies of a record that estimate the probability of its class.
        guesses: noisy copies of a record that choose the class to certify.
        batch_size: noisy copies in one pass.

    Source: Cohen, Rosenfeld, Kolter 2019, "Certified adversarial robustness via randomized
    smoothing", algorithm in section 3.2 and theorem 1.
    """

    predict: Callable[[Tensor], Tensor]
    deviation: float
    alpha: float = 0.001
    samples: int = 1000
    guesses: int = 100
    batch_size: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.deviation < math.inf:
            raise ConfigError.of("deviation", self.deviation, "a positive number")
        if not 0 < self.alpha < 1:
            raise ConfigError.of("alpha", self.alpha, "a number between 0 and 1")
        for name in ("samples", "guesses", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError.of(name, getattr(self, name), "1 or more")

    def classes(self, inputs: Tensor, *, generator: torch.Generator) -> Tensor:
        """Return the class (n,) of each record; -1 where the two best classes are too close.

        The best class is told from the second by a two-sided binomial test at level `alpha`.

        Args:
            inputs: (n, ...) inputs.
            generator: CPU generator for the noise.
        """
        found = []
        for votes in self._votes(inputs, self.samples, generator):
            best, second = votes.topk(2).values.tolist()
            tie = best == second or 2 * _tail(best, best + second) > self.alpha
            found.append(ABSTAINED if tie else int(votes.argmax()))
        return torch.tensor(found, dtype=torch.int64)

    def certify(self, inputs: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the class (n,) of each record and its radius (n,) in L2.

            radius = deviation * Phi^-1(p),  p = Clopper-Pearson lower bound of P[f(x + u) = c]

        Where p is at most 1/2, the class is -1 and the radius 0.

        Args:
            inputs: (n, ...) inputs.
            generator: CPU generator for the noise.
        """
        guessed = [int(votes.argmax()) for votes in self._votes(inputs, self.guesses, generator)]
        tallied = self._votes(inputs, self.samples, generator)
        pairs = zip(guessed, tallied, strict=True)
        lowest = [lower_bound(int(votes[c]), self.samples, self.alpha) for c, votes in pairs]
        shares = torch.tensor(lowest, dtype=torch.float64)
        sure = shares > 0.5
        classes = torch.where(sure, torch.tensor(guessed), ABSTAINED)
        quantiles = torch.special.ndtri(shares.clamp_min(0.5))
        return classes, self.deviation * quantiles

    def certificate(
        self, inputs: Tensor, labels: Tensor, *, epsilon: float, generator: torch.Generator
    ) -> Certificate:
        """Return the share of records with the right class and a radius of at least `epsilon`.

        The clean accuracy is that of the smoothed classifier; it errs where it abstains.

        Args:
            inputs: (n, ...) inputs.
            labels: (n,) int64 labels.
            epsilon: radius in L2, in units of the inputs.
            generator: CPU generator for the noise.
        """
        refuse_misfits(inputs, labels, epsilon, None)
        classes, radii = self.certify(inputs, generator=generator)
        right = classes == labels.cpu()
        return Certificate(
            method=f"smoothing with deviation {self.deviation:g}, {self.samples} samples",
            norm="l2",
            epsilon=epsilon,
            records=len(inputs),
            clean_accuracy=100.0 * float(right.double().mean()),
            certified_accuracy=100.0 * float((right & (radii >= epsilon)).double().mean()),
            confidence=1 - self.alpha,
        )

    def _votes(self, inputs: Tensor, count: int, generator: torch.Generator) -> list[Tensor]:
        """Return, for each record, the number (C,) of noisy copies that get each class."""
        if not inputs.is_floating_point():
            raise ConfigError.of("inputs.dtype", inputs.dtype, "a floating-point type")
        with fixed(self.predict), torch.no_grad():
            return [self._votes_of(row, count, generator) for row in inputs]

    def _votes_of(self, row: Tensor, count: int, generator: torch.Generator) -> Tensor:
        total: Tensor | None = None
        for start in range(0, count, self.batch_size):
            shape = (min(self.batch_size, count - start), *row.shape)
            noise = torch.randn(shape, dtype=row.dtype, generator=generator).to(row.device)
            logits = self.predict(row + self.deviation * noise)
            logits = logits[logits.amax(1).isfinite()]  # NaN or +inf is a vote for no class
            votes = logits.argmax(1).bincount(minlength=logits.shape[1]).cpu()
            total = votes if total is None else total + votes
        assert total is not None
        return total


def lower_bound(hits: int, trials: int, alpha: float) -> float:
    """Return the exact lower confidence bound of a share, at level 1 - alpha (Clopper-Pearson).

    Args:
        hits: number of votes for the class.
        trials: number of all votes.
        alpha: probability that the bound is too high.

    >>> round(lower_bound(100, 100, 0.001), 4)
    0.9333
    """
    from scipy.special import betaincinv  # scipy.stats takes seconds to load

    return float(betaincinv(hits, trials - hits + 1, alpha)) if hits else 0.0


def _tail(hits: int, trials: int) -> float:
    """Return the probability of at least so many hits in trials of a fair coin."""
    from scipy.special import betainc

    return float(betainc(hits, trials - hits + 1, 0.5))
