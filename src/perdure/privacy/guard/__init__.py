"""Checks that a model, its losses and its optimiser keep one record's influence bounded.

Import `check_model` for the refusals with their reasons, and `fixes` and `fix` for the repairs.
"""

from perdure.privacy.guard.model_checks import (
    check_buffers,
    check_model,
    check_optimizer,
    fix,
    fixes,
)

__all__ = [
    "check_buffers",
    "check_model",
    "check_optimizer",
    "fix",
    "fixes",
]
