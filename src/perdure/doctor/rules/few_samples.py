"""Rule: an explanation has too few samples for its features."""

import math
from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule

BASE = 2048
"""Samples that shap's default adds to two for each feature."""


@dataclass(frozen=True, kw_only=True)
class FewSamples(Rule):
    """Find explanations with fewer samples than a linear model of all features needs.

    KernelSHAP and LIME fit a linear model of d features, or of d superpixels (`cells`). With fewer
    samples than d it is not determined, and with few more it follows the draw of the samples.

    Symptom: the explainer has `samples`, and there are fewer than `each` for each feature.

    Remedy: `explain.samples`, 2 d + 2048, or all 2^d - 2 coalitions if they are fewer.

    Source: Lundberg and Lee 2017; the default of shap.KernelExplainer, 2 d + 2048.

    Args:
        each: samples for each feature below which there is a finding.
    """

    name: ClassVar[str] = "few samples"
    cause: ClassVar[Cause] = "fit"
    source: ClassVar[str] = "shap.KernelExplainer, default number of samples"

    each: float = 4.0

    def examine(self, case: Case) -> Finding | None:
        """Compare the samples of the explainer with the features of a record."""
        samples = getattr(case.explainer, "samples", None)
        features = _players(case)
        if not isinstance(samples, int) or samples >= self.each * features:
            return None
        # all coalitions of few features are enough
        most = 2 ** min(features, 30) - 2
        if samples >= most:
            return None
        more = min(2 * features + BASE, most)
        grouped = features < math.prod(case.stream.input_shape)
        noun = "superpixels" if grouped else "features"
        return self.finding(
            f"an explanation of {features} {noun} has {samples} samples",
            measured=samples / features,
            threshold=self.each,
            remedy=Remedy(advice=f"samples = {more}", changes={"explain.samples": more}),
        )


def _players(case: Case) -> int:
    """Return the number of features, or of superpixels, that are explained."""
    shape = tuple(case.stream.input_shape)
    cells = getattr(case.explainer, "cells", None)
    # the explainer refuses cells that do not fit the records, in words of its own
    if not isinstance(cells, int) or len(shape) < 2 or cells > min(shape[-2:]):
        return math.prod(shape)
    return int(cells**2)
