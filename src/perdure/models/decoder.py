"""A small decoder-only transformer: each token attends to itself and to the tokens before it.

    z_0 = E tokens + positions
    z  <- z + attention(norm(z)),    z <- z + mlp(norm(z))          depth times
    features = norm(z)

Attention consists of plain linear layers for query, key, value and output, as in
`perdure.models.vision_transformer`, so `low_rank(model, modules=("query", "value"))` can add
adapters. There is no randomness in the forward pass.

Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019, section 2.3.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from perdure.errors import ConfigError
from perdure.models.classifier import Classifier
from perdure.models.sequences import check_sizes, check_tokens, last_of
from perdure.models.vision_transformer import EPSILON, POSITION_SCALE, Attention, Block
from perdure.utils.seeding import seeded


class CausalAttention(Attention):
    """Self-attention in which a token does not attend to later tokens."""

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Return (n, heads, T, T) scaled inner products, minus infinity for later tokens."""
        length = query.shape[-2]
        later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        return super().scores(query, key).masked_fill(later, -torch.inf)


class CausalBlock(Block):
    """Transformer block with causal attention."""

    attention_type: ClassVar[type[Attention]] = CausalAttention


class Decoder(nn.Module):
    """Decoder body from tokens (n, L) to features (n, width), or (n, L, width).

    Args:
        length: largest number of tokens of a sequence.
        vocabulary: number of different tokens.
        width: length of a token's vector.
        depth: number of blocks.
        heads: number of heads of each attention.
        padding: token id after the end of a sequence; None for no padding.
        every_position: return features of every position, (n, L, width).
    """

    def __init__(
        self,
        *,
        length: int,
        vocabulary: int,
        width: int,
        depth: int,
        heads: int,
        padding: int | None,
        every_position: bool,
    ) -> None:
        super().__init__()
        self.padding = padding
        self.every_position = every_position
        self.tokens = nn.Embedding(vocabulary, width, padding_idx=padding)
        self.positions = nn.Embedding(length, width)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=POSITION_SCALE)
        self.blocks = nn.ModuleList(CausalBlock(width, heads, 4 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Feature vectors (n, width) of tokens (n, L), or (n, L, width) with `every_position`."""
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        states = self.tokens(x) + self.positions(places)
        for block in self.blocks:
            states = block(states)
        states = self.norm(states)
        return states if self.every_position else last_of(states, x, self.padding)


def decoder(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    seed: int,
    vocabulary: int,
    padding: int | None = None,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    every_position: bool = False,
) -> Classifier:
    """Make a decoder-only transformer with a linear head; parameters depend on `seed` only.

        # next tokens: outputs (n, L, vocabulary)
        decoder(input_shape=(64,), vocabulary=65, num_classes=65, every_position=True, seed=0)

    Args:
        input_shape: (length,), the largest number of tokens of a sequence.
        num_classes: full width of the head.
        seed: seed of the initial parameters.
        vocabulary: number of tokens.
        padding: token id that fills sequences at their end; None for no padding.
        width: length of a token's vector.
        depth: number of blocks.
        heads: number of attention heads; a divisor of `width`.
        every_position: one output per position instead of one per sequence.

    Raises:
        ConfigError: if an argument is not allowed; the message names it.

    >>> model = decoder(input_shape=(8,), vocabulary=9, num_classes=2, seed=0)
    >>> model(torch.zeros(3, 8, dtype=torch.int64)).shape
    torch.Size([3, 2])
    """
    check_sizes(
        num_classes=num_classes, vocabulary=vocabulary, width=width, depth=depth, heads=heads
    )
    shape = tuple(input_shape)
    check_tokens(shape, vocabulary, padding)
    if width % heads:
        raise ConfigError.of("heads", heads, f"divisors of the width {width}")
    with seeded(seed):
        body = Decoder(
            length=shape[0],
            vocabulary=vocabulary,
            width=width,
            depth=depth,
            heads=heads,
            padding=padding,
            every_position=every_position,
        )
        return Classifier(body, width, num_classes)
