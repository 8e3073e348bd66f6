"""Trial step of an optimiser, on a copy."""

import copy

import torch
from torch.optim import Optimizer


def stepped_copy(optimizer: Optimizer) -> Optimizer:
    """Return a copy of an optimiser after one step with gradients of 0; the optimiser stays.

    `copy.deepcopy` of an optimiser leaves out attributes that a class of another package adds.
    """
    trial: Optimizer = object.__new__(type(optimizer))
    # a schedule replaces `step` by a function that is bound to the optimiser itself
    own = {name: value for name, value in vars(optimizer).items() if name != "step"}
    trial.__dict__.update(copy.deepcopy(own))
    for group in trial.param_groups:
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    trial.step()
    return trial
