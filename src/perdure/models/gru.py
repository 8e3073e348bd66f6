"""Gated recurrent units, built from linear layers.

    r = sigmoid(W_r x_t + U_r h_{t-1}),      z = sigmoid(W_z x_t + U_z h_{t-1})
    n = tanh(W_n x_t + r (U_n h_{t-1})),     h_t = (1 - z) n + z h_{t-1}            all with biases

`torch.nn.GRU` computes the same in fused steps; see `perdure.models.lstm` for the difference.

Source: Cho et al., Learning Phrase Representations using RNN Encoder-Decoder for Statistical
Machine Translation, EMNLP 2014; the reset gate as in torch.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perdure.models.classifier import Classifier
from perdure.models.sequences import recurrent


class GRULayer(nn.Module):
    """One layer of a GRU.

    The sub-modules `inputs` and `state` have the weights of `torch.nn.GRU`, in its gate order.

    Args:
        ins: length of an input vector.
        hidden: length of the state.
    """

    def __init__(self, ins: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.inputs = nn.Linear(ins, 3 * hidden)
        self.state = nn.Linear(hidden, 3 * hidden)
        for value in self.parameters():
            nn.init.uniform_(value, -1 / math.sqrt(hidden), 1 / math.sqrt(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the states (n, L, hidden) of inputs (n, L, ins)."""
        entered = self.inputs(x)
        state = entered.new_zeros(x.shape[0], self.hidden)
        states = []
        for now in entered.unbind(1):
            reset, update, new = now.chunk(3, 1)
            of_reset, of_update, of_new = self.state(state).chunk(3, 1)
            candidate = torch.tanh(new + torch.sigmoid(reset + of_reset) * of_new)
            kept = torch.sigmoid(update + of_update)
            state = (1 - kept) * candidate + kept * state
            states.append(state)
        return torch.stack(states, 1)


def gru(
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
    """Make a GRU classifier with a linear head; parameters depend on `seed` only.

    Args:
        input_shape: shape of one input, (length,) for tokens or (length, features).
        num_classes: full width of the head.
        seed: seed of the initial parameters.
        vocabulary: number of different tokens; None if inputs are vectors of features.
        padding: token id that fills sequences at their end; None for no padding.
        embedding: length of a token's vector.
        hidden: length of the state.
        layers: number of layers.
        every_position: one output per position instead of one per sequence.
    """
    return recurrent(
        GRULayer,
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
