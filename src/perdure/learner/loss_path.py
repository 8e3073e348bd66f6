"""Computation from a row to its loss: an attack, views, the model, and the losses.

The losses are those of strategy and task.

Each part may be user code. Independence of records holds by construction only if no part is user
code: `foreign_parts` names every part that is neither from this library nor a torch module that is
known to treat records independently.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from perdure.adversarial.base import Attack
from perdure.adversarial.defences.base import PROGRESS, Defence
from perdure.contract.context import Context
from perdure.contract.curator import Losses
from perdure.contract.forward import Forward
from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.data.augmentation import Views
from perdure.data.mixing import Mixing
from perdure.data.records import Batch, filled_batch
from perdure.privacy.guard.independence import is_own, keeps_methods
from perdure.tasks import SingleLabel, Task
from perdure.tasks.losses import Loss
from perdure.utils.modules import evaluating_with_gradients
from perdure.utils.seeding import Seed, generator_from

STRATEGIES = ("perdure.strategies.", "perdure.contract.")
"""Packages whose strategies compute each loss from its own row, as tests check."""

ATTACKS = ("perdure.adversarial.",)
"""Packages whose attacks change each row by its own loss, as tests check."""

TASKS = ("perdure.tasks.",)
"""Packages whose tasks compute each loss from its own row, as tests check."""

VIEWS = ("perdure.data.augmentation",)
"""Modules whose views use one record each, as tests check."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LossPath:
    """All code between a row and its loss, except the model.

    Args:
        strategy: strategy that computes the losses.
        adversary: attack on the rows; None for none.
        views: random versions of the rows; None for none.
        mixing: mixed pairs of the rows, without privacy only; None for none.
        defence: losses of rows and their perturbed versions; None for those of perturbed rows.
        precision: precision of the passes through the model.
        task: meaning of the rows' targets.
    """

    strategy: Strategy
    adversary: Attack | None = None
    views: Views | None = None
    mixing: Mixing | None = None
    defence: Defence | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    task: Task = field(default_factory=SingleLabel)

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """Return (n,) loss of the strategy for every row, times the weight of its record.

        The loss is averaged over the views if there are any.
        """
        strategy = self.strategy

        def undefended(rows: Batch) -> Tensor:
            return strategy.losses(forward, rows, context, state)

        def of_rows(rows: Batch) -> Tensor:
            # only the rows of a step have been prepared; a release asks for plain losses
            if self.defence is None or PROGRESS not in rows.stored:
                return undefended(rows)
            return self.defence.losses(undefended, forward, rows, context)

        def weighted(rows: Batch) -> Tensor:
            losses = self.views.losses(of_rows, rows) if self.views else of_rows(rows)
            return losses if rows.weights is None else losses * rows.weights

        with self._casting(batch.inputs.device.type):
            mixing = self.mixing
            return (mixing.losses(weighted, batch) if mixing else weighted(batch)).float()

    def _casting(self, device: str) -> AbstractContextManager[object]:
        """Run the passes in `precision`, also if the caller's program has switched on autocast."""
        low = self.precision == "bfloat16"
        if not low and not torch.is_autocast_enabled(device):
            return nullcontext()  # entering autocast takes a tenth of a small step
        return torch.autocast(device, torch.bfloat16, enabled=low)

    def perturbed(
        self,
        losses: Losses,
        model: nn.Module,
        params: Mapping[str, Tensor],
        batch: Batch,
        generator: torch.Generator,
        *,
        context: Context,
        progress: float = 0.0,
    ) -> Batch:
        """Return the rows after the attack, each changed to raise its own loss.

        With a defence, the rows are as before, and have the changed inputs beside them.

        The attack runs without hooks, and in evaluation mode: it moves no running statistics, and
        the change of a row does not depend on the other rows of its batch.

        Args:
            losses: function from (forward, batch) to one loss per row.
            model: model that is attacked.
            params: parameters of the model.
            batch: rows to attack.
            generator: random generator of the attack.
            context: public facts of the experience.
            progress: share of the steps of the experience that are done.
        """
        assert self.adversary is not None
        fixed = Forward(model, {name: value.detach() for name, value in params.items()})

        def of_rows(rows: Batch) -> Tensor:
            return losses(fixed, rows)

        def of_inputs(inputs: Tensor) -> Tensor:
            return of_rows(replace(batch, inputs=inputs))

        with evaluating_with_gradients(model):
            raised = (
                self.defence.objective(of_rows, fixed, batch, context)
                if self.defence
                else of_inputs
            )
            inputs = self.adversary.perturb(raised, batch.inputs, generator=generator)
        if self.defence:
            return self.defence.attach(batch, inputs, progress)
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
        context: Context,
        progress: float = 0.0,
    ) -> Batch:
        """Return the rows of a step after the attack, with their views, mixed in pairs.

        Attack and views never see an empty batch, nor, under privacy, one with fewer rows than
        `FEWEST_ROWS`: their code may fail without rows, and an error would reveal that no record
        was drawn.

        Args:
            batch: rows of the step.
            losses: losses that the attack raises.
            model: model that is attacked.
            params: parameters of the model.
            seed_of: function from a purpose to the seed of its random numbers.
            watched: context manager around a private pass.
            private: True to fill small batches with blank rows.
            context: public facts of the experience.
            progress: share of the steps of the experience that are done.
        """
        if not len(batch) or not (self.adversary or self.views or self.mixing or self.defence):
            return batch
        rows = filled_batch(batch) if private else batch
        if self.adversary is not None:
            draws = generator_from(seed_of("adversary"))
            with watched():
                rows = self.perturbed(
                    losses, model, params, rows, draws, context=context, progress=progress
                )
        elif self.defence is not None:
            rows = self.defence.attach(rows, None, progress)
        rows = self.with_views(rows, seed_of("views"))
        if self.mixing:
            seed = seed_of("mixing")
            assert isinstance(seed, int)  # a private run has none
            rows = self.mixing.attach(rows, seed)
        return rows if len(rows) == len(batch) else rows.take(slice(0, len(batch)))

    def with_views(self, batch: Batch, seed: Seed) -> Batch:
        """Return the rows together with their views; without views, the rows alone."""
        return self.views.attach(batch, seed) if self.views else batch

    @property
    def foreign_changes(self) -> str:
        """Name of the attack, defence or views if they are user code; "" if they are not."""
        if self.adversary is not None and not is_own_attack(self.adversary):
            return f"the attack {type(self.adversary).__name__}"
        if self.defence is not None and not is_own_defence(self.defence):
            return f"the defence {type(self.defence).__name__}"
        if self.views is not None and not is_own_view(self.views):
            kind = type(self.views)
            return "the views" if kind is Views else f"the views {kind.__name__}"
        return ""

    def foreign_parts(self) -> tuple[str, ...]:
        """Names of the parts that are user code."""
        own = is_own_strategy(self.strategy)
        strategy = () if own else (f"{self.strategy.name}.losses()",)
        task = () if is_own_task(self.task) else (_name_of_foreign(self.task),)
        changes = (self.foreign_changes,) if self.foreign_changes else ()
        return (*strategy, *task, *changes)


def _name_of_foreign(task: Task) -> str:
    if task.loss is not None and not is_own_loss(task.loss):
        return f"the loss {type(task.loss).__name__}"
    return f"the task {type(task).__name__}"


def is_own_strategy(strategy: Strategy) -> bool:
    """Return True if all losses are computed by strategies of this library."""
    parts = getattr(strategy, "parts", ())
    own = is_own(type(strategy), STRATEGIES) and keeps_methods(strategy, "losses")
    return own and all(map(is_own_strategy, parts))


def is_own_task(task: Task) -> bool:
    """Return True if a task is one of this library's, with unchanged methods."""
    own = is_own(type(task), TASKS) and keeps_methods(task, "losses", "distillation")
    return own and (task.loss is None or is_own_loss(task.loss))


def is_own_loss(loss: Loss) -> bool:
    """Return True if a loss is one of this library's, with unchanged methods."""
    return is_own(type(loss), TASKS) and keeps_methods(loss, "losses", "label_losses")


def is_own_attack(adversary: Attack) -> bool:
    """Return True if an attack is one of this library's, with unchanged methods."""
    return is_own(type(adversary), ATTACKS) and keeps_methods(adversary, "perturb")


def is_own_defence(defence: Defence) -> bool:
    """Return True if a defence is one of this library's, with unchanged methods."""
    return is_own(type(defence), ATTACKS) and keeps_methods(
        defence, "losses", "objective", "attach"
    )


def is_own_view(views: Views) -> bool:
    """Return True if the code that makes the views is this library's, with unchanged methods."""
    own = is_own(type(views), VIEWS) and keeps_methods(views, "attach", "losses")
    change = views.change
    return own and is_own(type(change), VIEWS) and keeps_methods(change, "__call__")
