"""What travels and what stays: conversions to Flower's records, combination of states, client state on disk."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy as Aggregator
from torch import Tensor, nn

from perdure.contract.strategy import Rule, State
from perdure.data.records import Params
from perdure.errors import FederationError, StrategyError
from perdure.learner.checkpoint import Store
from perdure.learner.learner import Learner

# --------------------------------------------------------------------------- to and from Flower


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Serialise named tensors, in order, dtypes kept.

    Raises:
        FederationError: for a dtype that numpy does not have.
    """
    for name, value in tensors.items():
        if value.dtype == torch.bfloat16:
            raise FederationError(f"{name} is bfloat16, which Flower cannot carry; keep the model in float32")
    return ArrayRecord({name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def from_record(record: ArrayRecord) -> Params:
    """Undo `to_record`; the tensors are copies."""
    return {name: torch.from_numpy(np.asarray(array.numpy())) for name, array in record.items()}


def shared(model: nn.Module) -> Params:
    """Parameters and floating-point buffers; integer buffers (counters) stay with the client."""
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}


def load_shared(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write what `shared` gave into the model, in its own dtype and on its own device.

    Raises:
        FederationError: when names or shapes are not the model's.
    """
    own = shared(model)
    wrong = sorted(own.keys() ^ tensors.keys()) or [n for n, t in own.items() if t.shape != tensors[n].shape]
    if wrong:
        raise FederationError(
            f"{', '.join(wrong[:3])}: name or shape is not the model's; build it alike on all parties"
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])


# --------------------------------------------------------------------------- strategy state over clients


def sent(state: State) -> State:
    """The part of a state that travels: all but what is declared `local`."""
    rules: dict[str, Rule] = {name: rule for name, rule in state.rules.items() if rule != "local"}
    return State({name: state[name] for name in rules}, rules)


def combine(old: State | None, states: Sequence[State], weights: Sequence[float]) -> State:
    """One state of the states of all clients, by each name's rule; `local` names are left out.

        sum:  old + sum_k (state_k - old)          mean:  sum_k w_k state_k / sum_k w_k

    With one holder its tensor is taken as it is, to the bit.

    Args:
        old: what the clients started from; None for zero. states: one a client, in a fixed order.
        weights: declared sizes.

    Raises:
        StrategyError: for a `mean` of integers.
    """
    parts = [sent(state) for state in states]
    rules = parts[0].rules
    tensors = {}
    for name, rule in rules.items():
        values = [part[name] for part in parts]
        before = torch.zeros_like(values[0]) if old is None else old[name]
        tensors[name] = values[0] if len(values) == 1 else RULES[rule](before, values, weights, name)
    return State(tensors, rules)


def _sum(before: Tensor, values: Sequence[Tensor], weights: Sequence[float], name: str) -> Tensor:
    wide = torch.float64 if before.is_floating_point() else before.dtype
    start = before.to(values[0].device, wide)  # clients answer on the CPU, the server may stand on a GPU
    return (start + sum(value.to(wide) - start for value in values)).to(before.dtype)


def _mean(before: Tensor, values: Sequence[Tensor], weights: Sequence[float], name: str) -> Tensor:
    if not before.is_floating_point():
        raise StrategyError(f"state {name!r} is {before.dtype}, which has no mean; declare it as sum or local")
    total = sum(weights)
    terms = [weight / total * value.double() for weight, value in zip(weights, values, strict=True)]
    return torch.stack(terms).sum(0).to(before.dtype)


RULES = {"sum": _sum, "mean": _mean}


# --------------------------------------------------------------------------- what a Flower aggregator remembers


def recall(aggregator: Aggregator) -> tuple[Params, dict[str, str]]:
    """Arrays that the aggregator keeps between rounds (FedAdam's moments, say) and the container of each attribute."""
    tensors: Params = {}
    kinds: dict[str, str] = {}
    for name, value in vars(aggregator).items():
        kind = _kind(value)
        if kind:
            kinds[name] = kind
            tensors |= {f"{name}.{key}": torch.tensor(np.asarray(array)) for key, array in _entries(value)}
    return tensors, kinds


def remind(aggregator: Aggregator, tensors: Mapping[str, Tensor], kinds: Mapping[str, str]) -> None:
    """Undo `recall`."""
    for name, kind in kinds.items():
        own = {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")}
        arrays = {key: value.numpy() for key, value in own.items()}
        in_order = [arrays[str(i)] for i in range(len(arrays))] if kind == "list" else arrays
        setattr(aggregator, name, to_record(own) if kind == "record" else in_order)


def _kind(value: object) -> str | None:
    if isinstance(value, ArrayRecord):
        return "record"
    kinds = {"dict": isinstance(value, dict) and value.values(), "list": isinstance(value, list) and value}
    full = [kind for kind, arrays in kinds.items() if arrays]
    return full[0] if full and all(isinstance(a, np.ndarray | np.generic) for a in kinds[full[0]] or ()) else None


def _entries(value: ArrayRecord | dict[str, np.ndarray] | list[np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(value, list):
        yield from ((str(i), array) for i, array in enumerate(value))
    elif isinstance(value, ArrayRecord):
        yield from ((key, array.numpy()) for key, array in value.items())
    else:
        yield from value.items()


# --------------------------------------------------------------------------- client state between exchanges


FRESH = -1
"""The exchange before the first: a client that nothing was sent to yet."""


@dataclass
class Seat:
    """A client's learner, the exchange whose end it stands at, and the number of its last checkpoint."""

    learner: Learner
    exchange: int = FRESH
    saved: int = 0


def client_folder(folder: Path, client: int) -> Path:
    """Where a client keeps checkpoints, ledger and keys."""
    return folder / "clients" / f"{client:03d}"


def save(seat: Seat, exchange: int) -> None:
    """Write the learner as it stands after `exchange`, when it has a folder.

    Checkpoints are numbered by how many there are, not by exchange: the one before the last must survive however
    many exchanges a client was not part of.
    """
    seat.exchange, seat.saved = exchange, seat.saved + 1
    learner = seat.learner
    if learner.folder:
        _tell(learner, "checkpoint.begin")
        snapshot = learner.snapshot()
        facts = {**snapshot.facts, "exchange": exchange}
        Store(learner.folder).save(seat.saved, replace(snapshot, facts=facts))
        _tell(learner, "checkpoint.end")


def restore(learner: Learner, exchange: int) -> Seat:
    """Bring a prepared learner to where it stood after `exchange`.

    Raises:
        FederationError: when that state is not kept (any more).
    """
    if exchange == FRESH:
        return Seat(learner)
    store = Store(learner.folder) if learner.folder else None
    held: dict[int, int] = {}
    for number in reversed(store.numbers()) if store else ():
        snapshot = store.load(number) if store else None
        assert snapshot is not None
        held[number] = int(snapshot.facts["exchange"])
        if held[number] == exchange:
            learner.restore(snapshot)
            return Seat(learner, exchange, number)
    kept = f"{learner.folder} holds {sorted(held.values()) or 'none'}" if store else "it has no folder"
    raise FederationError(
        f"no state after exchange {exchange} is kept ({kept}); give the client the folder of this run, "
        "or start the run afresh"
    )


def _tell(learner: Learner, point: str) -> None:
    for callback in learner.callbacks:
        callback(point, learner)
