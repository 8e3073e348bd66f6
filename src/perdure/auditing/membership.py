"""Membership inference: attacks that distinguish the training records of a classifier from others.

The attack is on the trained model, with knowledge of its training; `perdure.auditing.canaries`
tests the mechanism instead. A weak attack proves nothing: only the epsilon in the ledger bounds all
attacks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.data.records import Records
from perdure.errors import ConfigError
from perdure.tasks import SingleLabel, refuse_other_tasks
from perdure.utils.chunking import by_pieces
from perdure.utils.finite_outputs import finite_outputs
from perdure.utils.seeding import derive, generator

Predictor = Callable[[Tensor], Tensor]
"""Function from inputs (n, ...) to logits (n, C)."""


@dataclass(frozen=True, kw_only=True)
class MembershipResult:
    """Success of an attack that tries to tell the training records of a classifier from others.

    Args:
        auc: probability that a member has a higher score than a non-member; 0.5 equals random
            guessing.
        auc_error: standard error of `auc` (Hanley and McNeil 1982).
        true_positive_rates: from false-positive rate to the share of members that are found at this
            rate.
        records: number of attacked records.
        shadows: number of shadow models that the attacker trained.
    """

    auc: float
    auc_error: float
    true_positive_rates: Mapping[float, float]
    records: int
    shadows: int

    def __str__(self) -> str:
        rates = ", ".join(
            f"{100 * t:.1f} % at {100 * f:g} %" for f, t in self.true_positive_rates.items()
        )
        return (
            f"membership inference (LiRA, {self.shadows} shadow models, {self.records} records): "
            f"AUC {self.auc:.3f} +- {self.auc_error:.3f} (0.5 is guessing); true positives "
            f"at false positives: {rates}"
        )


def lira(
    target: Predictor,
    train: Callable[[Records, int], Predictor],
    records: Records,
    members: Tensor,
    *,
    shadows: int = 8,
    seed: int = 0,
    false_positive_rates: Sequence[float] = (0.01, 0.1),
) -> MembershipResult:
    """Attack a trained classifier with the online likelihood-ratio attack (LiRA).

    A score decides for each record if it was in training. A few shadow models are enough.

        score = log N(f; mean_in, s_in^2) - log N(f; mean_out, s_out^2)
        f     = log p_y - log(1 - p_y) of the target

    Each record has its own means, over the shadow models that were (in) or were not (out) trained
    on it. The variances are common to all records, because there are few models. Shadow models come
    in pairs: one is trained on a random half of the records, the other on the other half. So each
    record is in half of the models.

    Args:
        target: classifier to attack.
        train: function from records and a seed to a classifier, trained in the same way as the
            target.
        records: members and non-members of the same population.
        members: (n,) bool, True for the records that trained the target.
        shadows: number of shadow models; even, and at least 4.
        seed: seed of the random halves and of the shadow models.
        false_positive_rates: rates at which true positives are counted.

    Raises:
        ConfigError: if `shadows` is odd or below 4, if there are no members or no non-members, or
            if records have more than one class.

    Source: Carlini et al. 2022, Membership inference attacks from first principles, section VI and
    figure 9.
    """
    reason = "it scores the probability of one class"
    refuse_other_tasks(records.task, (SingleLabel,), "membership inference", reason)
    if shadows < 4 or shadows % 2:
        raise ConfigError.of("shadows", shadows, "an even number of at least 4")
    if len(members) != len(records) or bool(members.all()) or not bool(members.any()):
        raise ConfigError.of(
            "members",
            tuple(members.shape),
            "a mask over the records that has both members and non-members",
        )
    seen = halves(len(records), shadows, seed).to(members.device)
    models = [train(records.take(mask), derive(seed, "shadow", k)) for k, mask in enumerate(seen)]
    confidences = torch.stack([logit_confidence(model, records) for model in models])
    scores = likelihood_ratio(logit_confidence(target, records), confidences, seen)
    inside = scores[members]
    outside = scores[~members]
    auc = area_under_curve(inside, outside)
    return MembershipResult(
        auc=auc,
        auc_error=area_error(auc, len(inside), len(outside)),
        records=len(records),
        shadows=shadows,
        true_positive_rates={
            rate: true_positives(inside, outside, rate) for rate in false_positive_rates
        },
    )


def halves(n: int, shadows: int, seed: int) -> Tensor:
    """Return (shadows, n) bool: a random half of the records, then the other half, and so on."""
    first = [
        torch.randperm(n, generator=generator(seed, "half", k)) < n // 2
        for k in range(shadows // 2)
    ]
    return torch.stack([mask for half in first for mask in (half, ~half)])


@torch.no_grad()
def logit_confidence(predict: Predictor, records: Records) -> Tensor:
    """Return (n,) log p_y - log(1 - p_y), which has nearly a normal distribution.

    It is the logit of the label minus the log-sum-exp of all other logits.
    """
    logits = finite_outputs(by_pieces(predict, records.inputs)).double()
    labels = records.labels[:, None]
    others = logits.scatter(1, labels, -math.inf).logsumexp(1)
    return logits.gather(1, labels)[:, 0] - others


def likelihood_ratio(target: Tensor, shadows: Tensor, seen: Tensor) -> Tensor:
    """Return (n,) log likelihood ratio of the target's confidences (n,), with shadow models.

    The shadow models have confidences (k, n).

    Args:
        target: (n,) confidences of the target.
        shadows: (k, n) confidences of the shadow models.
        seen: (k, n) bool, True if the shadow model was trained on the record; each record has at
            least two models with it and two without it.
    """
    fits = []
    for mask in (seen, ~seen):
        mean = (shadows * mask).sum(0) / mask.sum(0)
        freedom = (mask.sum(0) - 1).sum()
        variance = ((shadows - mean).square() * mask).sum() / freedom
        fits.append(-0.5 * (target - mean).square() / variance - 0.5 * variance.log())
    return fits[0] - fits[1]


def area_under_curve(inside: Tensor, outside: Tensor) -> float:
    """Probability that one of `inside` (n,) is above one of `outside` (n',), ties counting half."""
    ordered = outside.sort().values
    below = torch.searchsorted(ordered, inside, right=False) + torch.searchsorted(
        ordered, inside, right=True
    )
    return float(below.double().mean() / (2 * len(outside)))


def area_error(auc: float, n: int, other: int) -> float:
    """Standard error of an area from n and `other` scores (Hanley and McNeil 1982, equation 1)."""
    both_above = auc / (2 - auc)
    both_below = 2 * auc**2 / (1 + auc)
    total = auc * (1 - auc) + (n - 1) * (both_above - auc**2) + (other - 1) * (both_below - auc**2)
    return math.sqrt(total / (n * other))


def true_positives(inside: Tensor, outside: Tensor, rate: float) -> float:
    """Share of `inside` above a threshold that at most the share `rate` of `outside` exceeds."""
    allowed = min(int(rate * len(outside)), len(outside) - 1)
    threshold = outside.sort(descending=True).values[allowed]
    return float((inside > threshold).double().mean())
