"""Rule: inputs lie outside their declared domain, or the model cannot read all declared tokens."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class InputDomain(Rule):
    """Find inputs outside their declared domain, and embeddings that are too small for it.

    Symptom: the share of records with a value outside is above `share`, or the first embedding has
    fewer rows than the declared vocabulary.

    Remedy: declare the domain that the data have, or give the model the declared vocabulary.

    Source: own rule: under privacy the guard tests the declared domain only, and such a record is
    not covered; without privacy an unknown token ends the training.

    Args:
        share: share of records above which there is a finding.
    """

    name: ClassVar[str] = "input domain"
    cause: ClassVar[Cause] = "data"
    source: ClassVar[str] = "own rule: a declared domain holds for every record"

    share: float = 0.0

    def examine(self, case: Case) -> Finding | None:
        """Compare the sample and the model's embedding with the declared domain."""
        declared = case.stream[0].train.domain
        if declared is None:
            return None
        return self._of_model(case) or self._of_sample(case)

    def _of_model(self, case: Case) -> Finding | None:
        tokens = case.domain.vocabulary
        tables = [m for m in case.model.modules() if isinstance(m, nn.Embedding)]
        if tokens is None or not tables or tables[0].num_embeddings >= tokens:
            return None
        return self.finding(
            f"the model embeds {tables[0].num_embeddings} tokens; {tokens} are declared",
            measured=tables[0].num_embeddings,
            threshold=tokens,
            remedy=Remedy(advice=f"vocabulary={tokens}", changes={"model.vocabulary": tokens}),
        )

    def _of_sample(self, case: Case) -> Finding | None:
        if case.sample is None:
            return None
        outside = case.domain.outside(case.sample.inputs)
        share = float(outside.double().mean())
        if share <= self.share:
            return None
        return self.finding(
            f"{share:.1%} of {case.origin} have a value outside the declared domain",
            measured=share,
            threshold=self.share,
            remedy=Remedy(
                advice="declare the domain of these data: Records(domain=InputDomain(...))"
            ),
        )
