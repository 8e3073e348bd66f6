"""Fixtures of the tests in this folder."""

from helpers.command_line import command  # noqa: F401
from helpers.learners import learner_of  # noqa: F401
from helpers.ledger_cli import alone, either, federated, mine, perdure  # noqa: F401
