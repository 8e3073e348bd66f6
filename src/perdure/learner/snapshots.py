"""Functions that copy, and restore, everything that is needed to continue a run."""

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from perdure.learner.checkpoint import (
    Position,
    Snapshot,
    flatten_optimizer,
    load_optimizer,
    numbered,
)
from perdure.learner.party import Party


def take_snapshot(
    session: Party,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    matrix: list[list[float]],
    *,
    copy: bool = True,
) -> Snapshot:
    """Copy everything that is needed to continue a run; private memory rows are separate.

    Args:
        session: session to copy.
        optimizer: optimiser to copy.
        scheduler: schedule to copy.
        matrix: accuracies so far.
        copy: False to return the tensors without copies; read them before the run continues.
    """
    moments, facts = flatten_optimizer(optimizer)
    live = {f"model.{n}": t for n, t in session.model.state_dict().items()}
    live |= {f"state.{n}": t for n, t in session.state.items()}
    live |= {f"average.{n}": t for n, t in session.average.values.items()}
    live |= {f"released.{n}": t for n, t in session.moves.last.items()}
    live |= moments
    tensors = {name: value.detach() for name, value in live.items()}
    if copy:
        tensors = {name: value.clone() for name, value in tensors.items()}
    private, memory = session.held.snapshot()
    facts |= {
        "position": vars(session.position),
        "matrix": matrix,
        "memory": memory,
        "scheduler": scheduler.state_dict() if scheduler else None,
        "clip_norm": session.private_sum.clip_norm if session.private_sum else None,
    }
    if session.average.count:
        facts["averaged"] = session.average.count
    return Snapshot(tensors=tensors, private=private, facts=facts)


def restore_snapshot(
    snapshot: Snapshot,
    session: Party,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    *,
    of_the_run: bool = False,
) -> list[list[float]]:
    """Restore a session and its optimiser from a snapshot; return the accuracies so far.

    Args:
        snapshot: snapshot to restore.
        session: session to change.
        optimizer: optimiser to change.
        scheduler: schedule to change.
        of_the_run: True if the snapshot is a checkpoint of the session's own run, whose ledger has
            the cost of its weights.
    """
    session.model.load_state_dict(_under("model.", snapshot.tensors))
    if of_the_run:
        session.mark.weights_replaced()
    session.mark_model(learnt=True)
    states = _under("state.", snapshot.tensors)
    moved = {name: value.to(session.device) for name, value in states.items()}
    session.state = session.state.replace(moved)
    facts = snapshot.facts
    averages = {n: t.to(session.device) for n, t in _under("average.", snapshot.tensors).items()}
    session.average.restore(averages, facts.get("averaged", 0))
    released = _under("released.", snapshot.tensors)
    session.moves.last = {n: t.to(session.device) for n, t in released.items()}
    session.position = Position(**facts["position"])
    session.held.restore(snapshot.private, facts["memory"], session.device)
    if session.private_sum:
        session.private_sum.clip_norm = facts["clip_norm"]
    last = len(session.stream) - 1
    experience = session.stream[min(session.position.experience, last)]
    session.select(session.training.of(experience))
    load_optimizer(optimizer, snapshot.tensors, facts)
    if scheduler and facts["scheduler"]:
        scheduler.load_state_dict(numbered(facts["scheduler"]))
    return [list(row) for row in facts["matrix"]]


def _under(prefix: str, tensors: Any) -> dict[str, Any]:
    """Entries whose name begins with a prefix, by the rest of the name."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
