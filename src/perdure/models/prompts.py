"""Prompts for a frozen transformer, for L2P and CODA-Prompt.

Each record uses some prompts of a pool (L2P), or a weighted sum of components (CODA-Prompt).

In both, the frozen transformer first runs without prompts to compute a query q(x), which is its
features, and then runs again with prompts. The prompts of a record depend only on that record and
the parameters. Prompts and keys are rows of `nn.Embedding` and columns of `nn.Linear`, so that
book-keeping can compute all per-record gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.errors import ConfigError
from perdure.models.classifier import Classifier
from perdure.models.vision_transformer import POSITION_SCALE, Addition, Transformer, fixed
from perdure.utils.seeding import seeded

# --------------------------------------------------------------------------- a pool


class PromptPool(nn.Module):
    """Frozen transformer with a pool of prompts, which are put before the tokens of an input.

    A record gets the `chosen` prompts whose keys have the largest cosine with its query.

        features(x) = mean of the last states of the prompts' tokens

    Attributes:
        prompts: embedding with `pool` prompts; each row is a prompt of `length` tokens, flattened.
        keys: embedding with the keys of the prompts, (pool, width).
    """

    def __init__(self, backbone: Transformer, pool: int, length: int, chosen: int) -> None:
        super().__init__()
        self.backbone = fixed(backbone)
        self.length = length
        self.chosen = chosen
        self.prompts = nn.Embedding(pool, length * backbone.width)
        self.keys = nn.Embedding(pool, backbone.width)
        nn.init.normal_(self.prompts.weight, std=POSITION_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        """Feature vectors (n, width) of inputs (n, ...)."""
        return self.matched(x)[0]

    def matched(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, width) of inputs (n, ...), and cosines (n, chosen) with the chosen keys."""
        tokens = self.backbone.tokens(x)
        query = self.backbone.encode(tokens)[:, 0]
        similarity, numbers = cosines(query, self.keys(every_row(self.keys, query))).topk(
            self.chosen, dim=1
        )
        prompts = self.prompts(numbers).reshape(x.shape[0], self.chosen * self.length, -1)
        states = self.backbone.encode(torch.cat([prompts, tokens], 1))
        return states[:, : prompts.shape[1]].mean(1), similarity


class Prompted(Classifier):
    """Classifier with a linear head on a `PromptPool`; made by `prompted`."""

    def matched(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, num_classes) and similarities (n, chosen) of the chosen keys, in one pass."""
        assert isinstance(self.body, PromptPool)
        features, similarity = self.body.matched(x)
        return self.head(features), similarity


def prompted(
    backbone: Transformer,
    *,
    num_classes: int,
    pool: int = 10,
    length: int = 5,
    chosen: int = 5,
    seed: int = 0,
) -> Prompted:
    """Make a classifier of a frozen transformer, a pool of prompts with keys, and a linear head.

        model = prompted(pretrained.body, num_classes=10)      # for the strategy L2P

    Backbones of other libraries do not have the needed inner layers; `from_timm` reads weights of
    timm.

    Guarantee: no step, round or checkpoint changes the backbone. Its earlier training,
    on other records, is not counted in any ledger.

    Args:
        backbone: frozen transformer; it is copied.
        num_classes: full width of the head.
        pool: number of prompts (M).
        length: number of tokens of a prompt (L_p).
        chosen: number of prompts that a record picks (N).
        seed: seed of the initial prompts, keys and head.

    Raises:
        ConfigError: if an argument is not allowed; the message names it.

    Source: Wang et al., Learning to Prompt for Continual Learning, CVPR 2022, sections 4.1 and 4.2.
    """
    _check(num_classes=num_classes, pool=pool, length=length, chosen=chosen)
    if chosen > pool:
        raise ConfigError.of("chosen", chosen, f"at most pool = {pool}")
    with seeded(seed):
        return Prompted(PromptPool(backbone, pool, length, chosen), backbone.width, num_classes)


# --------------------------------------------------------------------------- components


class Components(nn.Module):
    """Prompt components of one experience for one transformer block.

        p(q) = sum over components m of cos(q * attention_m, key_m) prompt_m

    The attention vector of a component weights the entries of the query; it is not self-attention.

    Args:
        prompts: (components, size) initial prompts, with size = 2 * length * width: the keys and
            values of a prompt in one vector. `prompts.weight` is the transpose.
        keys: (components, width) initial keys.
        attention: (components, width) initial attention vectors.
    """

    def __init__(self, prompts: Tensor, keys: Tensor, attention: Tensor) -> None:
        super().__init__()
        self.prompts = nn.Linear(len(prompts), prompts.shape[1], bias=False)
        self.keys = nn.Embedding(*keys.shape)
        self.attention = nn.Embedding(*keys.shape)
        parts = (self.prompts, prompts.T), (self.keys, keys), (self.attention, attention)
        with torch.no_grad():
            for layer, start in parts:
                layer.weight.copy_(start)

    def forward(self, query: Tensor) -> Tensor:
        """Prompt vectors p(q) (n, size) of queries (n, width), for this block and experience."""
        # one lookup per record, because book-keeping has per-record gradients of lookups
        rows = every_row(self.keys, query)
        weights = cosines(query[:, None] * self.attention(rows), self.keys(rows))
        prompt: Tensor = self.prompts(weights)
        return prompt


class ComposedPrompts(nn.Module):
    """Frozen transformer with composed prompts, used as prefixes in its first `depth` blocks.

    `components.T.BLOCK` are the `Components` of experience T for one block.
    """

    def __init__(
        self, backbone: Transformer, experiences: int, components: int, length: int, depth: int
    ) -> None:
        super().__init__()
        self.backbone = fixed(backbone)
        self.length = length
        width = backbone.width
        size = 2 * length * width  # keys and values of a prompt
        total = experiences * components
        starts = [
            [
                orthonormal(total, n).reshape(experiences, components, n)
                for n in (size, width, width)
            ]
            for _ in range(depth)
        ]
        self.components = nn.ModuleList(
            nn.ModuleList(Components(*(part[number] for part in block)) for block in starts)
            for number in range(experiences)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Feature vectors (n, width) of inputs (n, ...), with the components of all experiences."""
        return self.upto(x, len(self.components) - 1)

    def upto(self, x: Tensor, experience: int) -> Tensor:
        """Feature vectors (n, width), with the components of experiences 0 to `experience`."""
        tokens = self.backbone.tokens(x)
        query = self.backbone.encode(tokens)[:, 0]
        blocks = zip(*self.components[: experience + 1], strict=True)
        prefixes = [
            torch.stack([components(query) for components in block]).sum(0) for block in blocks
        ]
        return self.backbone.encode(tokens, [self._addition(prefix) for prefix in prefixes])[:, 0]

    def _addition(self, prefix: Tensor) -> Addition:
        """Convert prompt vectors (n, size) to keys and values (n, length, width) for attention."""
        keys, values = prefix.reshape(prefix.shape[0], 2, self.length, -1).unbind(1)
        return Addition(keys=keys, values=values)


class Composed(Classifier):
    """Classifier with a linear head on `ComposedPrompts`; made by `composed`."""

    def upto(self, x: Tensor, experience: int) -> Tensor:
        """Logits (n, num_classes), with the components of experiences 0 to `experience`."""
        assert isinstance(self.body, ComposedPrompts)
        logits: Tensor = self.head(self.body.upto(x, experience))
        return logits


def composed(
    backbone: Transformer,
    *,
    num_classes: int,
    experiences: int,
    components: int = 4,
    length: int = 4,
    depth: int | None = None,
    seed: int = 0,
) -> Composed:
    """Make a classifier: frozen transformer, prompt components per experience, linear head.

        # for the strategy CODAPrompt
        model = composed(pretrained.body, num_classes=10, experiences=5)

    A prompt is `length` keys and `length` values, put before those of the tokens in each of the
    first `depth` blocks (prefix tuning; the paper's L_p counts both). The class token's last state
    goes to the head. Prompts, keys and attention vectors of all experiences start orthonormal.

    Guarantee: no step, round or checkpoint changes the backbone. Its earlier training,
    on other records, is not counted in any ledger.

    Args:
        backbone: frozen transformer; it is copied.
        num_classes: full width of the head.
        experiences: length of the stream.
        components: number of components of one experience (in the paper M / experiences).
        length: number of keys, and of values, of a prompt.
        depth: number of blocks with prompts; None for all.
        seed: seed of the initial components and head.

    Raises:
        ConfigError: if an argument is not allowed; the message names it.

    Source: Smith et al., CODA-Prompt, CVPR 2023, sections 4.1 and 4.2; for prefix tuning section 3.
    """
    frozen = fixed(backbone)
    depth = len(frozen.blocks) if depth is None else depth
    _check(
        num_classes=num_classes,
        experiences=experiences,
        components=components,
        length=length,
        depth=depth,
    )
    if depth > len(frozen.blocks):
        raise ConfigError.of(
            "depth", depth, f"at most the {len(frozen.blocks)} blocks of the backbone"
        )
    # more vectors than the width has dimensions cannot be orthonormal
    if experiences * components > frozen.width:
        raise ConfigError.of(
            "components", components, f"at most width / experiences = {frozen.width // experiences}"
        )
    with seeded(seed):
        return Composed(
            ComposedPrompts(backbone, experiences, components, length, depth),
            frozen.width,
            num_classes,
        )


# --------------------------------------------------------------------------- shared


def cosines(query: Tensor, keys: Tensor) -> Tensor:
    """Return (n, k) cosines of queries (n, width), or (n, k, width), with keys (n, k, width)."""
    query = query[:, None] if query.dim() == 2 else query
    return F.cosine_similarity(query, keys, dim=2)


def every_row(table: nn.Embedding, like: Tensor) -> Tensor:
    """(n, rows) indices of all rows of the table, repeated for each of the n records of `like`."""
    return torch.arange(table.num_embeddings, device=like.device).expand(like.shape[0], -1)


def orthonormal(rows: int, width: int) -> Tensor:
    """Random matrix (rows, width) with orthonormal rows."""
    return nn.init.orthogonal_(torch.empty(rows, width))


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ConfigError.of(name, value, "whole numbers from 1")
