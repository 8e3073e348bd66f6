"""Digest of everything except the records that determines a block of steps.

The digest is part of the key of the block's noise. If anything in it changes, a block that runs
again draws other noise and is charged again. Without it, two different sums could be released with
the same noise, and their difference would have no noise.

The digest covers an explicit list of fields (`settings` below) and tensors (`probe_strategy`),
never the `repr` of an object: a new name for a class or a field must not change the noise of a
simulation.
"""

import hashlib
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from perdure.contract.exposure import Exposure
from perdure.contract.forward import Forward
from perdure.contract.plan import MemoryPlan, Plan
from perdure.contract.state import State
from perdure.data.record_transforms import RecordTransform
from perdure.data.records import Batch
from perdure.learner.checkpoint import Snapshot
from perdure.learner.party import Party
from perdure.utils.hashing import JSONValue, canonical, canonical_text, digest, is_plain
from perdure.utils.seeding import generator

VERSION = 1
"""Version of the list of fields; after a change, every simulation draws other noise."""


def noise_digest(
    session: Party,
    snapshot: Snapshot,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    rates: str,
) -> str:
    """Return a SHA-256 that identifies a block of steps, as part of the key of its noise.

    It changes with the settings, with the snapshot, and with the results of model, strategy and
    views on synthetic records, so no noise is used for two different computations.

    Args:
        session: session that has opened the experience of the next steps.
        snapshot: current snapshot of the session and its optimiser.
        optimizer: optimiser that takes the steps.
        scheduler: schedule of its learning rate.
        rates: learning rates of all steps of the experience, as JSON.
    """
    asked = {"version": VERSION, **settings(session, snapshot, optimizer, scheduler)}
    if session.options:  # named only where given, so that other simulations keep their noise
        asked["options"] = canonical(session.options)
    if session.task.loss is not None:  # without one, simulations keep their noise
        asked["loss"] = canonical(session.task.loss)
    if session.views and isinstance(session.views.change, RecordTransform):
        asked["transform"] = canonical(session.views.change.settings)
    texts = {name: canonical_text(value) for name, value in asked.items()}
    # a long run has many rates, so their text is computed only once
    texts["scheduler"] = f"{texts['scheduler'][:-1]},{rates}]"
    text = "{" + ",".join(f'"{name}":{texts[name]}' for name in sorted(texts)) + "}"
    shown = digest({**snapshot.tensors, **probe_strategy(session)})
    return hashlib.sha256(text.encode() + shown).hexdigest()


# --------------------------------------------------------------------------- settings


def settings(
    session: Party,
    snapshot: Snapshot,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
) -> dict[str, JSONValue]:
    """All settings that determine a block of steps, by names that only the digest uses.

    The learning rates of a schedule are left out; `noise_digest` adds them.

    Raises:
        ConfigError: if a field of the strategy or attack cannot be described in JSON.
    """
    facts = snapshot.facts
    position = facts["position"]
    stream = session.stream
    experience = stream[session.position.experience]
    return {
        "strategy": canonical(session.strategy),
        "plan": plan_settings(session.training.of(experience)),
        "exposures": {
            name: exposure_settings(value) for name, value in session.curator.exposures.items()
        },
        "model": [module_settings(path, part) for path, part in session.model.named_modules()],
        "optimizer": [
            type(optimizer).__name__,
            canonical(facts["optimizer"]),
            canonical(facts["groups"]),
            *([canonical(facts["packed"])] if "packed" in facts else []),
        ],
        "scheduler": [
            type(scheduler).__name__,
            canonical(facts["scheduler"]),
        ],
        "adversary": canonical(session.adversary),
        "views": session.views and session.views.count,
        "learner": [
            session.seed,
            session.precision,
            session.micro_batch_size,
            str(session.device),
            torch.__version__,
        ],
        "position": [position["experience"], position["step"], position["begun"]],
        "memory": [facts["memory"]["offered"], facts["memory"]["latest"]],
        "clip norm": facts["clip_norm"],
        "scenario": stream.scenario,
        "classes": [list(experience.classes) for experience in stream],
    }


def plan_settings(plan: Plan) -> JSONValue:
    """All fields of a plan, as JSON."""
    memory = memory_settings(plan.memory) if plan.memory else None
    trainable = canonical(plan.trainable)
    return [plan.pool, memory, plan.restart, trainable, plan.train, plan.applies_penalty]


def memory_settings(plan: MemoryPlan) -> JSONValue:
    """All fields of a memory plan, as JSON."""
    return [plan.capacity, plan.selection, plan.per_class, plan.batch_size, plan.update, plan.use]


def exposure_settings(exposure: Exposure) -> JSONValue:
    """All fields of an exposure, as JSON."""
    return [dict(exposure.scope), exposure.rate, exposure.pool_size, exposure.slots]


def module_settings(path: str, module: nn.Module) -> JSONValue:
    """Path of a module, its class unless it is perdure's own, and its settings in order.

    Values of other kinds (such as a transform) are left out; `probe_strategy` shows their effect.
    """
    kind = type(module).__name__ if not type(module).__module__.startswith("perdure.") else ""
    own = [
        value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training"
    ]
    return [path, kind, [canonical(value) for value in own if is_plain(value)]]


# --------------------------------------------------------------------------- behaviour


def probe_strategy(session: Party) -> dict[str, Tensor]:
    """Results of views, model and strategy on synthetic records.

    They change the digest if code was changed without a change of names or settings.
    """
    batch = session.curator.synthetic(4)
    batch = session.views.attach(batch, 0) if session.views else batch
    session.model.eval()
    forward = Forward(session.model)
    shown = {**batch.stored}
    for role, rows in (("new", batch), ("stored", stored_like(batch, session.seed))):
        losses = session.losses(forward, rows)
        leaves = list(session.trained.values())
        gradients = torch.autograd.grad(
            losses.sum(), leaves, allow_unused=True, materialize_grads=True
        )
        shown |= {f"{role} losses": losses.detach()}
        shown |= {f"{role} gradient {i}": gradient for i, gradient in enumerate(gradients)}
    with torch.no_grad():
        return shown | hooks(session)


def stored_like(batch: Batch, seed: int) -> Batch:
    """Mark synthetic rows as coming from memory, with random stored tensors."""
    rng = generator(seed, "stored beside synthetic rows")
    stored = {
        name: torch.rand(value.shape, generator=rng).to(value)
        if value.is_floating_point()
        else value
        for name, value in batch.stored.items()
    }
    return replace(batch, from_memory=torch.ones_like(batch.from_memory), stored=stored)


def hooks(session: Party) -> dict[str, Tensor]:
    """Results of the strategy's hooks on parameters and on a gradient; empty without hooks."""
    strategy = session.strategy
    state = session.state
    params = {name: value.detach().clone() for name, value in session.trained.items()}
    later = {name: value + 1 for name, value in params.items()}
    whole = {name: value.detach() for name, value in session.params.items()}
    shown: dict[str, Tensor] = {}
    if strategy.uses("begin_round"):
        begun = strategy.begin_round({name: value.clone() for name, value in whole.items()}, state)
        shown |= {f"round {name}": value for name, value in begun.items()}
    if strategy.uses("penalty") and (penalty := strategy.penalty(whole, state)) is not None:
        shown["penalty"] = penalty
    if strategy.uses("add_penalty_gradient"):
        pull = {name: torch.zeros_like(value) for name, value in params.items()}
        strategy.add_penalty_gradient(pull, whole, state)
        shown |= {f"pull {name}": value for name, value in pull.items()}
    if strategy.uses("project"):
        against = {name: -value for name, value in later.items()}
        for references in (
            ((params,), (against, params), (against,)) if strategy.uses("references") else ((),)
        ):
            answer = strategy.project(later, references, state)
            shown |= {f"projected {len(shown)} {name}": value for name, value in answer.items()}
    if strategy.uses("after_step"):
        followed = strategy.after_step(params, later, later, state)
        shown |= {f"after step {name}": value for name, value in followed.items()}
    if strategy.uses("after_step_in_place"):
        own = State({name: value.clone() for name, value in state.items()}, state.rules)
        followed = strategy.after_step_in_place(params, later, later, own)
        shown |= {f"after step in place {name}": value for name, value in followed.items()}
    return shown
