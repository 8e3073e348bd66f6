"""Checkpoints of a run: snapshots with the run's fingerprint and its ledger's head."""

from dataclasses import asdict, replace

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from perdure.errors import LedgerError
from perdure.learner.checkpoint import Snapshot, Store
from perdure.learner.fingerprint import Fingerprint, refuse_other_run
from perdure.learner.folder_claims import DRAWS, HEAD, anchor_of
from perdure.learner.party import Party
from perdure.learner.snapshots import restore_snapshot

RUN = "run"
"""Name of the fingerprint among the facts of a checkpoint."""


def checkpoint_of(snapshot: Snapshot, party: Party, fingerprint: Fingerprint) -> Snapshot:
    """Return a snapshot to write to disk, with the fingerprint and the ledger's head.

    With these two, a folder of another run, or one whose private ledger is missing, is refused.

    Args:
        snapshot: snapshot of the party and its optimiser.
        party: party whose run it is.
        fingerprint: fingerprint of the run.
    """
    facts = {**snapshot.facts, HEAD: None, RUN: fingerprint}
    if party.private_sum:
        facts[HEAD] = asdict(party.private_sum.ledger.chain.head)
        facts[DRAWS] = party.private_sum.draws_head.text()
    return replace(snapshot, facts=facts)


def restore_checkpoint(
    checkpoint: Snapshot,
    party: Party,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    *,
    fingerprint: Fingerprint,
    where: object,
) -> list[list[float]]:
    """Restore a party and its optimiser from a checkpoint of its run; return the accuracies.

    Args:
        checkpoint: checkpoint from the disk.
        party: party to restore.
        optimizer: optimiser to restore.
        scheduler: schedule to restore.
        fingerprint: fingerprint of the run that is asked for now.
        where: folder of the checkpoint, for messages.

    Raises:
        LedgerError: if the ledger does not continue from the head in the checkpoint.
        RunError: if the checkpoint is of a run with other settings; the message names them.
    """
    facts = dict(checkpoint.facts)
    fix = "give these as stored, or another folder"
    refuse_other_run(fingerprint, facts.get(RUN), where=where, fix=fix)
    if party.private_sum is not None:
        anchor = anchor_of(facts)
        if anchor is None:
            raise LedgerError(
                f"the checkpoint in {where} was saved by a run without a privacy "
                "ledger; give another folder"
            )
        party.private_sum.ledger.chain.require(anchor)
    return restore_snapshot(checkpoint, party, optimizer, scheduler, of_the_run=True)


def write_checkpoint(party: Party, checkpoint: Snapshot) -> None:
    """Write the next checkpoint to the party's folder."""
    assert party.folder is not None
    store = Store(party.folder)
    store.save(max([*store.numbers(), 0]) + 1, checkpoint)
