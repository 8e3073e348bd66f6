"""Combination of several strategies into one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from perdure.contract.context import Context, Spec
from perdure.contract.forward import Forward
from perdure.contract.plan import Plan, Pooled, PrivacyCost
from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.data.records import Batch
from perdure.errors import ConfigError, StrategyError
from perdure.tasks import Task
from perdure.types import Params

if TYPE_CHECKING:
    from perdure.contract.curator import Curator
    from perdure.data.experience import Experience


@dataclass(frozen=True, kw_only=True, init=False)
class Combine(Strategy):
    """Join several strategies into one: `Combine(EWC(strength=100.0), Replay(memory_size=500))`.

    The task loss is counted once: at most one part may override `losses`. Penalties are added up.
    Names in the state get the position of the part as prefix. Projections run in the given order.

    Raises:
        ConfigError: if a part is not an instance of a strategy.
        StrategyError: if two parts override the loss, the prediction or the memory, or if one part
            uses no gradient, so that another has no effect; the message names both.
    """

    parts: tuple[Strategy, ...] = field(default=())

    def __init__(self, *parts: Strategy) -> None:
        for part in parts:
            # an object that acts as a strategy, as in an audit, may be of another class
            if isinstance(part, type) or not callable(getattr(part, "losses", None)):
                allowed = "instances of strategies, as in Combine(EWC(strength=100.0), Naive())"
                raise ConfigError.of("a part of Combine", part, allowed)
        object.__setattr__(self, "parts", parts)
        for hook in ("losses", "predict", "remember", "references"):
            self._only(hook)
        total = [part.privacy_cost for part in parts]
        object.__setattr__(
            self,
            "privacy_cost",
            PrivacyCost(
                releases=sum(a.releases for a in total),
                histograms=sum(a.histograms for a in total),
                selections=sum(a.selections for a in total),
                memory_releases=sum(a.memory_releases for a in total),
                references=sum(a.references for a in total),
                reuses_past_records=any(a.reuses_past_records for a in total),
            ),
        )
        object.__setattr__(self, "couples_records", any(part.couples_records for part in parts))
        own = [part.own_loss_because for part in parts if part.own_loss_because]
        object.__setattr__(self, "own_loss_because", own[0] if own else "")
        reasons = [part.not_vmappable_because for part in parts if part.not_vmappable_because]
        object.__setattr__(self, "not_vmappable_because", reasons[0] if reasons else None)

    def __repr__(self) -> str:
        return f"Combine({', '.join(map(repr, self.parts))})"

    @property
    def name(self) -> str:
        """Names of the parts, joined by plus signs."""
        return "+".join(part.name for part in self.parts)

    def refuse_task(self, task: Task) -> None:
        """Refuse records of a task that some part does not support."""
        for part in self.parts:
            part.refuse_task(task)

    def uses(self, hook: str) -> bool:
        """Return True if a part overrides `hook`.

        For `after_step_in_place`, every part that overrides `after_step` must also override it.
        """
        if hook == "after_step_in_place":
            following = [part for part in self.parts if part.uses("after_step")]
            return bool(following) and all(part.uses(hook) for part in following)
        return any(part.uses(hook) for part in self.parts)

    def _only(self, hook: str) -> tuple[int, Strategy]:
        users = [(i, part) for i, part in enumerate(self.parts) if part.uses(hook)]
        if len(users) > 1:
            names = " and ".join(part.name for _, part in users)
            raise StrategyError(
                f"{names} both override {hook}(); allowed: at most one such part; remove one of "
                "them"
            )
        return users[0] if users else (-1, Strategy())

    def _own(self, state: State, index: int) -> State:
        prefix = f"{index}."
        names = [name for name in state if name.startswith(prefix)]
        cut = len(prefix)
        return State({n[cut:]: state[n] for n in names}, {n[cut:]: state.rules[n] for n in names})

    def _each(self, state: State, change: Callable[[Strategy, State], State]) -> State:
        tensors: dict[str, Tensor] = {}
        for i, part in enumerate(self.parts):
            tensors |= {f"{i}.{n}": t for n, t in change(part, self._own(state, i)).items()}
        return state.replace(tensors)

    def small_model(self, *, input_shape: tuple[int, ...], num_classes: int) -> nn.Module | None:
        """Return the small model of the first part that needs a special one; None if none does."""
        models = (
            part.small_model(input_shape=input_shape, num_classes=num_classes)
            for part in self.parts
        )
        return next((model for model in models if model is not None), None)

    def init(self, spec: Spec) -> State:
        """Create the states of all parts in one state."""
        state = State()
        for i, part in enumerate(self.parts):
            own = part.init(spec)
            for name, value in own.items():
                state = state.declare(f"{i}.{name}", value, own.rules[name])
        return state

    def plan(self, experience: "Experience") -> Plan:
        """Merge the plans of the parts; refuse two memories, or two choices of parameters."""
        plans = [(part.name, part.plan(experience)) for part in self.parts]

        def one(what: str) -> object:
            given = [
                (name, getattr(plan, what))
                for name, plan in plans
                if getattr(plan, what) is not None
            ]
            if len(given) > 1:
                raise StrategyError(
                    f"{given[0][0]} and {given[1][0]} both set {what}; remove one of them"
                )
            return given[0][1] if given else None

        idle = [name for name, plan in plans if not plan.train]
        busy = [
            name
            for part, (name, plan) in zip(self.parts, plans, strict=True)
            if plan.memory or steps(part)
        ]
        if idle and busy:
            raise StrategyError(
                f"{idle[0]} uses no gradient, so {busy[0]} would have no effect; remove one of them"
            )
        pools: set[Pooled] = {plan.pool for _, plan in plans} - {"experience"}
        if len(pools) > 1:
            raise StrategyError(
                f"two parts use different pools, {' and '.join(sorted(pools))}; remove one of them"
            )
        return Plan(
            pool=pools.pop() if pools else "experience",
            memory=one("memory"),  # type: ignore[arg-type]
            restart=any(p.restart for _, p in plans),
            trainable=one("trainable"),  # type: ignore[arg-type]
            train=all(p.train for _, p in plans),
            applies_penalty=any(p.applies_penalty for _, p in plans),
        )

    def begin_round(self, params: Params, state: State) -> State:
        """Let all parts update their states at the start of a round."""
        return self._each(state, lambda part, own: part.begin_round(params, own))

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """(n,) losses of the only part that overrides `losses`; without one, cross entropy."""
        i, part = self._only("losses")
        return part.losses(forward, batch, context, self._own(state, i))

    def penalty(self, params: Params, state: State) -> Tensor | None:
        """Sum of the penalties of all parts, a scalar; None if no part has one."""
        each = [part.penalty(params, self._own(state, i)) for i, part in enumerate(self.parts)]
        given = [penalty for penalty in each if penalty is not None]
        return torch.stack(given).sum() if given else None

    def add_penalty_gradient(self, gradient: Params, params: Params, state: State) -> None:
        """Add the gradients of the penalties of all parts to `gradient`."""
        for i, part in enumerate(self.parts):
            if part.uses("penalty"):
                part.add_penalty_gradient(gradient, params, self._own(state, i))

    def references(self, curator: "Curator", params: Params, state: State) -> tuple[Params, ...]:
        """Reference gradients of the only part that overrides `references`."""
        i, part = self._only("references")
        return part.references(curator, params, self._own(state, i))

    def project(self, gradient: Params, references: tuple[Params, ...], state: State) -> Params:
        """Apply the projections of all parts, in their order.

        Only the part that overrides `references` gets the reference gradients.
        """
        asking, _ = self._only("references")
        for i, part in enumerate(self.parts):
            gradient = part.project(
                gradient, references if i == asking else (), self._own(state, i)
            )
        return gradient

    def after_step(
        self,
        before: Params,
        after: Params,
        gradient: Params,
        state: State,
        noise_variance: float = 0.0,
    ) -> State:
        """Update the states of all parts after a step."""
        return self._each(
            state, lambda part, own: part.after_step(before, after, gradient, own, noise_variance)
        )

    def after_step_in_place(
        self,
        before: Params,
        after: Params,
        gradient: Params,
        state: State,
        noise_variance: float = 0.0,
    ) -> State:
        """Update the states of all parts after a step, in place if the part can."""
        return self._each(
            state,
            lambda part, own: part.after_step_in_place(
                before, after, gradient, own, noise_variance
            ),
        )

    def remember(self, forward: Forward, batch: Batch, state: State) -> dict[str, Tensor]:
        """Return the tensors to store from the only part that overrides `remember`."""
        i, part = self._only("remember")
        return part.remember(forward, batch, self._own(state, i))

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Let all parts consolidate at the end of an experience."""
        return self._each(state, lambda part, own: part.after_experience(curator, params, own))

    def derive(self, state: State) -> State:
        """Let each part compute its derived state from its own state."""
        return self._each(state, lambda part, own: part.derive(own))

    def predict(self, forward: Forward, x: Tensor, context: Context, state: State) -> Tensor:
        """Return the outputs of the only part that overrides `predict`, or masked logits."""
        i, part = self._only("predict")
        return part.predict(forward, x, context, self._own(state, i))


def steps(part: Strategy) -> bool:
    """Return True if the part overrides a hook that is called in training steps."""
    return any(
        part.uses(hook) for hook in ("losses", "penalty", "references", "project", "after_step")
    )
