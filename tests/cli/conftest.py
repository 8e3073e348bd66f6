"""Fixtures of this folder's tests."""

from helpers.ledger_cli import alone, either, federated, mine, perdure  # noqa: F401
