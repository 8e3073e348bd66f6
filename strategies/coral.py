"""CORAL: align the covariance of the features with that of unlabelled records of another domain.

Sun and Saenko, Deep CORAL: Correlation Alignment for Deep Domain Adaptation, ECCV workshops 2016,
section 3.1 and equations 1 to 4.

    loss_i = CE(x_i, y_i) + strength * CORAL
    CORAL  = |C_S - C_T|_F^2 / (4 d^2)
    C      = covariance (d, d) of the features, of the batch (S) and of the target (T)

The features are the input of the head; the paper aligns the outputs of its last layer. The target
is public, and has no labels. Every step passes all its rows through the model, so a few hundred are
enough. It is no method against forgetting by itself: combine it with one that has no loss of its
own, as Combine(Coral(...), EWC(...)).

State: `target`, the unlabelled inputs (kept by each client). Memory cost: the target. Privacy cost:
not possible: the covariance of a batch couples its records, so no clip bounds one record's share.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from perdure.contract import Context, Forward, Spec, State, Strategy, task_losses
from perdure.data import Batch
from perdure.errors import ConfigError, StrategyError
from perdure.tasks import Task

TENSOR = "inputs"
"""Name of the tensor in the file of the target."""


@dataclass(frozen=True, kw_only=True)
class Coral(Strategy):
    """Adapt to another domain by the covariance of the features of its unlabelled records.

    Args:
        target: safetensors file with the public tensor "inputs" (n, ...), at least 2 rows in the
            shape of the stream's inputs; None for no alignment.
        strength: weight of the distance of the covariances (lambda).
    """

    target: str | None = None
    strength: float = 1.0
    couples_records: ClassVar[bool] = True
    tasks: ClassVar[tuple[type[Task], ...]] = (Task,)

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ConfigError.of("coral.strength", self.strength, "a finite number, 0 or more")

    def init(self, spec: Spec) -> State:
        """Create the state with the inputs of the target.

        Raises:
            ConfigError: if the file does not have the inputs.
            StrategyError: if the model has no features.
        """
        spec.require_features()
        if self.target is None:
            return State()
        device = next(iter(spec.params.values())).device
        return State().declare("target", _inputs(Path(self.target)).to(device), "local")

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """(n,) cross entropy plus the weighted distance of the covariances, equal for all rows.

        Raises:
            StrategyError: if the target has another shape than the rows.
        """
        if "target" not in state:
            return task_losses(forward, batch, context)
        target = state["target"]
        if target.shape[1:] != batch.inputs.shape[1:]:
            raise StrategyError(
                f"the target of Coral has rows of {tuple(target.shape[1:])}; allowed: "
                f"{tuple(batch.inputs.shape[1:])}, as in the stream; convert the target"
            )
        logits, features = forward.with_features(batch.inputs)
        everyone = torch.ones(len(target), dtype=torch.bool, device=target.device)
        distance = covariance_distance(
            features.flatten(1), batch.valid, forward.features(target).flatten(1), everyone
        )
        return context.losses(logits, batch) + self.strength * distance


def covariance_distance(one: Tensor, valid: Tensor, other: Tensor, used: Tensor) -> Tensor:
    """Return the squared distance of two covariances over 4 d^2, a scalar.

    Args:
        one: (n, d) features.
        valid: (n,) bool, rows of `one` that count.
        other: (m, d) features.
        used: (m,) bool, rows of `other` that count.
    """
    gap = _covariance(one.float(), valid) - _covariance(other.float(), used)
    return gap.square().sum() / (4 * one.shape[1] ** 2)


def _covariance(rows: Tensor, valid: Tensor) -> Tensor:
    """Return the covariance (d, d) of the valid rows (n, d); 0 for fewer than two."""
    weight = valid.to(rows)[:, None]
    count = weight.sum()
    centred = (rows - (weight * rows).sum(0) / count.clamp(min=1)) * weight
    return centred.T @ centred / (count - 1).clamp(min=1)


def _inputs(path: Path) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    allowed = f'a safetensors file with the tensor "{TENSOR}" (n, ...), at least 2 rows'
    try:
        found = load_file(path)[TENSOR]
    except (OSError, SafetensorError, KeyError) as error:
        raise ConfigError(
            f"coral.target = {str(path)!r} cannot be used: {error}; allowed: {allowed}"
        ) from error
    if found.dim() < 2 or len(found) < 2:
        raise ConfigError.of("coral.target", f"inputs of shape {tuple(found.shape)}", allowed)
    return found
