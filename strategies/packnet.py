"""PackNet: each task keeps its largest free weights, and later tasks train the other weights.

Mallya and Lazebnik, PackNet: Adding Multiple Tasks to a Single Network by Iterative Pruning, CVPR
2018, section 3.

    w_j = held_j            if an earlier task owns weight j
          theta_j - held_j  if this task owns weight j,
                            or if no task owns it and this task has not pruned yet
          0                 in all other cases
    loss_i = CE(x_i, y_i; w) over the classes of the task

In every layer, the task keeps its largest free weights and leaves the share `pruned_share` with the
smallest |w| to later tasks. A later task starts with w_j = 0 there, because held_j is set to the
value of theta_j. Biases and normalisation parameters belong to the first task and are fixed after
it. A row of the head belongs to the first task that has its class. None of them is pruned. A task
is predicted with the weights of this task and earlier ones, exactly as at the end of the task.
Frozen weights are copies, because momentum and weight decay change theta_j also if its gradient is
0. So the model alone is not the network; use `predict` of the strategy. Do not use weight decay: it
pulls theta_j towards 0, so it pulls w_j of a later task towards -held_j.

The paper retrains the kept weights after pruning. Here this is the part of an experience after its
first `dense_steps` steps. With None, weights are pruned at the end of the experience and not
retrained, which costs accuracy.

If no task is given (class-incremental), the network of each task computes the logits of its own
classes, and the largest logit wins; this is not in the paper. Running statistics of BatchNorm are
not parameters and are not frozen.

State: `owner` (0 for no task, or the number of the task from 1) and `held`, one tensor of each per
parameter; the number of tasks `done`, `pruned` (1 after this task has pruned) and its `steps`. In a
federation all clients prune the same weights if `dense_steps` is the number of steps at the end of
a round, with all clients trained in every round up to it. This is checked when their states are
combined. Memory cost: twice the parameters, for any number of tasks. Privacy cost: only the
gradient: weights are compared in a released model. The per-record gradient is clipped over all
weights, also the frozen ones. Their part of the noisy gradient is set to 0 afterwards.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from perdure.contract import Context, Forward, Plan, Spec, State, Strategy, refuse_single_class
from perdure.data import Batch
from perdure.errors import ConfigError, StrategyError
from perdure.tasks import MASKED, MultiLabel, SingleLabel, Task
from perdure.types import Params

if TYPE_CHECKING:
    from perdure.contract import Curator
    from perdure.data import Experience


@dataclass(frozen=True, kw_only=True)
class PackNet(Strategy):
    """Prune and freeze the weights of each task, and train later tasks on the free weights.

    Args:
        pruned_share: share of the free weights of a layer that is left to later tasks.
        dense_steps: number of steps of an experience before pruning; later steps retrain the kept
            weights. None to prune at the end of the experience.
        head: prefix of the names of the head's parameters.
    """

    pruned_share: float = 0.75
    dense_steps: int | None = None
    head: str = "head."
    not_vmappable_because: ClassVar[str | None] = (
        "it prunes at one step, which it finds by branching on a count"
    )
    tasks: ClassVar[tuple[type[Task], ...]] = (SingleLabel, MultiLabel)
    tasks_because: ClassVar[str] = "it tells its networks apart by their classes"

    def __post_init__(self) -> None:
        if not 0 < self.pruned_share < 1:
            raise ConfigError.of(
                "packnet.pruned_share", self.pruned_share, "a number between 0 and 1"
            )
        if self.dense_steps is not None and self.dense_steps < 1:
            raise ConfigError.of(
                "packnet.dense_steps", self.dense_steps, "1 or more steps, or None"
            )

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: half of the free weights pruned, after 4 dense steps."""
        return cls(pruned_share=0.5, dense_steps=4)

    def init(self, spec: Spec) -> State:
        """Create a state in which no task owns any weight.

        Raises:
            StrategyError: if all experiences have the same classes, the head is not found, or the
                model has too few weights for the number of tasks.
        """
        if spec.scenario == "domain":
            raise StrategyError(
                "the stream is domain-incremental; PackNet needs a task label, or different "
                "classes in each experience, to choose the network for a prediction; use EWC "
                "instead"
            )
        heads = [len(value) for name, value in spec.params.items() if name.startswith(self.head)]
        if not heads or set(heads) != {spec.num_classes}:
            raise StrategyError(
                f"no parameters begin with {self.head!r}, or not all of them have one row per "
                "class; give PackNet(head=...) the prefix of the head's parameters"
            )
        self._refuse_full(spec)
        zeros = {name: torch.zeros_like(value) for name, value in spec.params.items()}
        none = torch.zeros((), device=next(iter(zeros.values())).device)
        state = State().declare_group("owner", zeros, "mean").declare_group("held", zeros, "mean")
        return (
            state.declare("done", none, "mean")
            .declare("pruned", none, "local")
            .declare("steps", none, "local")
        )

    def plan(self, experience: "Experience") -> Plan:
        """Return a plan to train all weights; the strategy restores frozen weights.

        Raises:
            StrategyError: if the experience has one class, so that there is nothing to distinguish.
        """
        refuse_single_class(self.name, experience)
        return Plan()

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """Return (n,) cross entropy of the task's network over the classes of the task."""
        logits = self._network(forward, state, context.experience)(batch.inputs)
        return context.task.losses(logits, batch.labels, context.current)

    def project(self, gradient: Params, references: tuple[Params, ...], state: State) -> Params:
        """Set the gradient of frozen and pruned weights to 0."""
        owners = trained_owners(state, self.head)
        return {
            name: value.addcmul(value, others(state[f"owner/{name}"], owners[name]), value=-1)
            for name, value in gradient.items()
        }

    def after_step(
        self,
        before: Params,
        after: Params,
        gradient: Params,
        state: State,
        noise_variance: float = 0.0,
    ) -> State:
        """Prune after the dense steps, with the weights before this step.

        At the first step of a round these are the global weights, so all clients prune the same.
        """
        if self.dense_steps is None:
            return state
        state = state.replace({"steps": state["steps"] + 1})
        return self._prune(before, state) if int(state["steps"]) == self.dense_steps + 1 else state

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Prune if this was not done yet, and freeze the weights of the task."""
        state = state if bool(state["pruned"]) else self._prune(params, state)
        task = state["done"]
        classes = curator.context.current
        owner = {
            name: self._owner_after_task(name, value, task, classes)
            for name, value in state.group("owner").items()
        }
        weights = network_weights(params, state, task, self.head)
        held = {
            name: torch.where(owner[name] > 0, weights[name], value)
            for name, value in params.items()
        }
        fresh = {
            "done": task + 1,
            "pruned": torch.zeros_like(task),
            "steps": torch.zeros_like(task),
        }
        return state.replace_group("owner", owner).replace_group("held", held).replace(fresh)

    def derive(self, state: State) -> State:
        """Check that all clients have assigned every weight to the same task.

        Raises:
            StrategyError: if they have not.
        """
        if any(not torch.equal(owner, owner.round()) for owner in state.group("owner").values()):
            raise StrategyError(
                f"the clients pruned different weights with dense_steps = {self.dense_steps}; set "
                "dense_steps to the number of steps at the end of a round, with all clients "
                "trained in every round up to it, or use PackNet(dense_steps=None)"
            )
        return state

    def predict(self, forward: Forward, x: Tensor, context: Context, state: State) -> Tensor:
        """Logits (n, C) of the task's network; without a task, each network for its own classes."""
        if context.scenario == "task":
            return torch.where(
                context.current, self._network(forward, state, context.experience)(x), MASKED
            )
        tasks = context.task_classes[: context.experience + 1]
        answers = [
            torch.where(own, self._network(forward, state, k)(x), MASKED)
            for k, own in enumerate(tasks)
        ]
        return torch.stack(answers).amax(0)

    def _refuse_full(self, spec: Spec) -> None:
        """Refuse a model in which some task would get no weight."""
        free = [v.numel() for n, v in spec.params.items() if prunable(n, v, self.head)]
        for task in range(spec.num_experiences if free else 0):
            kept = [weights_kept(count, self.pruned_share) for count in free]
            if not any(kept):
                raise StrategyError(
                    f"PackNet has no weight left for experience {task} of {spec.num_experiences}, "
                    f"with pruned_share = {self.pruned_share}; give a larger model"
                )
            free = [count - own for count, own in zip(free, kept, strict=True)]

    def _network(self, forward: Forward, state: State, task: int) -> Forward:
        """Return the model with the weights of the task's network."""
        given = forward.params or {}
        live = {**dict(forward.module.named_parameters()), **given}
        own = {name: live[name] for name in state.group("owner")}
        weights = network_weights(own, state, task, self.head)
        return Forward(forward.module, {**given, **weights})

    def _prune(self, params: Params, state: State) -> State:
        """Return the state in which the task owns the largest free weights of every layer."""
        weights = network_weights(params, state, state["done"], self.head)
        task = state["done"]
        owner = {
            name: largest(weights[name], value, self.pruned_share, task + 1)
            if prunable(name, value, self.head)
            else value
            for name, value in state.group("owner").items()
        }
        return state.replace_group("owner", owner).replace({"pruned": torch.ones_like(task)})

    def _owner_after_task(self, name: str, owner: Tensor, task: Tensor, classes: Tensor) -> Tensor:
        """Compute the owner of every entry of one parameter, after the task.

        The task gets the free rows of its classes in the head, and all free entries of biases and
        normalisation parameters, which so belong to the first task. `_prune` assigned its weights.

        Args:
            name: name of the parameter.
            owner: owners, in the shape of the parameter; 0 for none, or a task's number from 1.
            task: (), number of the task from 0.
            classes: (C,) bool, the classes of the task.
        """
        if prunable(name, owner, self.head):
            return owner
        if name.startswith(self.head):
            taken = classes.view(-1, *[1] * (owner.dim() - 1))
        else:
            taken = torch.ones_like(classes[0])
        return torch.where((owner == 0) & taken, task + 1, owner)


def network_weights(params: Params, state: State, task: int | Tensor, head: str) -> Params:
    """Weights w of a task's network with the given parameters, by the formula of the module.

    Args:
        params: parameters theta, by name.
        state: owners and held values of every weight.
        task: number of the task from 0.
        head: prefix of the head's parameters.
    """
    if int(task) < int(state["done"]):
        return {name: held_up_to(int(task) + 1, state, name) for name in params}
    owners = trained_owners(state, head)
    weights = {}
    for name, live in params.items():
        owner = state[f"owner/{name}"]
        held = state[f"held/{name}"]
        # an untrained entry belongs to an earlier task, or was pruned and belongs to none
        fixed = held * owner.clamp(max=1) if owners[name] else held
        weights[name] = torch.lerp(live - held, fixed, others(owner, owners[name]))
    return weights


def others(owner: Tensor, number: int) -> Tensor:
    """Return the factor of each entry that removes a task's own: 0 for task `number`, 1 for others.

    It has the shape of `owner`. It is a factor and not a mask, because multiplication is ten times
    as fast on a CPU as comparing and `torch.where`, with the same bits.
    """
    return (owner - number).abs_().clamp_(max=1)


def held_up_to(last: int, state: State, name: str) -> Tensor:
    """Return the frozen values of a parameter where tasks 1 to `last` own it, 0 elsewhere."""
    owner = state[f"owner/{name}"]
    return torch.where((owner > 0) & (owner <= last), state[f"held/{name}"], 0.0)


def trained_owners(state: State, head: str) -> dict[str, int]:
    """Return, for each parameter, the value in `owner` of the entries that the task trains now.

    The value is 0 (no task) until the task has pruned, and for parameters that are never pruned;
    after pruning it is the number of the task.
    """
    number = int(state["done"]) + 1 if bool(state["pruned"]) else 0
    return {
        name: number if prunable(name, owner, head) else 0
        for name, owner in state.group("owner").items()
    }


def prunable(name: str, value: Tensor, head: str) -> bool:
    """Return True if a parameter is pruned: a weight matrix or kernel outside of the head."""
    return value.dim() > 1 and not name.startswith(head)


def weights_kept(free: int, pruned_share: float) -> int:
    """Return the number of a layer's free weights that a task keeps; later tasks get the others."""
    return round((1 - pruned_share) * free)


def largest(weight: Tensor, owner: Tensor, pruned_share: float, number: Tensor) -> Tensor:
    """Return the owner of every weight after a task takes the free weights of largest magnitude.

    The task takes the rounded share 1 - pruned_share of the free weights.

    Args:
        weight: weights of the task's network.
        owner: owners, in the shape of the weights; 0 for none, or a task's number from 1.
        pruned_share: share of the free weights that is left to later tasks.
        number: (), number of the task from 1.
    """
    free = owner == 0
    kept = weights_kept(int(free.sum()), pruned_share)
    places = torch.where(free, weight.abs(), -1.0).flatten().topk(kept).indices
    return owner.flatten().index_fill(0, places, float(number)).view_as(owner)
