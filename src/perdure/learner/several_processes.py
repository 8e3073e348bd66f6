"""Training of one model by several processes: checks, one start, and one checkpoint for all."""

import hmac
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from perdure.contract.strategy import Strategy
from perdure.data.experience import Stream
from perdure.errors import ConfigError, RunError
from perdure.learner.checkpoint import Snapshot
from perdure.privacy.private_sum import MakePrivateSum, PrivateSum
from perdure.privacy.settings import Privacy
from perdure.privacy.shared_private_sum import SharedPrivateSum
from perdure.utils.hashing import JSONValue, canonical_text, digest
from perdure.utils.modules import statistics_of
from perdure.utils.processes import Message, Processes

PRIVATE = "private/"
"""Prefix of the tensors of a snapshot that stay in the folder `private/`."""
OF_THE_KEY = "stream.experiences"
"""Setting that process 0's key changes under privacy; records are compared by another digest."""


class Joining(Protocol):
    """Parts of a learner that several processes have in common, or that process 0 alone has."""

    processes: int
    model: nn.Module
    strategy: Strategy
    privacy: Privacy | None
    folder: Path | None
    callbacks: Sequence[Callable[[str, Any], None]]
    show_progress: bool | None

    @property
    def make_private_sum(self) -> MakePrivateSum:
        """Function that makes the private sum."""

    def restore(self, snapshot: Snapshot) -> None:
        """Restore the state of the run at the time of the snapshot."""


def joined(learner: Joining) -> Processes:
    """Join the group of processes, and give the model the values that it has in process 0.

    In the other processes the learner loses its folder and its callbacks.

    Raises:
        ConfigError: if the training cannot be divided with the same result, or there is no group.
        RunError: if another process ended, or has a model of other shapes.
    """
    count = learner.processes
    model = learner.model
    refuse_coupled(count, model, learner.strategy)
    if learner.privacy and learner.privacy.diagnostics == "raw":
        raise ConfigError.of("processes", count, "1 with diagnostics='raw', which shows one batch")
    if learner.make_private_sum is not PrivateSum:
        raise ConfigError.of("processes", count, "1 with a private sum of your own")
    processes = Processes.join(count)
    start = processes.from_first("model", lambda: Message(tensors=model.state_dict()))
    try:
        model.load_state_dict(dict(start.tensors))
    except RuntimeError as error:
        raise RunError(
            f"process {processes.rank} has another model than process 0 "
            f"({' '.join(str(error).split())}); run the same script in every process"
        ) from None
    if not processes.first:
        learner.folder = None
        learner.callbacks = ()
        learner.show_progress = False
    return processes


def counted_by(processes: Processes | None) -> str:
    """Return the reason why this process has no ledger of its training; "" if it has one."""
    return "" if processes is None or processes.first else "process 0, which has the ledger"


def refuse_coupled(count: int, model: nn.Module, strategy: Strategy) -> None:
    """Refuse a model or loss in which rows depend on other rows or on their place in the batch.

    Raises:
        ConfigError: names the layer or the strategy.
    """
    if strategy.couples_records:
        allowed = f"1 with {strategy.name}, whose loss couples the rows of a batch"
        raise ConfigError.of("processes", count, allowed)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) or statistics_of(layer):
            why = "which couples the rows of a batch; use norm='group' or norm='layer'"
        elif isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p:
            why = "whose random numbers depend on the place of a row; use p=0"
        else:
            continue
        if next(layer.children(), None) is None:
            allowed = f"1 with {type(layer).__name__} in {name or 'the model'}, {why}"
            raise ConfigError.of("processes", count, allowed)


def shared_sum(processes: Processes | None, make: MakePrivateSum) -> MakePrivateSum:
    """Return the function that makes the private sum of this process."""
    return partial(SharedPrivateSum, processes=processes) if processes else make


def refuse_different(processes: Processes, settings: dict[str, JSONValue], stream: Stream) -> None:
    """Add the number of processes to the settings, and refuse other settings or records.

    Two processes with other records would clip the same record twice, once in each of them.

    Args:
        processes: group of the processes.
        settings: fingerprint of the run.
        stream: stream with the training records, of which every row is read.

    Guarantee: the digests that the processes exchange are keyed by a salt that process 0 draws for
        this comparison; they are neither stored nor printed.

    Raises:
        RunError: in every process.
    """
    settings["processes"] = processes.count
    own = {key: each for key, each in settings.items() if key != OF_THE_KEY}
    drawn = processes.from_first("salt", lambda: Message(facts={"salt": secrets.token_hex(32)}))
    salt = bytes.fromhex(drawn.facts["salt"])
    if not processes.agree(_salted_digest(salt, own, stream)):
        raise RunError(
            f"the {processes.count} processes have different settings, models or records; run the "
            "same script in every process, with the same seeds, and with the records in one order"
        )


def _salted_digest(salt: bytes, settings: dict[str, JSONValue], stream: Stream) -> bytes:
    """Return a keyed digest of 32 bytes of the settings, and of all that training can read."""
    total = hmac.new(salt, canonical_text(settings).encode(), "sha256")
    for experience in stream:
        records = experience.train
        facts = [records.partition, records.declared_size, experience.classes, experience.stage]
        shown = {"inputs": records.inputs, "labels": records.labels, "ids": records.ids}
        shown |= {f"attribute {name}": value for name, value in records.attributes.items()}
        if records.weights is not None:
            shown["weights"] = records.weights
        total.update(canonical_text(facts).encode() + digest(shown))
    return total.digest()


def refuse_diverged(processes: Processes | None, model: nn.Module) -> None:
    """Refuse to go on if the processes have different parameters after the same steps.

    Raises:
        RunError: in every process.
    """
    if processes and not processes.agree(digest(model.state_dict())):
        raise RunError(
            f"the parameters of the {processes.count} processes differ; the model, strategy or "
            "optimiser draws random numbers or reads values that differ between processes"
        )


def restore_first(learner: Joining, processes: Processes, own: Snapshot | None) -> Snapshot | None:
    """Restore process 0's checkpoint in every other process, and return it; None if it has none.

    Args:
        learner: learner of this process.
        processes: group of the processes.
        own: checkpoint in the folder of this process, which is restored already.
    """
    snapshot = _snapshot_of_first(processes, own)
    if snapshot and not processes.first:
        learner.restore(snapshot)
    return snapshot


def _snapshot_of_first(processes: Processes, own: Snapshot | None) -> Snapshot | None:
    """Return process 0's checkpoint in every process; None if it has none.

    Args:
        processes: group of the processes.
        own: checkpoint in the folder of this process; None if there is none.
    """

    def told() -> Message:
        if own is None:
            return Message()
        private = {PRIVATE + name: value for name, value in own.private.items()}
        return Message(tensors={**own.tensors, **private}, facts={"facts": own.facts})

    message = processes.from_first("checkpoint", told)
    if "facts" not in message.facts:
        return None
    public = {n: t for n, t in message.tensors.items() if not n.startswith(PRIVATE)}
    private = {
        n.removeprefix(PRIVATE): t for n, t in message.tensors.items() if n.startswith(PRIVATE)
    }
    return Snapshot(tensors=public, private=private, facts=message.facts["facts"])
