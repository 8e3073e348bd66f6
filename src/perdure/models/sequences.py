"""Common parts of sequence models: token embeddings, recurrent bodies, the last position."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from perdure.errors import ConfigError
from perdure.models.classifier import Classifier
from perdure.utils.seeding import seeded


class RecurrentBody(nn.Module):
    """Recurrent layers over sequences of tokens, or of feature vectors.

    Args:
        layers: layers, each from (n, L, ins) to (n, L, hidden).
        embedding: embedding from tokens (n, L) to vectors (n, L, ins); None if inputs are vectors.
        padding: token id after the end of a sequence; None for no padding.
        every_position: return (n, L, hidden) instead of the state at the last token.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        embedding: nn.Embedding | None,
        padding: int | None,
        every_position: bool,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers = nn.ModuleList(layers)
        self.padding = padding
        self.every_position = every_position

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, hidden) of tokens (n, L) or vectors (n, L, ins); or (n, L, hidden)."""
        states = x if self.embedding is None else self.embedding(x)
        for layer in self.layers:
            states = layer(states)
        return states if self.every_position else last_of(states, x, self.padding)


def last_of(states: Tensor, x: Tensor, padding: int | None) -> Tensor:
    """States (n, f) at the last token of each sequence, from states (n, L, f) of all positions.

    Args:
        states: (n, L, f) states of all positions.
        x: tokens (n, L), or vectors without padding.
        padding: token id after the end of a sequence; None for no padding.
    """
    if padding is None:
        return states[:, -1]
    last = (x != padding).sum(1).sub(1).clamp(min=0)
    return states.gather(1, last[:, None, None].expand(-1, 1, states.shape[2])).squeeze(1)


def recurrent(
    layer: Callable[[int, int], nn.Module],
    *,
    input_shape: Sequence[int],
    num_classes: int,
    seed: int,
    vocabulary: int | None,
    padding: int | None,
    embedding: int,
    hidden: int,
    layers: int,
    every_position: bool,
) -> Classifier:
    """Make a recurrent classifier from one kind of layer, for `lstm` and `gru`.

    Args:
        layer: function that makes a layer, from the lengths of its inputs and of its state.
        input_shape: shape of one input, (length,) for tokens or (length, features).
        num_classes: full width of the head.
        seed: seed of the initial parameters.
        vocabulary: number of different tokens; None if inputs are vectors of features.
        padding: token id that fills sequences at their end; None for no padding.
        embedding: length of a token's vector.
        hidden: length of the state.
        layers: number of layers.
        every_position: one output per position instead of one per sequence.

    Raises:
        ConfigError: if an argument is not allowed; the message names it.
    """
    check_sizes(num_classes=num_classes, embedding=embedding, hidden=hidden, layers=layers)
    shape = tuple(input_shape)
    check_tokens(shape, vocabulary, padding)
    with seeded(seed):
        table = None
        width = shape[-1]
        if vocabulary is not None:
            table = nn.Embedding(vocabulary, embedding, padding_idx=padding)
            width = embedding
        sizes = (width, *[hidden] * (layers - 1))
        body = RecurrentBody(
            [layer(ins, hidden) for ins in sizes],
            embedding=table,
            padding=padding,
            every_position=every_position,
        )
        return Classifier(body, hidden, num_classes)


def check_sizes(**sizes: int) -> None:
    """Refuse sizes that are not whole numbers, 1 or more.

    Raises:
        ConfigError: names the first such size.
    """
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError.of(name, value, "whole numbers from 1")


def check_tokens(shape: tuple[int, ...], vocabulary: int | None, padding: int | None) -> None:
    """Refuse input shapes and padding that contradict the vocabulary.

    Args:
        shape: shape of one input.
        vocabulary: number of tokens; None if inputs are vectors.
        padding: token id that fills sequences; None for no padding.

    Raises:
        ConfigError: if an argument is not allowed; the message names it.
    """
    if vocabulary is None:
        if len(shape) != 2:
            raise ConfigError.of(
                "input_shape", shape, "(length, features), or (length,) with vocabulary=TOKENS"
            )
        if padding is not None:
            raise ConfigError.of("padding", padding, "None if inputs are vectors")
        return
    check_sizes(vocabulary=vocabulary)
    if len(shape) != 1:
        raise ConfigError.of("input_shape", shape, "(length,) for tokens")
    if padding is not None and not 0 <= padding < vocabulary:
        raise ConfigError.of("padding", padding, f"a token id, 0 .. {vocabulary - 1}, or None")
