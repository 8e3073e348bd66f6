"""Empirical audits of privacy: canaries, membership inference, and bounds on epsilon.

Import `audit`, which trains with canaries and computes a lower bound on epsilon, and `lira`, which
attacks a model by likelihood ratios. `perdure.experiment.audit_run` audits a whole experiment.
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
