"""The contract of strategies: hyper-parameters in a frozen dataclass, values in an explicit state.

Read `Strategy` for the hooks, and `strategies/ewc.py` for a complete example.
"""

from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn

from perdure.contract.context import Context, Spec
from perdure.contract.forward import Forward, task_losses
from perdure.contract.plan import Plan, PrivacyCost
from perdure.contract.state import State
from perdure.data.records import Batch
from perdure.errors import StrategyError
from perdure.tasks import MASKED, SingleLabel, Task, refuse_other_tasks
from perdure.types import Params
from perdure.utils.checked_fields import CheckedFields

if TYPE_CHECKING:
    from perdure.contract.curator import Curator
    from perdure.data.experience import Experience

IN_PLACE = {"penalty": "add_penalty_gradient", "after_step": "after_step_in_place"}
"""Hooks that also exist in a form that writes in place.

New tensors as large as the model would take several times as long as computing with them, in each
step.
"""


@dataclass(frozen=True, kw_only=True)
class Strategy(CheckedFields):
    """Base class of strategies: methods against forgetting.

    A subclass is a frozen dataclass that overrides the hooks that it needs. Its fields are
    hyper-parameters only. Values that the method keeps are in the `State`, which `init` builds and
    which hooks get and return. Only the hooks `references` and `after_experience` use records, and
    only through the curator.

    Class attributes:
        privacy_cost: the declared privacy cost beyond the gradient (see `PrivacyCost`).
        couples_records: True if the loss of one row depends on other rows; differential privacy
            refuses such a strategy.
        not_vmappable_because: reason why the hooks cannot run under `torch.func.vmap`, as a
            sentence; None if they can.
        tasks: classes of the tasks that the hooks support; `(Task,)` for all tasks, also those that
            users define. A session refuses records of another task.
        tasks_because: reason why other tasks are not supported, as a clause.
        own_loss_because: reason why `losses` does not use the loss of the task, as a clause; ""
            if it does. A session refuses another loss then.
    """

    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost()
    couples_records: ClassVar[bool] = False
    not_vmappable_because: ClassVar[str | None] = None
    tasks: ClassVar[tuple[type[Task], ...]] = (SingleLabel,)
    tasks_because: ClassVar[str] = "it declares no other in its class attribute `tasks`"
    own_loss_because: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        """Drop the in-place form of a hook if a subclass overrides only the hook itself."""
        super().__init_subclass__()
        for hook, in_place in IN_PLACE.items():
            if not issubclass(_owner(cls, in_place), _owner(cls, hook)):
                setattr(cls, in_place, getattr(Strategy, in_place))

    @classmethod
    def example(cls) -> Self:
        """Return a small instance for checks and lists of strategies.

        Override it if a field has no default, or if checks need smaller values than the defaults.

        Returns:
            An instance with the defaults of all fields.

        Raises:
            StrategyError: if a field has no default; the message names the fields.
        """
        needed = [
            field.name
            for field in fields(cls)
            if field.init and field.default is MISSING and field.default_factory is MISSING
        ]
        if needed:
            raise StrategyError(
                f"{cls.__name__}.example() has no value for {', '.join(needed)}; allowed: fields "
                "with defaults; give them defaults, or override example() to return a small "
                "instance"
            )
        return cls()

    @property
    def name(self) -> str:
        """Name of the strategy in tables of results and in messages."""
        return type(self).__name__

    def refuse_task(self, task: Task) -> None:
        """Refuse records of a task that the strategy does not support.

        Args:
            task: task of the records.

        Raises:
            ConfigError: if the strategy does not support the task; the message has the reason.
        """
        refuse_other_tasks(task, self.tasks, f"the strategy {self.name}", self.tasks_because)

    def small_model(self, *, input_shape: tuple[int, ...], num_classes: int) -> nn.Module | None:
        """Build a small model that the strategy can train; every call builds the same one.

        Checks and lists of strategies use it. A strategy that needs more than a classifier refuses
        other models in `init`.

        Returns:
            The model, or None if the strategy can train any classifier.
        """
        return None

    def init(self, spec: Spec) -> State:
        """Create the state; called once, before the first experience."""
        return State()

    def plan(self, experience: "Experience") -> Plan:
        """Choose the pool, the memory and the trained parameters of an experience.

        The plan depends on public facts only: never on the values of records.
        """
        return Plan()

    def begin_round(self, params: Params, state: State) -> State:
        """Update the state at the start of a round, before its first step.

        A round of a federation starts with the global parameters. A learner without a federation
        has `blocks` rounds in every experience, which start with its own parameters.

        Args:
            params: copies of all parameters of the model, with which the round starts.
            state: the state before the round.
        """
        return state

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """Compute one loss per row.

        Args:
            forward: the model, from inputs (n, ...) to logits (n, C).
            batch: n rows.
            context: the classes that may be predicted, and declared sizes.
            state: the state before the step.

        Returns:
            (n,) losses. Loss i depends on row i, the parameters, the state and the context only.
        """
        return task_losses(forward, batch, context)

    def penalty(self, params: Params, state: State) -> Tensor | None:
        """Compute a scalar that is added to the mean loss; it uses no data.

        Args:
            params: all parameters of the model. The gradient is taken with respect to those that
                the experience trains.

        Returns:
            The scalar, or None for no penalty.
        """
        return None

    def add_penalty_gradient(self, gradient: Params, params: Params, state: State) -> None:
        """Add the gradient of `penalty` to `gradient`, in place.

        The default uses autograd. Override it, in addition to `penalty`, only if a formula saves
        tensors as large as the model; `perdure.contract.QuadraticPenalty` does so for quadratic
        penalties.

        Args:
            gradient: gradient of the trained parameters, by name; it is changed.
            params: all parameters of the model.
            state: state of the strategy.

        Raises:
            StrategyError: if the penalty is not one number.
        """
        penalty = self.penalty(params, state)
        if penalty is None:
            return
        if not isinstance(penalty, Tensor) or penalty.dim():
            raise StrategyError(
                f"penalty() returned {penalty!r}; allowed: a tensor with one number, or None"
            )
        trained = [params[name] for name in gradient]
        found = torch.autograd.grad(penalty, trained, allow_unused=True)
        for value, pull in zip(gradient.values(), found, strict=True):
            if pull is not None:
                value.add_(pull)

    def references(self, curator: "Curator", params: Params, state: State) -> tuple[Params, ...]:
        """Ask the curator for the reference gradients that `project` needs (A-GEM, GEM).

        Args:
            curator: curator that computes gradients over stored records.
            params: the current parameters.
            state: the state before the step.

        Returns:
            Gradients, each with one tensor per parameter in its shape.
        """
        return ()

    def project(self, gradient: Params, references: tuple[Params, ...], state: State) -> Params:
        """Change the released gradient before the optimiser's step; it uses no data.

        Args:
            gradient: the released gradient of the trained parameters.
            references: gradients that `references` returned.
            state: the state before the step.

        Returns:
            The gradient for the optimiser's step, with the names and shapes of `gradient`.
        """
        return gradient

    def after_step(
        self,
        before: Params,
        after: Params,
        gradient: Params,
        state: State,
        noise_variance: float = 0.0,
    ) -> State:
        """Update the state after a step of the optimiser.

        Args:
            before: parameters before the step.
            after: parameters after the step.
            gradient: the released gradient, before penalty and projection.
            state: the state before the step.
            noise_variance: variance of the noise in every coordinate of `gradient`; public, and 0
                without privacy.
        """
        return state

    def after_step_in_place(
        self,
        before: Params,
        after: Params,
        gradient: Params,
        state: State,
        noise_variance: float = 0.0,
    ) -> State:
        """Update the state like `after_step`, in place; the loop calls it from the second step on.

        Override it, in addition to `after_step`, only if that creates tensors as large as the
        model. It may write to the tensors of the state that `after_step` replaces in every step,
        and may keep no reference to `before`, whose memory the next step uses again.

        It must give the same bits as `after_step`, because a resumed run may call either: let
        `after_step` call it with copies, as SI does.

        Args:
            before: parameters before the step.
            after: parameters after the step.
            gradient: the released gradient, before penalty and projection.
            state: the state before the step.
            noise_variance: variance of the noise in every coordinate of `gradient`.
        """
        return self.after_step(before, after, gradient, state, noise_variance)

    def remember(self, forward: Forward, batch: Batch, state: State) -> dict[str, Tensor]:
        """Compute the tensors that memory stores with each row.

        The tensors go to the curator, never to the state. Stored rows come back with them in
        `batch.stored`. Rows that were not stored have zeros there; before anything was stored, the
        names are missing.

        Args:
            forward: the model.
            batch: n rows that are offered to memory, or drawn.
            state: the current state.

        Returns:
            Name to values (n, ...). Value i depends on row i, the parameters and the state only.
        """
        return {}

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Update the state at the end of an experience; the curator may be asked for releases.

        Args:
            curator: curator that answers queries about the records of the experience and of memory.
            params: the final parameters, in a federation the global ones.
            state: the state after the last step.
        """
        return state

    def derive(self, state: State) -> State:
        """Compute tensors of the state that follow from its other tensors, such as a solved head.

        It is called after `after_experience`, and again after the states of clients were combined.
        It uses no data, so it costs no privacy. Write only to names that are declared `local`.
        """
        return state

    def predict(self, forward: Forward, x: Tensor, context: Context, state: State) -> Tensor:
        """Compute outputs (n, ..., C), masked to the classes that may be predicted.

        Args:
            forward: the model.
            x: inputs (n, ...).
            context: the classes that may be predicted.
            state: the current state.
        """
        return torch.where(context.allowed, forward(x), MASKED)

    @classmethod
    def overrides(cls, hook: str) -> bool:
        """Return True if the class overrides `hook`.

        The loop skips hooks that are not overridden.
        """
        return getattr(cls, hook) is not getattr(Strategy, hook)

    def uses(self, hook: str) -> bool:
        """Return True if this strategy overrides `hook`; a combination asks its parts."""
        return self.overrides(hook)


def _owner(kind: type, name: str) -> type:
    """Return the first class of `kind` and its bases that defines the attribute `name`."""
    return next(base for base in kind.__mro__ if name in vars(base))
