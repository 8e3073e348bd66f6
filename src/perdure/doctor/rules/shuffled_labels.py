"""Rule: labels have nothing to do with the inputs."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perdure.data.records import Records
from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.tasks import SingleLabel
from perdure.utils.seeding import generator

MOST = 2_000
"""Most records of an experience that the probe reads."""
FEWEST = 60
"""Fewest records of an experience that can be judged."""
NEIGHBOURS = 5
STAGES = 20
"""Most stages of a stream that are judged."""


@dataclass(frozen=True, kw_only=True)
class ShuffledLabels(Rule):
    """Find labels that simple probes cannot tell from chance.

    Symptom: on held-out records of every experience with several classes, the mean recall of the
    better of two probes (nearest class mean, five nearest neighbours) is less than `deviations`
    standard deviations above chance. Labels that only a deep model can read would be found, too;
    token sequences are compared by their counts of tokens.

    Remedy: none is a setting. Compare records and labels where they are read; a sort or a shuffle
    of one of them is the usual cause.

    Source: own measurement: on digits, breast_cancer and Adult the probes are 8 to 60 deviations
    above chance; with shuffled labels -2 to 2.

    Args:
        deviations: standard deviations above chance below which there is a finding.
    """

    name: ClassVar[str] = "shuffled labels"
    cause: ClassVar[Cause] = "data"
    source: ClassVar[str] = "own measurement"

    deviations: float = 3.0

    def examine(self, case: Case) -> Finding | None:
        """Probe the records of every experience that may be read."""
        if not isinstance(case.task, SingleLabel):
            return None
        found = [
            _above_chance(_some(case.records_of(stage.last), case.seed), case)
            for stage in case.stream.stages[:STAGES]
        ]
        known = [each for each in found if each is not None]
        if not known or max(known) >= self.deviations:
            return None
        return self.finding(
            f"probes on {case.origin} predict labels no better than chance: {max(known):.1f} "
            "standard deviations above it at best",
            measured=max(known),
            threshold=self.deviations,
            remedy=Remedy(advice="compare records and labels where they are read or sorted"),
            series=known,
            series_name="standard deviations above chance in each experience",
        )


def _some(records: Records, seed: int) -> Records:
    """Take at most `MOST` records in random order."""
    order = torch.randperm(len(records), generator=generator(seed, "doctor", "probe"))[:MOST]
    return records.take(order)


def _above_chance(records: Records, case: Case) -> float | None:
    """Return the mean recall above chance, in standard deviations; None if it cannot be judged."""
    if len(records) < FEWEST:
        return None
    features = _features(records.inputs, case)
    labels = records.labels.cpu()
    kept = torch.bincount(labels, minlength=case.stream.num_classes) >= 10
    features, labels = features[kept[labels]], labels[kept[labels]]
    classes = torch.bincount(labels).nonzero().flatten()
    half = len(labels) // 2
    if (
        len(classes) < 2
        or len(labels) < FEWEST
        or int((torch.bincount(labels[:half]) > 0).sum()) < len(classes)
    ):
        return None
    learnt = features[:half], labels[:half]
    wanted = labels[half:]
    counts = torch.bincount(wanted, minlength=len(kept))[classes]
    if bool((counts == 0).any()):
        return None
    best = max(
        float(_recall(predict(*learnt, features[half:]), wanted, classes))
        for predict in (_nearest_mean, _nearest_neighbours)
    )
    chance = 1 / len(classes)
    # the variance of a mean over classes of shares, each of a class's own records
    variance = float((chance * (1 - chance) / counts).sum()) / len(classes) ** 2
    return (best - chance) / math.sqrt(variance)


def _features(inputs: Tensor, case: Case) -> Tensor:
    """Return (n, d) standardised features; counts of tokens for token sequences."""
    rows = inputs.detach().cpu().flatten(1)
    if not case.domain.floats:
        width = case.domain.vocabulary or 1
        places = rows.long().clamp(0, width - 1)
        counts = torch.zeros(len(rows), width)
        rows = counts.scatter_add(1, places, torch.ones(places.shape))
    rows = rows.float().nan_to_num(0.0, 0.0, 0.0)
    return (rows - rows.mean(0)) / rows.std(0).clamp_min(1e-6)


def _nearest_mean(features: Tensor, labels: Tensor, others: Tensor) -> Tensor:
    classes = torch.bincount(labels).nonzero().flatten()
    means = torch.stack([features[labels == each].mean(0) for each in classes])
    return classes[torch.cdist(others, means).argmin(1)]


def _nearest_neighbours(features: Tensor, labels: Tensor, others: Tensor) -> Tensor:
    near = torch.cdist(others, features).topk(min(NEIGHBOURS, len(labels)), largest=False).indices
    return labels[near].mode(1).values


def _recall(predicted: Tensor, wanted: Tensor, classes: Tensor) -> Tensor:
    """Mean over classes of the share of a class's records that are predicted as this class."""
    hits = [(predicted[wanted == each] == each).double().mean() for each in classes]
    return torch.stack(hits).mean()
