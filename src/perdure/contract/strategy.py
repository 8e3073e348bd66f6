"""The strategy contract: hyper-parameters in a frozen dataclass, memory in an explicit state.

Read `Strategy` for the hooks, `strategies/ewc.py` for a complete example, and the README for how to add one.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.data.records import Batch, Params
from perdure.errors import ConfigError, StrategyError

if TYPE_CHECKING:
    from perdure.curator.local_curator import Curator
    from perdure.curator.memory import MemoryPlan
    from perdure.data.scenarios import Experience

Scenario = Literal["task", "domain", "class"]
Rule = Literal["sum", "mean", "local"]
Pooled = Literal["experience", "all", "memory"]
MASKED = -1e9
"""Logit of a class that may not be predicted: its probability underflows to exactly zero."""


# --------------------------------------------------------------------------- what a strategy remembers


class State(Mapping[str, Tensor]):
    """What a strategy remembers: a flat mapping from name to tensor, shapes fixed by `Strategy.init`.

    Each name is declared once with how a federation combines it: `sum` (increments add up over clients), `mean`
    (weighted by declared sizes) or `local` (stays with the client). A parameter-shaped quantity is a *group*:
    one entry a parameter, named `group/parameter`.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None, rules: Mapping[str, Rule] | None = None) -> None:
        self._tensors = dict(tensors or {})
        self.rules: dict[str, Rule] = dict(rules or {})
        if self._tensors.keys() != self.rules.keys():
            raise StrategyError(f"every state name needs one rule; given {sorted(self._tensors.keys() ^ self.rules)}")

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"State({', '.join(f'{n}: {tuple(t.shape)} {self.rules[n]}' for n, t in self.items())})"

    def declare(self, name: str, value: Tensor, rule: Rule) -> "State":
        """Add a new name; for use in `Strategy.init`."""
        if name in self:
            raise StrategyError(f"state name {name!r} is declared twice; choose another name")
        return State({**self, name: value}, {**self.rules, name: rule})

    def declare_group(self, group: str, values: Params, rule: Rule) -> "State":
        """Add one name a parameter: `group/parameter`."""
        state = self
        for name, value in values.items():
            state = state.declare(f"{group}/{name}", value, rule)
        return state

    def group(self, group: str) -> Params:
        """Return the tensors of one group by parameter name."""
        return {n.removeprefix(f"{group}/"): t for n, t in self.items() if n.startswith(f"{group}/")}

    def replace(self, changes: Mapping[str, Tensor]) -> "State":
        """Return a state with new values under known names and unchanged shapes.

        Raises:
            StrategyError: for a name that `init` did not declare, or another shape.
        """
        for name, value in changes.items():
            if name not in self or self[name].shape != value.shape:
                known = tuple(self[name].shape) if name in self else "undeclared"
                given = tuple(value.shape)
                raise StrategyError(f"state {name!r} is {known}, given shape {given}; declare it in init()")
        return State({**self, **changes}, self.rules)

    def replace_group(self, group: str, values: Params) -> "State":
        """`replace` for one group."""
        return self.replace({f"{group}/{name}": value for name, value in values.items()})


# --------------------------------------------------------------------------- what a strategy may know


@dataclass(frozen=True, kw_only=True, eq=False)
class Spec:
    """Shapes and public sizes a strategy needs to lay out its state.

    Args:
        params: the model's parameters (for their shapes, device and initial values).
        num_classes: width of the head. num_experiences: declared length of the stream.
        feature_size: width of `model.features`. scenario: task-, domain- or class-incremental.
        statistics: running means and variances of the model's layers; a teacher keeps them beside its parameters.
    """

    params: Params
    num_classes: int
    num_experiences: int
    feature_size: int
    scenario: Scenario
    statistics: Params = field(default_factory=dict)

    def require_features(self) -> None:
        """Refuse a model that does not say how long its features are."""
        if self.feature_size < 1:
            raise StrategyError("the model has no feature_size; give it and `features`, as perdure.models.classifiers.Classifier")

    @property
    def teacher(self) -> Params:
        """All that makes the model answer as it does."""
        return {**self.params, **self.statistics}


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """Public facts of the moment; nothing here was observed on private data.

    Args:
        scenario: task-, domain- or class-incremental.
        experience: index of the experience (when evaluating a task-incremental stream: the task being asked for).
        task_classes: (T, C) bool, the declared classes of every experience.
        seen: (C,) bool, the classes of this and all earlier experiences.
        declared_size: public number of records of this experience.
        memory_share: share of the rows of the present batch that come from memory, where they were drawn apart;
            0 without memory and where new and stored records are pooled, as they are under privacy.
    """

    scenario: Scenario
    experience: int
    task_classes: Tensor
    seen: Tensor
    declared_size: int = 1
    memory_share: float = 0.0

    @property
    def current(self) -> Tensor:
        """(C,) bool, the declared classes of this experience."""
        return self.task_classes[self.experience]

    @property
    def earlier(self) -> Tensor:
        """(C,) bool, the classes of earlier experiences that are not of this one: a teacher may answer for them."""
        return self.task_classes[: self.experience].any(0) & ~self.current

    @property
    def allowed(self) -> Tensor:
        """(C,) bool, the classes that a record of this experience may be predicted as."""
        if self.scenario == "task":
            return self.current
        return self.seen if self.scenario == "class" else torch.ones_like(self.seen)

    def mask(self, logits: Tensor, batch: Batch) -> Tensor:
        """Logits (n, C) with the classes out of question for each row set to `MASKED`."""
        if self.scenario == "domain":
            return logits
        allowed = self.task_classes[batch.tasks] if self.scenario == "task" else self.seen
        return torch.where(allowed, logits, MASKED)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one experience is trained on; a function of public facts only.

    Args:
        pool: records that batches are drawn from: those of this `experience`, of `all` experiences so far, or what
            `memory` holds once those of this experience were offered to it.
        memory: what is kept for replay, or None.
        restart: begin with the initial parameters and a fresh optimiser.
        trainable: prefixes of the parameter names that are trained; None for all.
        train: False where no gradient is taken at all, because everything that is learnt is a release.
        penalised: False where the penalty is known to be 0 all the time, so that it need not be computed.
    """

    pool: Pooled = "experience"
    memory: "MemoryPlan | None" = None
    restart: bool = False
    trainable: tuple[str, ...] | None = None
    train: bool = True
    penalised: bool = True

    def __post_init__(self) -> None:
        if self.pool not in get_args(Pooled):
            raise ConfigError.of("plan.pool", self.pool, get_args(Pooled))


@dataclass(frozen=True, kw_only=True)
class Asks:
    """What a strategy asks of private data beyond the gradient; its declared privacy cost.

    Args:
        releases: noisy sums over the experience, after it. recalls: noisy sums over memory, after every experience.
        histograms: counts after every experience, with integer noise.
        selections: choices of one public answer after every experience; a top-k is k of them.
        references: reference gradients that one stored record takes part in at every step: 0 or 1.
        reuses: whether records of earlier experiences go on being used.
    """

    releases: int = 0
    histograms: int = 0
    selections: int = 0
    recalls: int = 0
    references: int = 0
    reuses: bool = False


# --------------------------------------------------------------------------- running the model


class _Method(nn.Module):
    """Lets `functional_call` reach another method of the wrapped model than `forward`."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module, self.name = module, name

    def forward(self, *inputs: Tensor) -> Any:
        return getattr(self.module, self.name)(*inputs)


class Forward:
    """The model as a function of its input at given parameters.

    `forward(x)` gives logits (n, C), `forward.features(x)` what enters the head, `forward.method("decode")(z)` what
    another method of the model makes of its inputs, `forward.at(params)` the same model at other parameters, unhooked
    and without gradients: a teacher, which keeps running statistics too where `params` has some.
    """

    def __init__(self, module: nn.Module, params: Params | None = None, *, frozen: bool = False) -> None:
        self.module, self.params, self._frozen = module, params, frozen

    def __call__(self, x: Tensor) -> Tensor:
        """(n, C) logits."""
        logits: Tensor = self._run(self.module, self.params, x)
        return logits

    def features(self, x: Tensor) -> Tensor:
        """(n, f): the input of the head."""
        features: Tensor = self.method("features")(x)
        return features

    def method(self, name: str) -> Callable[..., Any]:
        """Another method of the model, of tensors with one row a record, at the same parameters as `forward`.

        The layers that it calls are hooked as those of `forward` are, and its passes are counted like them.
        """
        params = self.params and {f"module.{own}": value for own, value in self.params.items()}
        return partial(self._run, _Method(self.module, name), params)

    def at(self, params: Params) -> "Forward":
        """Return a teacher: the model at `params`, without gradients."""
        return Forward(self.module, params, frozen=True)

    def _run(self, module: nn.Module, params: Params | None, *inputs: Tensor) -> Any:
        if params is None:
            return module(*inputs)
        if not self._frozen:
            return torch.func.functional_call(module, params, inputs)
        with torch.no_grad(), evaluating(module):
            return torch.func.functional_call(module, params, inputs)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and each back into the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


# --------------------------------------------------------------------------- the contract


def cross_entropy_of(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) cross entropy of each row."""
    return F.cross_entropy(logits, labels, reduction="none")


def cross_entropy(forward: Forward, batch: Batch, context: Context) -> Tensor:
    """(n,) cross entropy of each row over the classes it may be predicted as."""
    return cross_entropy_of(context.mask(forward(batch.inputs), batch), batch.labels)


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How forgetting is fought. Subclass it as a frozen dataclass and override the hooks you need.

    A strategy holds hyper-parameters only. What it remembers is the `State` handed in and out; records are reached
    only through the curator, in `references` and `after_experience`.

    Class attributes:
        asks: what it asks of private data (see `Asks`).
        couples_records: True where the loss of one row depends on other rows; refused under differential privacy.
        vmappable: a sentence that says why the hooks cannot run under `torch.func.vmap`, or None where they can.
    """

    asks: ClassVar[Asks] = Asks()
    couples_records: ClassVar[bool] = False
    not_vmappable_because: ClassVar[str | None] = None

    @property
    def name(self) -> str:
        """The strategy's name in tables."""
        return type(self).__name__

    def small_model(self, *, input_shape: tuple[int, ...], num_classes: int) -> nn.Module | None:
        """A small model that it can work on, the same every time; None where any classifier will do.

        Checks and lists use it. A strategy that needs more of a model refuses others in `init`.
        """
        return None

    def init(self, spec: Spec) -> State:
        """Lay out the state; called once, before the first experience."""
        return State()

    def plan(self, experience: "Experience") -> Plan:
        """Say what the experience is trained on, from public facts only."""
        return Plan()

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """(n,) one loss per row; row i depends on row i, parameters, state and context only."""
        return cross_entropy(forward, batch, context)

    def penalty(self, params: Params, state: State) -> Tensor | None:
        """Scalar added to the mean loss; touches no data.

        Args:
            params: all of the model's; its gradient is taken by those that the experience trains.
        """
        return None

    def references(self, curator: "Curator", params: Params, state: State) -> tuple[Params, ...]:
        """Released reference gradients for `project` (A-GEM, GEM)."""
        return ()

    def project(self, gradient: Params, references: tuple[Params, ...], state: State) -> Params:
        """Change the released gradient; touches no data."""
        return gradient

    def after_step(
        self, before: Params, after: Params, gradient: Params, state: State, noise_variance: float = 0.0
    ) -> State:
        """Follow the training path.

        Args:
            gradient: the released one, before penalty and projection.
            noise_variance: of the noise in every coordinate of it; public, 0 without privacy.
        """
        return state

    def remember(self, forward: Forward, batch: Batch, state: State) -> dict[str, Tensor]:
        """What memory stores beside each row, name to (n, ...); goes to the curator, never to the state.

        Row i depends on row i, parameters and state only. Stored rows come back with it in `batch.stored`; in rows that
        were not stored, and where nothing was stored yet, it is zero or missing.
        """
        return {}

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Consolidate at the final (in a federation: global) parameters; may ask for releases."""
        return state

    def derive(self, state: State) -> State:
        """What follows from the state alone, such as a solved head; free.

        Called after `after_experience`, and again where the states of clients were combined. Write to names that are
        declared `local` only.
        """
        return state

    def predict(self, forward: Forward, x: Tensor, context: Context, state: State) -> Tensor:
        """(n, C) logits, masked to the classes that may be predicted."""
        return torch.where(context.allowed, forward(x), MASKED)

    @classmethod
    def overrides(cls, hook: str) -> bool:
        """Whether the class changes `hook`; the loop skips what nobody overrides."""
        return getattr(cls, hook) is not getattr(Strategy, hook)

    def uses(self, hook: str) -> bool:
        """Whether this strategy changes `hook`."""
        return self.overrides(hook)
