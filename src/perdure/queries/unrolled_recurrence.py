"""Recurrent layers computed step by step, so that they run on each record alone.

torch's `nn.GRU`, `nn.LSTM` and `nn.RNN` are single fused operations, for which `torch.func.vmap`
has no rule. Written as linear layers they compute the same, up to rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

State = tuple[Tensor, ...]
"""State of a recurrent layer: (hidden,), or (hidden, cell) for an LSTM; each (n, width)."""
Cell = Callable[[Tensor, State, Sequence[Tensor]], State]
"""Function from the gates of the input, the state and recurrent weights to the next state."""


@contextmanager
def unrolled_recurrence(module: nn.Module) -> Iterator[None]:
    """Context manager in which recurrent layers are computed step by step.

    Args:
        module: the model; without such layers nothing changes.
    """
    if not any(isinstance(part, nn.RNNBase) for part in module.modules()):
        yield
        return
    # cuDNN would move the weights into one block, which is impossible under functional calls
    with torch.backends.cudnn.flags(enabled=False), _Unrolled():
        yield


class _Unrolled(TorchFunctionMode):
    """Torch function mode that runs recurrent layers step by step, except packed sequences."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        cell = CELLS.get(getattr(func, "__name__", ""))
        # for a packed sequence, the lengths are in the place of the state, and the state follows
        if cell is None or not isinstance(args[3], bool):
            return func(*args, **(kwargs or {}))
        return _recurrent(cell, *args)


def _recurrent(
    cell: Cell,
    inputs: Tensor,
    start: Tensor | tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Outputs and last states of a recurrent layer, in the order of torch's operation."""
    x = inputs.transpose(0, 1) if batch_first else inputs
    starts = (start,) if isinstance(start, Tensor) else tuple(start)
    directions = 2 if bidirectional else 1
    size = len(weights) // (layers * directions)
    ends: list[State] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            own = weights[place * size : (place + 1) * size]
            steps = x.flip(0) if direction else x
            state = tuple(each[place] for each in starts)
            found, end = _run(cell, steps, state, own, has_biases)
            outputs.append(found.flip(0) if direction else found)
            ends.append(end)
        x = torch.cat(outputs, -1)
        if dropout and train and layer < layers - 1:
            x = F.dropout(x, dropout)
    last = tuple(torch.stack(each) for each in zip(*ends, strict=True))
    return (x.transpose(0, 1) if batch_first else x, *last)


def _run(
    cell: Cell, steps: Tensor, state: State, own: Sequence[Tensor], has_biases: bool
) -> tuple[Tensor, State]:
    """Hidden states (length, n, width) of one direction of one layer, and its last state."""
    gates = F.linear(steps, own[0], own[2] if has_biases else None)
    recurrent = [own[1], own[3]] if has_biases else [own[1]]
    projection = own[-1] if len(own) == (5 if has_biases else 3) else None
    hidden = []
    for gate in gates.unbind(0):
        state = cell(gate, state, recurrent)
        if projection is not None:
            state = (F.linear(state[0], projection), *state[1:])
        hidden.append(state[0])
    return torch.stack(hidden), state


def _gru(gates: Tensor, state: State, recurrent: Sequence[Tensor]) -> State:
    reset, update, new = gates.chunk(3, -1)
    own_reset, own_update, own_new = F.linear(state[0], *recurrent).chunk(3, -1)
    z = torch.sigmoid(update + own_update)
    candidate = torch.tanh(new + torch.sigmoid(reset + own_reset) * own_new)
    return ((1 - z) * candidate + z * state[0],)


def _lstm(gates: Tensor, state: State, recurrent: Sequence[Tensor]) -> State:
    enter, forget, new, leave = (gates + F.linear(state[0], *recurrent)).chunk(4, -1)
    cell = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(leave) * torch.tanh(cell), cell


def _rnn_tanh(gates: Tensor, state: State, recurrent: Sequence[Tensor]) -> State:
    return (torch.tanh(gates + F.linear(state[0], *recurrent)),)


def _rnn_relu(gates: Tensor, state: State, recurrent: Sequence[Tensor]) -> State:
    return (torch.relu(gates + F.linear(state[0], *recurrent)),)


CELLS: dict[str, Cell] = {
    "gru": _gru,
    "lstm": _lstm,
    "rnn_tanh": _rnn_tanh,
    "rnn_relu": _rnn_relu,
}
"""Name of each fused operation of torch to the function for one of its time steps."""
