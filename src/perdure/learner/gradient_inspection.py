"""Self test of a session's private gradients, on synthetic records and before any charge."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from perdure.contract.context import Context
from perdure.contract.forward import Forward
from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.data.records import Batch, Records
from perdure.learner.private_setup import synthetic
from perdure.planning.training_plan import TrainingPlan
from perdure.privacy.clipping.clip import Clip
from perdure.privacy.guard.gradient_checks import (
    RECORDS,
    GradientCase,
    check_bound,
    check_gradients,
)
from perdure.privacy.guard.loss_checks import quiet_training
from perdure.privacy.guard.probes import domain_of
from perdure.queries.batch_gradients import clipped_gradient
from perdure.types import Params
from perdure.utils.modules import trainable_parameters


def inspect_gradients(
    training: TrainingPlan,
    model: nn.Module,
    context: Callable[[int], Context],
    state: State,
    *,
    seed: int,
    device: str | torch.device,
    inputs: Tensor | None = None,
) -> None:
    """Compare clipped gradients with a loop of autograd, on three synthetic records.

    Where inputs have no declared range, also look at the clipped gradients of very large ones.

    Every set of parameters that the stream trains is compared in the first experience that trains
    it, and in the first one with a past.

    Args:
        training: stream, strategy and privacy.
        model: the module that is trained; it is left in training mode, dropout off.
        context: from an experience's index to its public facts.
        state: of the strategy.
        seed: of the synthetic records.
        device: where the model is.
        inputs: synthetic inputs (n, ...), at least three; None for random ones in [0, 1).

    Raises:
        GuardError: naming the parameter whose gradients differ most, or the reason why there are no
            gradients of single records.
    """
    drawn, facts = synthetic(training, records=RECORDS, seed=seed, device=device)
    inputs = drawn if inputs is None else inputs[:RECORDS].to(device)
    quiet_training(model)
    first = training.stream[0].train
    domain = domain_of(first.inputs, first.domain)
    seen = set()
    for experience in training.stream:
        plan = training.of(experience)
        kind = (plan.trainable, experience.index > 0)
        if not plan.train or kind in seen:
            continue
        seen.add(kind)
        trial = _Trial(
            strategy=training.strategy,
            context=context(experience.index),
            trainable=plan.trainable,
            labels_and_ids=facts[experience.index],
        )
        case = trial.of(model, state, inputs)
        what = f"{training.strategy.name}.losses()"
        per_layer = training.privacy is not None and training.privacy.clipping == "per-layer"
        check_gradients(
            case,
            what,
            per_layer=per_layer,
            in_double=partial(trial.in_double, model, state, inputs),
        )
        if domain.floats and domain.range is None:
            check_bound(case, what, per_layer=per_layer)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Trial:
    """One experience's gradient as it is compared.

    Args:
        strategy: whose losses are differentiated.
        context: public facts of the experience.
        trainable: beginnings of the names of trained parameters; None for all.
        labels_and_ids: (n, 2) of the synthetic records.
    """

    strategy: Strategy
    context: Context
    trainable: tuple[str, ...] | None
    labels_and_ids: Tensor

    def of(self, model: nn.Module, state: State, inputs: Tensor) -> GradientCase:
        """The case for a model and a state."""
        forward = Forward(model)
        trained: Params = {
            name: value
            for name, value in trainable_parameters(model).items()
            if self.trainable is None or name.startswith(self.trainable)
        }

        def losses(forward: Forward, batch: Batch) -> Tensor:
            return self.strategy.losses(forward, batch, self.context, state)

        def alone(inputs: Tensor, facts: Tensor) -> Tensor:
            return losses(forward, self._batch(inputs, facts))

        def clipped(inputs: Tensor, facts: Tensor, clip: Clip) -> Params | None:
            batch = self._batch(inputs, facts)
            return clipped_gradient(forward, losses, trained, batch, clip, None, by_loop=False)

        return GradientCase(
            losses=alone,
            clipped=clipped,
            params=trained,
            inputs=inputs,
            labels=self.labels_and_ids,
        )

    def in_double(self, model: nn.Module, state: State, inputs: Tensor) -> GradientCase:
        """The case for copies of model and state in float64."""
        wide = {name: _doubled(value) for name, value in state.items()}
        return self.of(copy.deepcopy(model).double(), state.replace(wide), _doubled(inputs))

    def _batch(self, inputs: Tensor, facts: Tensor) -> Batch:
        labels, ids = facts.unbind(1)
        records = Records(inputs=inputs, labels=labels, ids=ids)
        return Batch.current(records, self.context.experience)


def _doubled(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value
