"""Strategies that break the contract, each with the check that must find it and the words of its
error.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from perdure.contract.forward import cross_entropy_of, task_losses
from perdure.contract.plan import MemoryPlan, Plan, PrivacyCost
from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.strategies import L2, Replay

BROKEN = {}


def broken(check, *words, **arguments):
    """List a strategy that `check` must refuse with these words."""

    def listed(kind):
        kind = dataclass(frozen=True, kw_only=True)(kind)
        BROKEN[kind.__name__] = (lambda: kind(**arguments)), check, words
        return kind

    return listed


# --------------------------------------------------------------------------- declared


class Loose(Strategy):
    strength: float = 1.0


BROKEN["Loose"] = (
    Loose,
    "declared",
    ("strength of Loose is no field", "@dataclass(frozen=True, kw_only=True)"),
)


@broken("declared", "no hash", "tuples", sizes=[1, 2])
class Unhashable(Strategy):
    sizes: list


@broken("declared", "its model is made with different", "seed the initialisation")
class Unseeded(Strategy):
    def small_model(self, *, input_shape, num_classes):
        return nn.Linear(*input_shape, num_classes)


@broken("declared", "penality() is no hook", "did you mean penalty()?")
class Misspelled(Strategy):
    def penality(self, params, state):
        return None


# --------------------------------------------------------------------------- alone


class Remembering(Strategy):
    """A strategy with a number in its state."""

    def init(self, spec):
        return State().declare(
            "seen", torch.zeros(2, device=next(iter(spec.params.values())).device), "local"
        )


@broken("alone", "after_experience()", "'seen' as (3,)", "'seen' as (2,)", "state.replace")
class Growing(Remembering):
    def after_experience(self, curator, params, state):
        return State({"seen": torch.zeros(3)}, state.rules)


@broken("alone", "after_step()", "torch.float64", "torch.float32")
class Widening(Remembering):
    def after_step(self, before, after, gradient, state, noise_variance=0.0):
        return state.replace({"seen": state["seen"].double()})


@broken("alone", "'news' as (2,)", "as None")
class Inventing(Remembering):
    def after_experience(self, curator, params, state):
        return state.declare("news", torch.zeros(2), "local")


@broken("alone", "NaN", "seen")
class Dividing(Remembering):
    def after_experience(self, curator, params, state):
        return state.replace({"seen": state["seen"] / 0})


@broken("alone", "penalty() pulls", "in experience 0", "applies_penalty=False")
class Decaying(Strategy):
    """Weight decay that is declared away."""

    def plan(self, experience):
        return Plan(applies_penalty=False)

    def penalty(self, params, state):
        return torch.stack([value.square().sum() for value in params.values()]).sum()


@broken("alone", "predict()", "may not be predicted", "context.allowed")
class Unmasked(Strategy):
    def predict(self, forward, x, context, state):
        return forward(x)


@broken("alone", "predict() gives shape (4, 2)", "(4, 6)")
class Narrow(Strategy):
    def predict(self, forward, x, context, state):
        return forward(x)[:, :2]


@broken("alone", "it raised ZeroDivisionError: division by zero", "allowed: no error")
class Failing(Strategy):
    def penalty(self, params, state):
        return 1 / 0


# --------------------------------------------------------------------------- pure


@broken("pure", "after_step() changes state seen in place", "clone")
class WritingToState(Remembering):
    def after_step(self, before, after, gradient, state, noise_variance=0.0):
        state["seen"].add_(1)
        return state


@broken("pure", "after_experience() changes parameter", "in place")
class WritingToParameters(Strategy):
    def after_experience(self, curator, params, state):
        for value in params.values():
            value.mul_(0.5)
        return state


@broken("pure", "losses() changes row tensor inputs in place")
class WritingToRows(Strategy):
    def losses(self, forward, batch, context, state):
        batch.inputs.mul_(0.99)
        return task_losses(forward, batch, context)


@broken("pure", "project() changes gradient", "in place")
class WritingToGradient(Strategy):
    def project(self, gradient, references, state):
        next(iter(gradient.values())).add_(1e-3)
        return gradient


@broken("pure", "penalty() changes the strategy object itself", "State")
class Counting(Strategy):
    def penalty(self, params, state):
        object.__setattr__(self, "calls", getattr(self, "calls", 0) + 1)


@broken(
    "pure",
    "add_penalty_gradient() adds a gradient to",
    "that differs from the gradient",
    "correct the formula",
    strength=1.0,
)
class PullingTwice(L2):
    def add_penalty_gradient(self, gradient, params, state):
        super().add_penalty_gradient(gradient, params, state)
        super().add_penalty_gradient(gradient, params, state)


@broken("pure", "after_step_in_place() leaves another seen", "than after_step()", "leave")
class FollowingOtherwise(Remembering):
    def after_step(self, before, after, gradient, state, noise_variance=0.0):
        return state.replace({"seen": state["seen"] + 1})

    def after_step_in_place(self, before, after, gradient, state, noise_variance=0.0):
        state["seen"].add_(2)
        return state


@broken("pure", "after_step_in_place() leaves another other", "what after_step() replaces")
class WritingToMore(Remembering):
    def init(self, spec):
        return super().init(spec).declare("other", torch.zeros(2), "local")

    def after_step(self, before, after, gradient, state, noise_variance=0.0):
        return state.replace({"seen": state["seen"] + 1})

    def after_step_in_place(self, before, after, gradient, state, noise_variance=0.0):
        state["seen"].add_(1)
        state["other"].add_(1)
        return state


@broken("pure", "changes the strategy object itself")
class CountingInAList(Strategy):
    calls: tuple = ([],)

    def __hash__(self):
        return 0

    def losses(self, forward, batch, context, state):
        self.calls[0].append(len(batch))
        return task_losses(forward, batch, context)


@broken("pure", "losses() gives value anew at every call", "generator")
class Rolling(Strategy):
    def losses(self, forward, batch, context, state):
        return task_losses(forward, batch, context) * torch.rand(
            len(batch), device=batch.inputs.device
        )


@broken("pure", "derive() changes seen", "'local'")
class DerivingShared(Strategy):
    def init(self, spec):
        return State().declare("seen", torch.zeros(2), "mean")

    def derive(self, state):
        return state.replace({"seen": state["seen"] + 1})


# --------------------------------------------------------------------------- rows


@broken("rows", "losses() gives a record another loss", "couples_records")
class Centred(Strategy):
    def losses(self, forward, batch, context, state):
        each = task_losses(forward, batch, context)
        return each - 0.5 * each.mean()


@broken("rows", "losses() gives a record another loss with no", "no classes seen in the batch")
class MaskedByBatch(Strategy):
    """A strategy that masks by the classes present in the batch, as ER-ACE was published."""

    def losses(self, forward, batch, context, state):
        present = torch.zeros_like(context.seen)
        present[batch.labels] = True
        return cross_entropy_of(torch.where(present, forward(batch.inputs), -1e9), batch.labels)


@broken("rows", "remember() gives a record another logits", memory_size=16)
class RememberingOthers(Replay):
    def remember(self, forward, batch, state):
        logits = forward(batch.inputs)
        return {"logits": logits - logits.mean(0)}


@broken("rows", "losses() gives loss of shape ()", "(n, ...)", "reduction='none'")
class Averaging(Strategy):
    def losses(self, forward, batch, context, state):
        return task_losses(forward, batch, context).mean()


@broken("rows", "predict() gives a record another logits")
class PredictingByCompany(Strategy):
    def predict(self, forward, x, context, state):
        logits = forward(x)
        return torch.where(context.allowed, logits - logits.mean(0), -1e9)


@broken("rows", "question 0 (centred) gives a record another value")
class AskingByCompany(Strategy):
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(releases=1)

    def after_experience(self, curator, params, state):
        curator.release(lambda f, b: b.inputs - b.inputs.mean(0), clip_norm=1.0, purpose="centred")
        return state


@broken("rows", "question 0 (reference) gives a record another value", memory_size=16)
class ReferringByCompany(Strategy):
    memory_size: int
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(references=1, reuses_past_records=True)

    def plan(self, experience):
        return Plan(memory=MemoryPlan(capacity=self.memory_size, use="reference"))

    def references(self, curator, params, state):
        def losses(forward, batch):
            each = task_losses(forward, batch, curator.context)
            return each - 0.5 * each.mean()

        return (curator.reference(losses, params),) if curator.context.experience else ()


# --------------------------------------------------------------------------- bounds


@broken(
    "bounds", "one record moves the gradient of a batch by", "its clip norm, 0.5", "in their order"
)
class TwoOrders(Strategy):
    """A strategy with correct losses whose two passes order the records differently."""

    def losses(self, forward, batch, context, state):
        mirrored = forward(batch.inputs.flip(0)).flip(0)
        logits = 4 * forward(batch.inputs) + 4 * mirrored
        return cross_entropy_of(context.mask(logits, batch), batch.labels)


# --------------------------------------------------------------------------- vmap


@broken("vmap", "penalty() fails under torch.func.vmap", "not_vmappable_because")
class Branching(Strategy):
    def penalty(self, params, state):
        size = torch.stack([value.square().sum() for value in params.values()]).sum()
        return size if bool(size > 1) else 0 * size


@broken("vmap", "derive() fails under torch.func.vmap")
class DerivingByNumbers(Remembering):
    def derive(self, state):
        return state.replace({"seen": torch.full_like(state["seen"], state["seen"].sum().item())})


@broken("vmap", "not_vmappable_because = 'no'", "a sentence")
class Curt(Branching):
    not_vmappable_because: ClassVar[str | None] = "no"
