"""Certified accuracy with everything that is needed to read it."""

from dataclasses import asdict, dataclass
from typing import Any

from perdure.adversarial.balls import Norm


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Accuracy that no attack in a ball can lower, with its method.

    Args:
        method: method of the certificate, such as "interval bounds".
        norm: norm of the ball.
        epsilon: radius of the ball, in units of the inputs.
        records: number of records.
        clean_accuracy: percentage of records that are classified correctly without an attack.
        certified_accuracy: percentage of records that are classified correctly for every input in
            the ball; a lower bound on the true robustness.
        confidence: probability that the certificate of a record holds; 1 for a proof.
    """

    method: str
    norm: Norm
    epsilon: float
    records: int
    clean_accuracy: float
    certified_accuracy: float
    confidence: float = 1.0

    def __str__(self) -> str:
        """Return the card as one line."""
        sure = "a proof" if self.confidence == 1 else f"confidence {self.confidence:g} a record"
        return (
            f"{self.certified_accuracy:.1f} % certified, {self.clean_accuracy:.1f} % clean; "
            f"{self.method}, {self.norm} {self.epsilon:g}, {self.records} records, {sure}"
        )

    def row(self) -> dict[str, Any]:
        """Return the card as a dict for JSON."""
        return asdict(self)
