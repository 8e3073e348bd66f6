"""Long short-term memory, built from linear layers.

    i, f, g, o = W x_t + b + U h_{t-1} + c      in four equal parts
    c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g),        h_t = sigmoid(o) tanh(c_t)

`torch.nn.LSTM` computes the same in fused steps, which have no per-record gradients and not always
second derivatives; these layers support all strategies and private clipping.

Source: Hochreiter and Schmidhuber, Long Short-Term Memory, Neural Computation 1997; gates as in
torch.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perdure.models.classifier import Classifier
from perdure.models.sequences import recurrent


class LSTMLayer(nn.Module):
    """One layer of an LSTM.

    The sub-modules `inputs` and `state` have the weights of `torch.nn.LSTM`, in its gate order.

    Args:
        ins: length of an input vector.
        hidden: length of the state.
    """

    def __init__(self, ins: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.inputs = nn.Linear(ins, 4 * hidden)
        self.state = nn.Linear(hidden, 4 * hidden)
        for value in self.parameters():
            nn.init.uniform_(value, -1 / math.sqrt(hidden), 1 / math.sqrt(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the states (n, L, hidden) of inputs (n, L, ins)."""
        entered = self.inputs(x)
        state = entered.new_zeros(x.shape[0], self.hidden)
        cell = state
        states = []
        for now in entered.unbind(1):
            i, f, g, o = (now + self.state(state)).chunk(4, 1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            state = torch.sigmoid(o) * torch.tanh(cell)
            states.append(state)
        return torch.stack(states, 1)


def lstm(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    seed: int,
    vocabulary: int | None = None,
    padding: int | None = None,
    embedding: int = 32,
    hidden: int = 64,
    layers: int = 1,
    every_position: bool = False,
) -> Classifier:
    """Make an LSTM classifier with a linear head; parameters depend on `seed` only.

        lstm(input_shape=(80,), vocabulary=1000, padding=0, num_classes=2, seed=0)
        # next tokens: outputs (n, L, vocabulary)
        lstm(input_shape=(80,), vocabulary=100, num_classes=100, every_position=True, seed=0)

    Args:
        input_shape: shape of one input, (length,) for tokens or (length, features).
        num_classes: full width of the head.
        seed: seed of the initial parameters.
        vocabulary: number of different tokens; None if inputs are vectors of features.
        padding: token id that fills sequences at their end; the prediction then uses the state at
            the last token before the padding. None for sequences of one length.
        embedding: length of a token's vector.
        hidden: length of the state.
        layers: number of layers.
        every_position: one output per position, (n, L, num_classes), for next-token prediction,
            instead of one per sequence.

    Raises:
        ConfigError: if an argument is not allowed; the message names it.

    >>> lstm(input_shape=(7, 3), num_classes=2, seed=0)(torch.zeros(5, 7, 3)).shape
    torch.Size([5, 2])
    """
    return recurrent(
        LSTMLayer,
        input_shape=input_shape,
        num_classes=num_classes,
        seed=seed,
        vocabulary=vocabulary,
        padding=padding,
        embedding=embedding,
        hidden=hidden,
        layers=layers,
        every_position=every_position,
    )
