"""Next-token prediction: one sequence per record; each token is predicted from those before it.

    loss_i = sum over the positions t of -log softmax(outputs_it)[y_it]
    metric = bits per token: total loss / (tokens * log 2)

Inputs are (n, L) int64 tokens, and targets are (n, L) int64: the token that follows each position,
or `padding` after the end. Outputs are (n, L, C) logits over the C tokens of the vocabulary. A
record is a sequence: its loss is the sum over its tokens, and under privacy one sequence is one
clipped row. Bits per token are bits per character if tokens are characters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.tasks.base import EXTREME, Metric, Task, check_shape, fitted, mask_outputs


@dataclass(frozen=True, kw_only=True)
class NextToken(Task):
    """Task of language models: cross entropy summed over a sequence, and bits per token.

    Args:
        padding: target of positions that are ignored.
    """

    padding: int = -100
    name: ClassVar[str] = "next-token"
    metric: ClassVar[Metric] = Metric(name="bits per token", unit="bits", higher_is_better=False)

    def losses(self, outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (n,) cross entropy, or the chosen loss, summed over the tokens of a sequence."""
        logits = mask_outputs(outputs, mask)
        if self.loss is None:
            return self._entropies(logits, targets).sum(1)
        allowed = mask
        if mask is not None and mask.dim() > 1:
            allowed = fitted(mask, outputs).expand(outputs.shape).flatten(0, 1)
        ignored = targets == self.padding
        tokens = torch.where(ignored, 0, targets).flatten()
        each = self.loss.losses(logits.flatten(0, 1), tokens, allowed)
        return torch.where(ignored, 0.0, each.view(targets.shape)).sum(1)

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
        """Return (n,) cross entropy with the teacher's probabilities, summed over the tokens."""
        q = torch.softmax(mask_outputs(teacher, known) / temperature, dim=2)
        log_p = torch.log_softmax(mask_outputs(outputs, allowed) / temperature, dim=2)
        return torch.where(targets == self.padding, 0.0, -(q * log_p).sum(2)).sum(1)

    def predictions(self, outputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (n, L) int64: the most probable token after each position."""
        return mask_outputs(outputs, mask).argmax(2)

    def measures(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return (n, 2) loss and number of tokens of each sequence."""
        tokens = (targets != self.padding).sum(1)
        return torch.stack([self._entropies(outputs, targets).double().sum(1), tokens], dim=1)

    def score(self, totals: Tensor, records: int) -> float:
        """Bits per token; NaN if all targets are padding."""
        loss, tokens = totals.tolist()
        return float(loss / (tokens * math.log(2))) if tokens else math.nan

    def check(self, targets: Tensor) -> None:
        """Refuse targets that are not (n, L) int64."""
        check_shape(
            targets,
            dtype=torch.int64,
            dims=2,
            needed="(n, L), the token that follows each of the L positions",
            fix="convert them with labels.long()",
        )

    def undeclared(self, targets: Tensor, classes: Sequence[int]) -> str:
        """Describe tokens outside of the declared vocabulary; "" if there are none."""
        strange = ~torch.isin(targets, targets.new_tensor([*classes, self.padding]))
        return f"tokens {sorted(set(targets[strange].tolist()))}" if strange.any() else ""

    def synthetic(self, targets: Tensor, classes: Sequence[int], numbers: Tensor) -> Tensor:
        """Make sequences of declared tokens, which take turns.

        Every third sequence ends with padding. The first token is never padding, so that every
        sequence has a loss. For numbers of at least `EXTREME`, a sequence has a single token
        repeated, or only padding after the first, in turn.
        """
        length = targets.shape[1]
        position = torch.arange(length)
        number = numbers.cpu()[:, None]
        made = torch.tensor(classes)[(number + position) % len(classes)]
        padded = (number % 3 == 2) & (position > length // 2)
        padded = torch.where(number < EXTREME, padded, position >= number % 2)
        return torch.where(padded, self.padding, made).to(targets)

    def class_counts(self, targets: Tensor, num_classes: int) -> Tensor:
        """Return (num_classes,) number of tokens of each kind, without padding."""
        return torch.bincount(targets[targets != self.padding], minlength=num_classes)

    def output_shape(self, targets: Tensor, width: int) -> tuple[int, ...]:
        """Shape (n, L, C) of the outputs for targets (n, L)."""
        return (*targets.shape, width)

    def _entropies(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return (n, L) cross entropy of each token, and 0 for padding."""
        each = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=self.padding, reduction="none"
        )
        return each.view(targets.shape)
