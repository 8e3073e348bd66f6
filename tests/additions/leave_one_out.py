"""Leave one out: the fall of the output when one feature takes its background value."""

from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.explain.base import Attribution, Explainer, Predict, chosen_targets, scores


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut(Explainer):
    """Difference of the output with and without each feature, one feature at a time.

    Guarantee: see `Explainer.explain`.

    Args: see `Explainer`.

    Source: Zeiler and Fergus 2014, "Visualizing and understanding convolutional networks".
    """

    @torch.no_grad()
    def explain(
        self,
        predict: Predict,
        inputs: Tensor,
        background: Tensor,
        *,
        targets: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Attribution:
        """Return the differences; `generator` is not used. See `Explainer.explain`."""
        targets = chosen_targets(predict, inputs, targets, self.chunk)
        absent = background.mean(0).flatten()
        whole = scores(predict, inputs, targets)
        differences = []
        for feature in range(inputs[0].numel()):
            rows = inputs.flatten(1).clone()
            rows[:, feature] = absent[feature]
            differences.append(whole - scores(predict, rows.view_as(inputs), targets))
        values = torch.stack(differences, 1)
        base = (whole - values.sum(1)).to(inputs.dtype)
        values = values.view_as(inputs).to(inputs.dtype)
        return Attribution(values=values, base=base, targets=targets)
