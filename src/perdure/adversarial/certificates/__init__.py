"""Certificates: radii in which no attack can change the class of a record.

    certify_by_bounds(model, inputs, labels, epsilon=0.1)         # linf, a proof
    Smoothing(predict=model, deviation=0.5).certify(inputs, generator=draws)    # l2, by votes

A certified accuracy is a lower bound on the true robustness, as the accuracy under an attack is an
upper bound.
"""

from perdure.adversarial.certificates.card import Certificate
from perdure.adversarial.certificates.interval import Interval, between
from perdure.adversarial.certificates.interval_bounds import (
    ball,
    certify_by_bounds,
    worst_logits,
)
from perdure.adversarial.certificates.smoothing import ABSTAINED, Smoothing, lower_bound

__all__ = [
    "ABSTAINED",
    "Certificate",
    "Interval",
    "Smoothing",
    "ball",
    "between",
    "certify_by_bounds",
    "lower_bound",
    "worst_logits",
]
