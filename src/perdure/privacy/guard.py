"""Refuse what breaks the bound on one record's influence, naming the part, the reason and the fix.

The guard walks every module and buffer of a model and runs a drop-one-record test of the loss on synthetic records.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from perdure.errors import GuardError

Losses = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, inputs (n, ...), labels (n,)) -> (n,) one loss per record."""

TOLERANCE = 1e-4
"""Relative change of a record's loss that rounding in another batch shape may explain."""

_BATCH_STATISTICS = (nn.modules.batchnorm._BatchNorm,)
_INSTANCE_STATISTICS = (nn.modules.instancenorm._InstanceNorm,)


def check_model(model: nn.Module) -> None:
    """Walk all modules and buffers.

    Raises:
        GuardError: for BatchNorm in any form (also frozen, affine-free or in evaluation mode: its running statistics
            move without noise), InstanceNorm with running statistics, and buffers that a forward pass changes.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, _INSTANCE_STATISTICS):
            if module.track_running_stats:
                raise GuardError(
                    f"{name or 'model'} is {kind} with running statistics, which record private inputs without noise; "
                    "set track_running_stats=False"
                )
        elif isinstance(module, _BATCH_STATISTICS):
            raise GuardError(
                f"{name or 'model'} is {kind}: it mixes the records of a batch, so no record's influence is bounded; "
                f"replace it by torch.nn.GroupNorm({math.gcd(32, module.num_features)}, {module.num_features})"
            )


def check_buffers(model: nn.Module, inputs: Tensor) -> None:
    """Run synthetic inputs through a copy of the model in training mode and refuse buffers that change.

    Raises:
        GuardError: naming the buffer.
    """
    before, trial = dict(model.named_buffers()), copy.deepcopy(model).train()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        trial(inputs)
    for name, value in trial.named_buffers():
        if name not in before or not torch.equal(before[name], value):
            raise GuardError(
                f"buffer {name} of the model changes in a forward pass: it records private inputs without noise; "
                "remove it, or compute it from public data and freeze it"
            )


def quiet_training(model: nn.Module) -> None:
    """Put the model into training mode with dropout off, so that what mixes records only while training shows."""
    for module in model.train().modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()


def check_losses(losses: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, labels: Tensor, what: str) -> None:
    """Drop-one-record test: each record's loss must be the same alone, in the batch, and among fewer neighbours.

    Args:
        losses: (inputs, labels) -> (n,). inputs, labels: synthetic records. what: name for the message.

    Raises:
        GuardError: when the loss couples records or gives no loss per record.
    """
    n = len(inputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = losses(inputs, labels).detach()
        if whole.shape != (n,):
            raise GuardError(
                f"{what} gives shape {tuple(whole.shape)} for {n} records; return one loss per record, "
                "with reduction='none'"
            )
        torch.manual_seed(0)
        fewer = losses(inputs[:-1], labels[:-1]).detach()
        alone = torch.cat([losses(inputs[i : i + 1], labels[i : i + 1]).detach() for i in range(n)])
    scale = whole.abs().clamp(min=1.0)
    moved = torch.maximum(((whole - alone) / scale).abs(), ((whole[:-1] - fewer) / scale[:-1]).abs().max())
    if not bool((moved < TOLERANCE).all()):
        raise GuardError(
            f"{what} couples records: dropping one record moved the loss of another by {float(moved.max()):.2g} of its "
            "value; compute each row from that row only (no batch means, class-weighted means, in-batch negatives; no "
            "chance but torch.nn.Dropout)"
        )
