"""Empirical audits of privacy: canaries, membership inference and their bounds."""
