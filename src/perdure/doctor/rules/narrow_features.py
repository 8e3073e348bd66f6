"""Rule: the last layer has too few features for the classes."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.tasks import SingleLabel

LEAST = 64
"""Width of the hidden layer that the remedy proposes, at least."""


@dataclass(frozen=True, kw_only=True)
class NarrowFeatures(Rule):
    """Find a classifier whose last layer has fewer features than the classes need.

    The means of C classes can all be equally far from each other in C - 1 dimensions or more. Every
    layer before the last one passes its results through these features.

    Symptom: the last linear layer has fewer inputs than `share` of C - 1.

    Remedy: a wider last hidden layer.

    Source: Papyan, Han, Donoho 2020, "Prevalence of neural collapse", simplex of class means; own
    measurement on digits: 2 features lose 37 to 80 points of accuracy, 8 lose less than 5.

    Args:
        share: features of the last layer, relative to C - 1.
    """

    name: ClassVar[str] = "narrow features"
    cause: ClassVar[Cause] = "fit"
    source: ClassVar[str] = "Papyan et al. 2020, Prevalence of neural collapse; own measurement"

    share: float = 0.5

    def examine(self, case: Case) -> Finding | None:
        """Look at the last linear layer."""
        classes = case.stream.num_classes
        layers = [each for each in case.model.modules() if isinstance(each, nn.Linear)]
        if not isinstance(case.task, SingleLabel) or len(layers) < 2:
            return None
        features = layers[-1].in_features
        if layers[-1].out_features < classes or features >= self.share * (classes - 1):
            return None
        wide = max(LEAST, 2 * classes)
        return self.finding(
            f"the last layer tells {classes} classes apart by {features} features",
            measured=features / (classes - 1),
            threshold=self.share,
            remedy=Remedy(
                advice=f"a wider last hidden layer: model.hidden = [{wide}]",
                changes={"model.hidden": [wide]},
            ),
        )
