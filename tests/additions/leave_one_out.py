"""Leave one out: the fall of the output when one feature takes its background value."""

from dataclasses import dataclass

import torch

from perdure.explain.base import (
    Attribution,
    Background,
    Explainer,
    Predict,
    Rows,
    Targets,
    attribution,
)


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut(Explainer):
    """Difference of the output with and without each feature, one feature at a time.

    Guarantee: see `Explainer.explain`.

    Args: see `Explainer`.

    Source: Zeiler and Fergus 2014, "Visualizing and understanding convolutional networks".
    """

    def explain(
        self,
        predict: Predict,
        inputs: Rows,
        background: Background,
        *,
        targets: Targets = None,
        generator: torch.Generator | None = None,
    ) -> Attribution:
        """Return the differences; `generator` is not used. See `Explainer.explain`."""
        asked = self.question(predict, inputs, background, targets)
        absent = asked.absent.float().mean(0).flatten().to(asked.inputs.dtype)
        differences = []
        for feature in range(asked.inputs[0].numel()):
            rows = asked.inputs.flatten(1).clone()
            rows[:, feature] = absent[feature]
            if asked.kept is not None:  # tokens that are always present
                rows = torch.where(asked.kept, asked.inputs, rows)
            differences.append(asked.outputs - asked.scores(rows.view_as(asked.inputs)))
        values = torch.stack(differences, 1)
        return attribution(asked, values, asked.outputs - values.sum(1))
