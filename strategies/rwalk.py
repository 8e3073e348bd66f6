"""Riemannian walk: penalise changes by Fisher information and by scores of the training path.

Chaudhry, Dokania, Ajanthan and Torr, Riemannian Walk for Incremental Learning, ECCV 2018, section
4.

    penalty = strength * sum_j (F_j / max F + s_j / max s) (theta_j - theta*_j)^2
    s_j     = sum over windows of max(0, won_j / (1/2 R_j moved_j^2 + damping))
    won_j   = sum over the steps of a window of -g_j (theta_j after - theta_j before)

After each experience but the first, F is the mean of the new F and the F before, and s likewise. R
is a running average of the squared released gradient, R <- (1 - decay) R + decay g^2. R moved^2 is
used in place of the KL divergence of the paper.

The paper has one running average of squared gradients for both R and F. Here F is the empirical
Fisher information over all records, from one release after the experience, because the squared mean
gradient of a batch is not the Fisher information: it gets smaller for larger batches, and a running
average of it loses the first steps of the experience. R does use the squared mean gradient, because
a step has no other gradient; its scale cancels in s / max s, up to the damping. The paper also
stores examples; for this use `Combine(RWalk(...), Replay(...))`.

State: `fisher` and `score`, averaged over clients by declared sizes; `anchor`, `metric` (R), `won`,
`moved` and `walked`, kept by each client, and four numbers.
Memory cost: seven times the parameters, and a copy of them while a step is taken.
Privacy cost: one release per experience, of the squared gradient clipped to C^2 as for EWC; the
path scores cost no privacy. Under privacy the released gradient has noise, as for SI (see there).
The noise variance is subtracted from `won`; it is not subtracted from R, where it adds the same
amount to every parameter on average.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from perdure.contract import (
    Forward,
    Plan,
    PrivacyCost,
    QuadraticPenalty,
    Spec,
    State,
    task_losses,
)
from perdure.data import Batch
from perdure.errors import ConfigError
from perdure.queries import SquaredGradient
from perdure.strategies.si import add_progress
from perdure.tasks import Task
from perdure.types import Params
from perdure.utils import number_unless_vmapped, pieces

if TYPE_CHECKING:
    from perdure.contract import Curator
    from perdure.data import Experience

NUMBERS = ("steps", "past", "fisher_scale", "score_scale")


@dataclass(frozen=True, kw_only=True)
class RWalk(QuadraticPenalty):
    """Quadratic penalty weighted by Fisher information plus path score, both scaled to at most 1.

    Args:
        strength: weight of the penalty (lambda).
        window: number of steps after which path scores are computed again (delta t).
        decay: weight of the current step in the running average of squared gradients (alpha).
        damping: number added to the denominator of the path score, so that it is never 0 (epsilon).
    """

    strength: float
    window: int = 10
    decay: float = 0.9
    damping: float = 1e-3
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(releases=1)
    weighted_by: ClassVar[tuple[str, ...]] = ("fisher", "score")
    tasks: ClassVar[tuple[type[Task], ...]] = (Task,)

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ConfigError.of("rwalk.strength", self.strength, "a finite number, 0 or more")
        if not self.window >= 1:
            raise ConfigError.of("rwalk.window", self.window, "1 or more")
        if not 0 < self.decay <= 1:
            raise ConfigError.of("rwalk.decay", self.decay, "a number above 0, at most 1")
        if not 0 < self.damping < math.inf:
            raise ConfigError.of("rwalk.damping", self.damping, "a finite number above 0")

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: a penalty of strength 0.5, with scores over 2 steps."""
        return cls(strength=0.5, window=2)

    def init(self, spec: Spec) -> State:
        """Create a state in which all importance is 0 and the path is empty."""
        zeros = {name: torch.zeros_like(value) for name, value in spec.params.items()}
        state = State().declare_group("fisher", zeros, "mean").declare_group("score", zeros, "mean")
        for group in ("metric", "won", "moved", "walked"):
            state = state.declare_group(group, zeros, "local")
        for name in NUMBERS:
            state = state.declare(
                name, torch.zeros((), device=next(iter(zeros.values())).device), "local"
            )
        return state.declare_group("anchor", spec.params, "local")

    def plan(self, experience: "Experience") -> Plan:
        """Return the plan of an experience; in the first one the penalty is 0 and not computed."""
        return Plan(applies_penalty=experience.index > 0)

    def weight(self, state: State, *groups: Tensor) -> Tensor:
        """Weights: twice strength times the scaled sum of both, as the formula has no 1/2."""
        fisher, score = groups
        scaled = state["fisher_scale"] * fisher + state["score_scale"] * score
        return 2 * self.strength * scaled

    def after_step(
        self,
        before: Params,
        after: Params,
        gradient: Params,
        state: State,
        noise_variance: float = 0.0,
    ) -> State:
        """Add a step to the path, and compute scores at the end of a window."""
        # the same arithmetic as in place, so that a resumed run ends in the same bits
        walk = [f"{group}/{name}" for group in ("metric", "won", "moved") for name in before]
        own = state.replace({name: state[name].clone() for name in ("steps", *walk)})
        return self.after_step_in_place(before, after, gradient, own, noise_variance)

    def after_step_in_place(
        self,
        before: Params,
        after: Params,
        gradient: Params,
        state: State,
        noise_variance: float = 0.0,
    ) -> State:
        """Add a step to the path in place; scores, computed once per window, are new tensors."""
        state["steps"].add_(1)
        for name, value in before.items():
            walk = (value, after[name], gradient[name])
            add_progress(state[f"won/{name}"], *walk, noise_variance)
            own = (state[f"metric/{name}"], state[f"moved/{name}"])
            for metric, moved, start, end, grad in pieces(*own, *walk):
                metric.mul_(1 - self.decay).add_(grad.square(), alpha=self.decay)
                moved.add_(end - start)
        ends = state["steps"] % self.window == 0
        ended = number_unless_vmapped(ends)
        if ended is None:
            return self._scored(state, before, ends)
        return self._scored(state, before) if ended else state

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Release the Fisher information, combine it and the scores with the past, and anchor."""
        query = SquaredGradient(lambda forward, batch: self._terms(curator, forward, batch))
        total = curator.release(query, clip_norm=curator.clip_norm**2, purpose="fisher")
        state = self._scored(state, params)
        changes = {
            "past": torch.ones_like(state["past"]),
            "steps": torch.zeros_like(state["steps"]),
        }
        share = torch.where(state["past"] > 0, 0.5, 1.0)
        for name in params:
            new = (total[name] / curator.declared_size).clamp(min=0)
            changes[f"fisher/{name}"] = torch.lerp(state[f"fisher/{name}"], new, share)
            changes[f"score/{name}"] = torch.lerp(
                state[f"score/{name}"], state[f"walked/{name}"], share
            )
            changes[f"walked/{name}"] = torch.zeros_like(new)
        return state.replace(changes).replace_group("anchor", params)

    def derive(self, state: State) -> State:
        """Compute the scales that bring Fisher information and scores to at most 1."""
        return state.replace(
            {f"{group}_scale": scale(state.group(group)) for group in ("fisher", "score")}
        )

    def _scored(self, state: State, names: Params, now: Tensor | None = None) -> State:
        """Add the score of a window that ends, and begin the next window.

        Args:
            state: the current state.
            names: parameters by name.
            now: () bool, False if the window does not end in this step; None if it does.
        """
        changes = {}
        for name in names:
            won = state[f"won/{name}"]
            moved = state[f"moved/{name}"]
            walked = state[f"walked/{name}"]
            score = won / (0.5 * state[f"metric/{name}"] * moved.square() + self.damping)
            changes[f"walked/{name}"] = walked + score.clamp(min=0)
            changes[f"won/{name}"] = torch.zeros_like(won)
            changes[f"moved/{name}"] = torch.zeros_like(moved)
        if now is not None:
            changes = {n: torch.where(now, value, state[n]) for n, value in changes.items()}
        return state.replace(changes)

    def _terms(self, curator: "Curator", forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        losses = task_losses(forward, batch, curator.context)[:, None]
        return losses, torch.ones_like(losses)


def scale(group: Params) -> Tensor:
    """Return () 1 / the largest number in a group of tensors; 0 if all numbers are 0."""
    largest = torch.stack([value.max() for value in group.values()]).max()
    return torch.where(largest > 0, 1 / largest.clamp(min=torch.finfo(largest.dtype).tiny), 0.0)
