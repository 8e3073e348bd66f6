"""Self test of private gradients on synthetic records, before anything is charged."""

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

    If the inputs have no declared range, the gradients of very large inputs are tested too.

    Every set of parameters that the stream trains is tested in the first experience that trains it,
    and in the first one that has earlier experiences, with stored rows among the new ones.

    Args:
        path: computation from rows to their losses.
        rows: source of synthetic batches.
        model: the module that is trained; it stays in training mode without dropout.
        own_rules: True if every layer is clipped by a rule of this library. If not, records of
            every kind are compared, and not only three random ones.
        tested: True if user code is on the path; it is then also tested with new rows only.

    Raises:
        GuardError: names the parameter whose gradients differ most, or gives the reason why
            gradients of single records cannot be computed.
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
    """Clipped gradients in one experience, to be compared with a loop of autograd.

    Args:
        path: computation of the losses that are differentiated.
        rows: source of synthetic batches.
        index: index of the experience.
        trainable: prefixes of the names of trained parameters; None for all.
        facts: (n, 4) label, id, experience and role of the synthetic records.
    """

    path: LossPath
    rows: SyntheticRows
    index: int
    trainable: tuple[str, ...] | None
    facts: Tensor

    def of(self, model: nn.Module, state: State, inputs: Tensor) -> GradientCase:
        """Build the test case for a model and a state."""
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
        """Build the test case for copies of model and state in float64."""
        wide = {name: _doubled(value) for name, value in state.items()}
        return self.of(copy.deepcopy(model).double(), state.replace(wide), _doubled(inputs))

    def _batch(self, inputs: Tensor, facts: Tensor) -> Batch:
        batch = self.rows.batch(self.index, inputs, facts)
        if inputs.dtype == torch.float64:
            batch = replace(batch, stored={n: _doubled(v) for n, v in batch.stored.items()})
        return batch


def _doubled(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value
