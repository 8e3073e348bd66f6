"""Self test of a session's private gradients, on synthetic records and before any charge."""

import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from perdure.contract.forward import Forward
from perdure.contract.state import State
from perdure.data.records import Batch
from perdure.learner.loss_path import LossPath
from perdure.learner.synthetic_rows import Roles, SyntheticRows
from perdure.privacy.clipping.clip import Clip
from perdure.privacy.guard.gradient_checks import (
    RECORDS,
    GradientCase,
    check_bound,
    check_gradients,
)
from perdure.privacy.guard.loss_checks import quiet_training
from perdure.privacy.guard.probes import domain_of, kept_rows
from perdure.queries.batch_gradients import clipped_gradient
from perdure.types import Params
from perdure.utils.modules import trainable_parameters
from perdure.utils.seeding import generator


def inspect_gradients(
    path: LossPath,
    rows: SyntheticRows,
    model: nn.Module,
    *,
    own_rules: bool = True,
    tested: bool = True,
) -> None:
    """Compare clipped gradients with a loop of autograd, on synthetic records.

    Where inputs have no declared range, also look at the clipped gradients of very large ones.

    Every set of parameters that the stream trains is compared in the first experience that trains
    it, and in the first one with a past, there with stored rows among the new ones.

    Args:
        path: of rows to their losses.
        rows: makes the synthetic batches.
        model: the module that is trained; it is left in training mode, dropout off.
        own_rules: every layer is clipped by this library's rules. Otherwise records of every kind
            are compared, and not three random ones only.
        tested: code of others is on the path; it is shown new rows alone too.

    Raises:
        GuardError: naming the parameter whose gradients differ most, or the reason why there are no
            gradients of single records.
    """
    training = rows.training
    quiet_training(model)
    seen = set()
    for experience in training.stream:
        plan = training.of(experience)
        kind = (plan.trainable, experience.index > 0)
        if not plan.train or kind in seen:
            continue
        seen.add(kind)
        records = experience.train
        domain = domain_of(records.inputs, records.domain)
        draws = generator(rows.seed, "guard")
        inputs = domain.random(RECORDS, draws) if own_rules else kept_rows(domain, draws)
        roles: tuple[Roles, ...] = ("new",)
        if rows.mixes(experience.index):
            roles = ("in turn", "new") if tested else ("in turn",)
        for role in roles:
            trial = _Trial(
                path=path,
                rows=rows,
                index=experience.index,
                trainable=plan.trainable,
                facts=rows.facts(experience.index, len(inputs), role),
            )
            case = trial.of(model, rows.state, inputs.to(rows.device))
            in_double = partial(trial.in_double, model, rows.state, inputs.to(rows.device))
            what = f"{training.strategy.name}.losses()"
            per_layer = training.privacy is not None and training.privacy.clipping == "per-layer"
            check_gradients(case, what, per_layer=per_layer, in_double=in_double)
            if domain.floats and domain.range is None:
                check_bound(case, what, per_layer=per_layer)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Trial:
    """One experience's gradient as it is compared.

    Args:
        path: whose losses are differentiated.
        rows: makes the batches.
        index: of the experience.
        trainable: beginnings of the names of trained parameters; None for all.
        facts: (n, 4) of the synthetic records.
    """

    path: LossPath
    rows: SyntheticRows
    index: int
    trainable: tuple[str, ...] | None
    facts: Tensor

    def of(self, model: nn.Module, state: State, inputs: Tensor) -> GradientCase:
        """The case for a model and a state."""
        forward = Forward(model)
        context = self.rows.context_of(self.index)
        strategy = self.path.strategy
        trained: Params = {
            name: value
            for name, value in trainable_parameters(model).items()
            if self.trainable is None or name.startswith(self.trainable)
        }

        def losses(forward: Forward, batch: Batch) -> Tensor:
            return strategy.losses(forward, batch, context, state)

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
            labels=self.facts,
        )

    def in_double(self, model: nn.Module, state: State, inputs: Tensor) -> GradientCase:
        """The case for copies of model and state in float64."""
        wide = {name: _doubled(value) for name, value in state.items()}
        return self.of(copy.deepcopy(model).double(), state.replace(wide), _doubled(inputs))

    def _batch(self, inputs: Tensor, facts: Tensor) -> Batch:
        batch = self.rows.batch(self.index, inputs, facts)
        if inputs.dtype == torch.float64:
            batch = replace(batch, stored={n: _doubled(v) for n, v in batch.stored.items()})
        return batch


def _doubled(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value
