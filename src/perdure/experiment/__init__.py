"""Experiments on disk: configuration, runs, results, audits and tuning."""
