"""The path of a row to its loss: an attack, views, the model, the losses of strategy and task.

Every part of it may be the user's own. Records are independent by construction only where none
is: whatever is not this library's, or a listed module of torch's, is named by `foreign_parts`.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from perdure.adversarial.base import Attack
from perdure.contract.context import Context
from perdure.contract.curator import Losses
from perdure.contract.forward import Forward
from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.data.augmentation import Views
from perdure.data.records import Batch, filled_batch
from perdure.privacy.guard.independence import is_own, keeps_methods
from perdure.tasks import SingleLabel, Task
from perdure.utils.seeding import Seed, generator_from

STRATEGIES = ("perdure.strategies.", "perdure.contract.")
"""Packages whose strategies compute each loss from its own row; their tests hold it."""

ATTACKS = ("perdure.adversarial.",)
"""Packages whose attacks move each row by its own loss; their tests hold it."""

TASKS = ("perdure.tasks.",)
"""Packages whose tasks compute each loss from its own row; their tests hold it."""

VIEWS = ("perdure.data.augmentation",)
"""Modules whose views are of one record each; their tests hold it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LossPath:
    """All that a row meets on its way to its loss, apart from the model.

    Args:
        strategy: whose losses they are.
        adversary: attack on the rows; None for none.
        views: random versions of the rows; None for none.
        precision: of the passes through the model.
        task: meaning of the rows' targets.
    """

    strategy: Strategy
    adversary: Attack | None = None
    views: Views | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    task: Task = field(default_factory=SingleLabel)

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """(n,) the strategy's loss of every row, averaged over views where there are any."""
        strategy = self.strategy
        with self._casting(batch.inputs.device.type):
            if self.views is None:
                return strategy.losses(forward, batch, context, state).float()
            return self.views.losses(
                lambda rows: strategy.losses(forward, rows, context, state), batch
            ).float()

    def _casting(self, device: str) -> AbstractContextManager[object]:
        """Run the passes in `precision`, also where the caller's program casts by itself."""
        low = self.precision == "bfloat16"
        if not low and not torch.is_autocast_enabled(device):
            return nullcontext()  # entering costs a tenth of a small step
        return torch.autocast(device, torch.bfloat16, enabled=low)

    def perturbed(
        self,
        losses: Losses,
        model: nn.Module,
        params: Mapping[str, Tensor],
        batch: Batch,
        generator: torch.Generator,
    ) -> Batch:
        """Return each record's own worst case at the present parameters.

        The attack runs on an unhooked copy of the model.

        Args:
            losses: (forward, batch) to one loss per row.
            model: under attack.
            params: its parameters.
            batch: rows.
            generator: of the attack's own draws.
        """
        assert self.adversary is not None
        fixed = Forward(model, {name: value.detach() for name, value in params.items()})

        def of_inputs(inputs: Tensor) -> Tensor:
            return losses(fixed, replace(batch, inputs=inputs))

        inputs = self.adversary.perturb(of_inputs, batch.inputs, generator=generator)
        return replace(batch, inputs=inputs)

    def changed(
        self,
        batch: Batch,
        losses: Losses,
        model: nn.Module,
        params: Mapping[str, Tensor],
        *,
        seed_of: Callable[[str], Seed],
        watched: Callable[[], AbstractContextManager[None]],
        private: bool,
    ) -> Batch:
        """Return the rows of a step under attack, with their views.

        Neither is ever shown an empty batch, nor, under privacy, one of fewer rows than
        `FEWEST_ROWS`: their code may fail without rows, and an error would tell that no record was
        drawn.

        Args:
            batch: rows of the step.
            losses: that an attack raises.
            model: under attack.
            params: its parameters.
            seed_of: from the purpose of draws to their seed.
            watched: opens a private pass.
            private: fill small batches up.
        """
        if not len(batch) or (self.adversary is None and self.views is None):
            return batch
        rows = filled_batch(batch) if private else batch
        if self.adversary is not None:
            draws = generator_from(seed_of("adversary"))
            with watched():
                rows = self.perturbed(losses, model, params, rows, draws)
        rows = self.with_views(rows, seed_of("views"))
        return rows if len(rows) == len(batch) else rows.take(slice(0, len(batch)))

    def with_views(self, batch: Batch, seed: Seed) -> Batch:
        """Return the rows with their views beside them, where there are any."""
        return self.views.attach(batch, seed) if self.views else batch

    @property
    def foreign_changes(self) -> str:
        """Name of the attack or the views, where they are not this library's; "" where they are."""
        if self.adversary is not None and not is_own_attack(self.adversary):
            return f"the attack {type(self.adversary).__name__}"
        if self.views is not None and not is_own_view(self.views):
            kind = type(self.views)
            return "the views" if kind is Views else f"the views {kind.__name__}"
        return ""

    def foreign_parts(self) -> tuple[str, ...]:
        """Names of the parts that are not this library's."""
        own = is_own_strategy(self.strategy)
        strategy = () if own else (f"{self.strategy.name}.losses()",)
        task = () if is_own_task(self.task) else (f"the task {type(self.task).__name__}",)
        changes = (self.foreign_changes,) if self.foreign_changes else ()
        return (*strategy, *task, *changes)


def is_own_strategy(strategy: Strategy) -> bool:
    """Return whether all losses belong to strategies of this library."""
    parts = getattr(strategy, "parts", ())
    own = is_own(type(strategy), STRATEGIES) and keeps_methods(strategy, "losses")
    return own and all(map(is_own_strategy, parts))


def is_own_task(task: Task) -> bool:
    """Return whether a task is one of this library's, as it stands there."""
    return is_own(type(task), TASKS) and keeps_methods(task, "losses", "distillation")


def is_own_attack(adversary: Attack) -> bool:
    """Return whether an attack is one of this library's, as it stands there."""
    return is_own(type(adversary), ATTACKS) and keeps_methods(adversary, "perturb")


def is_own_view(views: Views) -> bool:
    """Return whether views are made by this library alone."""
    own = is_own(type(views), VIEWS) and keeps_methods(views, "attach", "losses")
    change = views.change
    return own and is_own(type(change), VIEWS) and keeps_methods(change, "__call__")
