"""Single-label classification: one class per record.

    loss_i = -log softmax(outputs_i)[y_i],   metric = accuracy in percent

Targets are (n,) int64 classes, outputs (n, C) logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.tasks.base import Metric, Task, check_shape, mask_outputs


@dataclass(frozen=True, kw_only=True)
class SingleLabel(Task):
    """Task with one class per record (the default): cross entropy, and accuracy in percent."""

    name: ClassVar[str] = "single-label"
    metric: ClassVar[Metric] = Metric(name="accuracy", unit="%")

    def losses(self, outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (n,) cross entropy, or the chosen loss, over the classes of the mask."""
        logits = mask_outputs(outputs, mask)
        if self.loss is not None:
            return self.loss.losses(logits, targets, mask)
        return F.cross_entropy(logits, targets, reduction="none")

    def distillation(
        self,
        outputs: Tensor,
        teacher: Tensor,
        targets: Tensor,
        *,
        known: Tensor | None = None,
        allowed: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """(n,) cross entropy of each record with the teacher's probabilities, at a temperature."""
        q = torch.softmax(mask_outputs(teacher, known) / temperature, dim=1)
        log_p = torch.log_softmax(mask_outputs(outputs, allowed) / temperature, dim=1)
        return -(q * log_p).sum(1)

    def predictions(self, outputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (n,) int64: the class with the largest logit."""
        return mask_outputs(outputs, mask).argmax(1)

    def measures(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(n, 1) values: 1 if the label has the largest logit, 0 if not."""
        return (outputs.argmax(1) == targets).double()[:, None]

    def score(self, totals: Tensor, records: int) -> float:
        """Accuracy in percent over all records."""
        return 100.0 * float(totals[0]) / records

    def check(self, targets: Tensor) -> None:
        """Refuse targets that are not (n,) int64."""
        check_shape(
            targets,
            dtype=torch.int64,
            dims=1,
            needed="(n,), one class per record; for several, give task=MultiLabel()",
            fix="convert them with labels.long()",
        )

    def undeclared(self, targets: Tensor, classes: Sequence[int]) -> str:
        """Describe labels outside of the declared classes; "" if there are none."""
        strange = ~torch.isin(targets, targets.new_tensor(list(classes)))
        return f"labels {sorted(set(targets[strange].tolist()))}" if strange.any() else ""

    def synthetic(self, targets: Tensor, classes: Sequence[int], numbers: Tensor) -> Tensor:
        """Make targets (n,) with all declared classes in turn."""
        return targets.new_tensor(list(classes))[(numbers % len(classes)).to(targets.device)]

    def balance_groups(self, targets: Tensor) -> Tensor:
        """Return the class (n,) of each record as its group."""
        return targets

    def class_counts(self, targets: Tensor, num_classes: int) -> Tensor:
        """Return (num_classes,) number of records of each class."""
        return torch.bincount(targets, minlength=num_classes)
