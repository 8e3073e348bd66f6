"""Empirical audits of privacy: canaries, membership inference, and bounds on epsilon.

Import `audit`, which trains with canaries and bounds epsilon from below, and `lira`, which attacks
a model by the likelihood ratio. Both return a result with its confidence. An audit of a whole
experiment is `perdure.experiment.audit_run`.
"""

from perdure.auditing.bounds import (
    Method,
    epsilon_of,
    log_likelihood_ratio,
    one_run_epsilon,
    one_run_f_dp_epsilon,
)
from perdure.auditing.canaries import AuditResult, audit, with_canaries
from perdure.auditing.membership import MembershipResult, lira

__all__ = [
    "AuditResult",
    "MembershipResult",
    "Method",
    "audit",
    "epsilon_of",
    "lira",
    "log_likelihood_ratio",
    "one_run_epsilon",
    "one_run_f_dp_epsilon",
    "with_canaries",
]
