"""Rule: a model of sequences reads the padding at their ends."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule

ROWS = 256
"""Most records that are read."""
MORE = 4
"""Tokens of padding that are added to sequences, to see if the outputs change."""


@dataclass(frozen=True, kw_only=True)
class ReadPadding(Rule):
    """Find sequences of tokens that end in much padding, which the model does not skip.

    Symptom: nearly all sequences end in the same token, its runs at the ends are more than `share`
    of all tokens, and outputs change if more of it is added.

    Remedy: tell the model the token: `model.padding`.

    Source: own measurement on digits as sequences: an LSTM that reads 32 tokens of padding after 16
    tokens of data loses most of its accuracy.

    Args:
        share: share of the tokens above which there is a finding.
    """

    name: ClassVar[str] = "read padding"
    cause: ClassVar[Cause] = "data"
    source: ClassVar[str] = "own measurement"

    share: float = 0.25

    def examine(self, case: Case) -> Finding | None:
        """Look for padding, and add more of it."""
        if case.domain.floats or len(case.stream.input_shape) != 1 or case.sample is None:
            return None
        rows = case.some_inputs(ROWS).long()
        token = int(rows[:, -1].mode().values)
        padding = rows.flip(1).eq(token).cumprod(1)
        share = float(padding.float().mean())
        if float(padding[:, 0].float().mean()) < 0.9 or share <= self.share:
            return None
        if not _reads(case, rows, token):
            return None
        return self.finding(
            f"{share:.0%} of the tokens are {token} at the end of a sequence, and the model reads "
            "them",
            measured=share,
            threshold=self.share,
            remedy=Remedy(advice=f"model.padding = {token}", changes={"model.padding": token}),
            series=padding.sum(1).sort(descending=True).values[:50].tolist(),
            series_name="tokens of padding in a sequence, longest first",
        )


def _reads(case: Case, rows: Tensor, token: int) -> bool:
    """Return True if more padding changes the outputs of a sequence."""
    more = torch.full((len(rows), MORE), token)
    try:
        before, after = (case.outputs(each) for each in (rows, torch.cat([rows, more], 1)))
    except (RuntimeError, ValueError, IndexError):
        return False  # a model of sequences of one length
    return before.shape == after.shape and not torch.allclose(before, after, atol=1e-5)
