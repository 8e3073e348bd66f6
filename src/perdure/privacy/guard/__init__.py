"""Checks that a model, its losses and its optimiser keep one record's influence bounded.

Import `check_model` for the refusals with their reasons, `fixes` and `fix` for the repairs, and
`check_gradients` to compare clipped gradients with a loop of autograd, `check_bound` for those of
very large inputs; `independence` for what is known by construction.
"""

from perdure.privacy.guard.gradient_checks import GradientCase, check_bound, check_gradients
from perdure.privacy.guard.independence import Independence, independence, unlisted
from perdure.privacy.guard.model_checks import (
    check_buffers,
    check_model,
    check_optimizer,
    fix,
    fixes,
)

__all__ = [
    "GradientCase",
    "Independence",
    "check_bound",
    "check_buffers",
    "check_gradients",
    "check_model",
    "check_optimizer",
    "fix",
    "fixes",
    "independence",
    "unlisted",
]
