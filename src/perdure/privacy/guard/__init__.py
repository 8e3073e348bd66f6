"""Checks that a model, its losses and its optimiser keep one record's influence bounded.

Import `check_model` to refuse a model with reason and fix, and `fixes` and `fix` to repair it.
`check_gradients` compares clipped gradients with a loop of autograd over single records, and
`check_bound` tests them with very large inputs. `independence` says if records are independent by
construction or only tested.
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
