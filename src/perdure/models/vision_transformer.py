"""Vision transformer that can be trained, or frozen with prompts or adapters.

Prompts and adapters are added to the attention of its blocks.

    z_0 = [class token; E patch_1; ...; E patch_T] + positions
    z  <- z + attention(norm(z)),    z <- z + mlp(norm(z))          depth times
    features = norm(z)_0                                            the last state of the class
    token

Attention consists of plain linear layers for query, key, value and output. The class token is row 0
of the table of positions, because a separate parameter would be redundant. So every parameter
belongs to a layer for which book-keeping can compute per-record gradients. There is no randomness
in the forward pass, and the tokens of a record do not interact with those of other records.

Source: Dosovitskiy et al., An image is worth 16 x 16 words, ICLR 2021, section 3.1.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.errors import ConfigError
from perdure.models.classifier import Classifier
from perdure.models.frozen import without_parameters
from perdure.utils.seeding import seeded

EPSILON = 1e-6
"""Epsilon of the normalisation layers, as used for the weights of timm and torchvision."""
POSITION_SCALE = 0.02
"""Initial standard deviation of positions, class token and prompts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Addition:
    """Changes of the attention of one transformer block: added tensors, and prefixes.

    Args:
        query: function from (n, T, width) to (n, T, width), whose result is added to the query of
            the same input; None for nothing.
        value: function from (n, T, width) to (n, T, width), whose result is added to the value of
            the same input; None for nothing.
        keys: (n, L, width) keys that are put before those of the tokens (prefix tuning); None for
            none.
        values: (n, L, width) values that are put before those of the tokens; None for none.
    """

    query: Callable[[Tensor], Tensor] | None = None
    value: Callable[[Tensor], Tensor] | None = None
    keys: Tensor | None = None
    values: Tensor | None = None


NOTHING = Addition()


class Attention(nn.Module):
    """Multi-head self-attention.

    softmax(Q K^T / sqrt(width / heads)) V in every head, then one linear layer.

    Args:
        width: length of a token's vector.
        heads: number of heads, each with an equal part of the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, addition: Addition = NOTHING) -> Tensor:
        """Compute attention outputs (n, T, width) of tokens (n, T, width)."""
        query = self.query(x)
        key = self.key(x)
        value = self.value(x)
        query = query if addition.query is None else query + addition.query(x)
        value = value if addition.value is None else value + addition.value(x)
        if addition.keys is not None and addition.values is not None:
            key = torch.cat([addition.keys, key], 1)
            value = torch.cat([addition.values, value], 1)
        q, k, v = (self._split(part) for part in (query, key, value))
        weights = torch.softmax(self.scores(q, k), dim=-1)
        together: Tensor = self.output((weights @ v).transpose(1, 2).flatten(2))
        return together

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Return (n, heads, T, S) scaled inner products of queries (n, heads, T, f) and S keys."""
        return query @ key.mT / math.sqrt(query.shape[-1])

    def _split(self, x: Tensor) -> Tensor:
        """Reshape (n, T, width) to (n, heads, T, width / heads)."""
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)


class Block(nn.Module):
    """Transformer block: attention and a two-layer perceptron, each with a residual connection.

    Both use normalised tokens.

    Args:
        width: length of a token's vector.
        heads: number of heads of the attention.
        hidden: number of hidden units of the perceptron.
    """

    attention_type: ClassVar[type[Attention]] = Attention

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=EPSILON) for _ in range(2))
        self.attention = self.attention_type(width, heads)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Tensor, addition: Addition = NOTHING) -> Tensor:
        """Compute tokens (n, T, width) after the block, from tokens (n, T, width)."""
        x = x + self.attention(self.norm1(x), addition)
        inner: Tensor = self.contract(F.gelu(self.expand(self.norm2(x))))
        return x + inner


class Transformer(nn.Module):
    """Vision transformer as a body (n, ...) -> (n, width).

    The features are the last state of the class token. The weights are stored by
    `safetensors.torch.save_file(body.state_dict(), path)` and read by
    `body.load_state_dict(safetensors.torch.load_file(path))`; `from_timm` reads weights of timm.

    Args:
        input_shape: (channels, height, width), cut into squares, or (features,), cut into runs.
        patch: side of a square, or length of a run.
        width: length of a token.
        depth: number of blocks.
        heads: number of heads of each attention.
        hidden: number of hidden units of each block's perceptron; None for 4 times the width.

    Raises:
        ConfigError: if an argument is not allowed.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        patch: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        _check(tuple(input_shape), patch, width, depth, heads)
        sides = tuple(input_shape)[-2:]
        numbers = patch ** len(sides) * (input_shape[0] if len(input_shape) == 3 else 1)
        self.patch = patch
        self.width = width
        self.embed = nn.Linear(numbers, width)
        self.positions = nn.Embedding(1 + math.prod(side // patch for side in sides), width)
        nn.init.normal_(self.positions.weight, std=POSITION_SCALE)
        self.blocks = nn.ModuleList(Block(width, heads, hidden or 4 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Feature vectors (n, width) of inputs (n, ...)."""
        return self.encode(self.tokens(x))[:, 0]

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens (n, 1 + T, width) of inputs: the class token and the patches, with positions."""
        places = torch.arange(self.positions.num_embeddings, device=x.device).expand(x.shape[0], -1)
        positions: Tensor = self.positions(places)
        return torch.cat(
            [positions[:, :1], positions[:, 1:] + self.embed(patches(x, self.patch))], 1
        )

    def encode(self, tokens: Tensor, additions: Sequence[Addition] = ()) -> Tensor:
        """Run tokens (n, T, width) through all blocks and the last normalisation.

        Args:
            additions: additions to the attention of the first blocks, one per block.
        """
        for number, block in enumerate(self.blocks):
            tokens = block(tokens, additions[number] if number < len(additions) else NOTHING)
        normal: Tensor = self.norm(tokens)
        return normal


def patches(x: Tensor, patch: int) -> Tensor:
    """Cut inputs into patches (n, T, numbers), row by row, each with its channels in turn.

    Args:
        x: (n, channels, height, width) or (n, features).
        patch: side of a square patch, or length of a run of features.
    """
    if x.dim() == 2:
        return x.reshape(x.shape[0], -1, patch)
    n, channels, height, width = x.shape
    squares = x.reshape(n, channels, height // patch, patch, width // patch, patch)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, channels * patch * patch)


def transformer(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    seed: int,
    patch: int = 4,
    width: int = 64,
    depth: int = 4,
    heads: int = 4,
    hidden: int | None = None,
) -> Classifier:
    """Make a transformer with a linear head; parameters depend on `seed` only.

    Args:
        input_shape: shape of one image, (channels, height, width).
        num_classes: full width of the head.
        seed: seed of the initial parameters.
        patch: side of a patch in pixels; it divides height and width.
        width: length of a token.
        depth: number of blocks.
        heads: number of attention heads; a divisor of `width`.
        hidden: number of hidden units of each block's perceptron; None for 4 times the width.

    Raises:
        ConfigError: if an argument is not allowed.

    >>> transformer(input_shape=(1, 8, 8), num_classes=10, seed=0).feature_size
    64
    """
    if num_classes < 1:
        raise ConfigError.of("num_classes", num_classes, "whole numbers from 1")
    with seeded(seed):
        body = Transformer(
            input_shape=input_shape,
            patch=patch,
            width=width,
            depth=depth,
            heads=heads,
            hidden=hidden,
        )
        return Classifier(body, width, num_classes)


def tiny(input_shape: Sequence[int]) -> Transformer:
    """Make a small transformer for checks: one block, tokens of 16 numbers, fixed weights.

    Patches are as large as possible.
    """
    patch = math.gcd(*input_shape[-2:])
    body = transformer(
        input_shape=input_shape, num_classes=1, seed=0, patch=patch, width=16, depth=1, heads=2
    ).body
    assert isinstance(body, Transformer)
    return body


def fixed(backbone: nn.Module) -> Transformer:
    """Copy a backbone without trainable, stored or sent parameters.

    Its parameters become buffers, as in `perdure.models.frozen`.

    Raises:
        ConfigError: if the backbone is not a `Transformer`, which prompts and adapters need.
    """
    if not isinstance(backbone, Transformer):
        allowed = (
            "a perdure.models.vision_transformer.Transformer, such as model.body of "
            "transformer(...) or from_timm(...)"
        )
        raise ConfigError.of("backbone", type(backbone).__name__, allowed)
    copied = without_parameters(copy.deepcopy(backbone))
    assert isinstance(copied, Transformer)
    return copied


_OF_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output": "attn.proj",
    "expand": "mlp.fc1",
    "contract": "mlp.fc2",
}


def from_timm(weights: Path | str | Mapping[str, Tensor], *, heads: int) -> Transformer:
    """Make a transformer from weights of a `vit_*` model of timm.

        backbone = from_timm("vit_base_patch16_224.safetensors", heads=12)

    The weights of a head are not used.

    Args:
        weights: file of safetensors, or tensors by name, with the names and shapes of timm.
        heads: number of heads of each attention; the weights do not contain it.

    Raises:
        ConfigError: if the file cannot be read, or the weights have another architecture.
    """
    given = dict(weights) if isinstance(weights, Mapping) else _read(Path(weights))
    given = {name: value for name, value in given.items() if not name.startswith("head.")}
    try:
        named, used = _renamed(given)
    except KeyError as missing:
        raise ConfigError(
            f"the weights have no entry {missing}; allowed: the weights of a plain vit_* model of "
            "timm"
        ) from None
    if given.keys() - used:
        found = ", ".join(sorted(given.keys() - used)[:3])
        raise ConfigError(
            f"the weights have an entry {found}, which this model does not use; allowed: the "
            "weights of a plain vit_* model"
        )
    width, channels, patch, _ = given["patch_embed.proj.weight"].shape
    side = patch * math.isqrt(len(named["positions.weight"]) - 1)
    model = Transformer(
        input_shape=(channels, side, side),
        patch=patch,
        width=width,
        depth=_depth(given),
        heads=heads,
        hidden=len(named["blocks.0.expand.weight"]),
    )
    try:
        model.load_state_dict(named)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"the weights do not fit ({reason}); allowed: the weights of a plain vit_* model of "
            "timm"
        ) from None
    return model


def _renamed(given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """Convert weights of timm to this library's names; also return timm's names that were used."""
    places = given["pos_embed"][0]
    first = places[:1] + given["cls_token"][0]
    named = {
        "embed.weight": given["patch_embed.proj.weight"].flatten(1),
        "embed.bias": given["patch_embed.proj.bias"],
    }
    named |= {"positions.weight": torch.cat([first, places[1:]])}
    used = {"pos_embed", "cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    for kind in ("weight", "bias"):
        named[f"norm.{kind}"] = given[f"norm.{kind}"]
        used.add(f"norm.{kind}")
        for block in (f"blocks.{number}" for number in range(_depth(given))):
            parts = {
                f"attention.{part}": value
                for part, value in zip(
                    ("query", "key", "value"),
                    given[f"{block}.attn.qkv.{kind}"].chunk(3),
                    strict=True,
                )
            } | {ours: given[f"{block}.{theirs}.{kind}"] for ours, theirs in _OF_BLOCK.items()}
            named |= {f"{block}.{part}.{kind}": value for part, value in parts.items()}
            used |= {f"{block}.{theirs}.{kind}" for theirs in (*_OF_BLOCK.values(), "attn.qkv")}
    return named, used


def _depth(given: Mapping[str, Tensor]) -> int:
    return sum(name.startswith("blocks.") and name.endswith(".norm1.weight") for name in given)


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"weights {path} cannot be read ({error}); give a file of safetensors"
        ) from None


def _check(input_shape: tuple[int, ...], patch: int, width: int, depth: int, heads: int) -> None:
    for name, value in (("patch", patch), ("width", width), ("depth", depth), ("heads", heads)):
        if value < 1:
            raise ConfigError.of(name, value, "whole numbers from 1")
    if len(input_shape) not in (1, 3) or any(
        side < patch or side % patch for side in input_shape[-2:]
    ):
        allowed = (
            "(features,) or (channels, height, width) with sides that are multiples of patch "
            f"= {patch}"
        )
        raise ConfigError.of("input_shape", input_shape, allowed)
    if width % heads:
        raise ConfigError.of("heads", heads, f"divisors of the width {width}")
