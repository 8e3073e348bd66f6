"""Low-rank adapters on a frozen transformer, one set per experience.

    W x + sum over experiences t of scale * B_t A_t x          A_t (rank, width), B_t (width, rank)

for the query and the value projection of every block. B_t starts at 0, so a set that was not
trained adds exactly 0. The model after experience t is the sum up to t, and nothing has to be
merged. `perdure.models.low_rank` adds one set to named layers of any model.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, sections 4.1 and
4.2.
"""

import torch
from torch import Tensor, nn

from perdure.errors import ConfigError
from perdure.models.classifier import Classifier
from perdure.models.vision_transformer import Addition, Transformer, fixed
from perdure.utils.seeding import seeded


class LowRank(nn.Module):
    """Low-rank linear map, x to scale * B A x, that starts as 0.

    Args:
        ins: length of the input x.
        outs: length of the output B A x.
        rank: rank of B A.
        scale: factor of the product, alpha / rank in the paper.
    """

    def __init__(self, ins: int, outs: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(ins, rank, bias=False)
        self.up = nn.Linear(rank, outs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Compute outputs (n, ..., outs) of inputs (n, ..., ins)."""
        change: Tensor = self.up(self.down(x))
        return self.scale * change


class LowRankPair(nn.Module):
    """Adapters for the query and the value projection of one block."""

    def __init__(self, width: int, rank: int, scale: float) -> None:
        super().__init__()
        self.query = LowRank(width, width, rank, scale)
        self.value = LowRank(width, width, rank, scale)


class Adapted(nn.Module):
    """Frozen transformer with one set of low-rank adapters per experience.

    `adapters.T.BLOCK.query` and `.value` are the adapters of experience T for a block.

    Args:
        backbone: transformer; the model has a frozen copy of it.
        rank: rank of each product B A.
        experiences: number of sets.
        scale: factor of each product.
    """

    def __init__(self, backbone: Transformer, rank: int, experiences: int, scale: float) -> None:
        super().__init__()
        self.backbone = fixed(backbone)
        sets = range(experiences)
        self.adapters = nn.ModuleList(
            nn.ModuleList(LowRankPair(backbone.width, rank, scale) for _ in backbone.blocks)
            for _ in sets
        )

    def forward(self, x: Tensor) -> Tensor:
        """Feature vectors (n, width) of inputs (n, ...)."""
        additions = [self._addition(block) for block in range(len(self.backbone.blocks))]
        return self.backbone.encode(self.backbone.tokens(x), additions)[:, 0]

    def _addition(self, block: int) -> Addition:
        """Sum of a block's adapters over experiences, for its query and value projections."""
        pairs = [blocks[block] for blocks in self.adapters]  # type: ignore[index]

        def query(x: Tensor) -> Tensor:
            return torch.stack([pair.query(x) for pair in pairs]).sum(0)

        def value(x: Tensor) -> Tensor:
            return torch.stack([pair.value(x) for pair in pairs]).sum(0)

        return Addition(query=query, value=value)


def adapted(
    backbone: Transformer,
    *,
    num_classes: int,
    experiences: int,
    rank: int = 4,
    scale: float = 1.0,
    seed: int = 0,
) -> Classifier:
    """Make a classifier: frozen transformer, low-rank adapters per experience, linear head.

        # for the strategy LoRA
        model = adapted(pretrained.body, num_classes=10, experiences=5, rank=4)

    Backbones of other libraries do not have the needed inner layers; `from_timm` reads weights of
    timm.

    Guarantee: no step, round or checkpoint changes the backbone. Its earlier training,
    on other records, is not counted in any ledger.

    Args:
        backbone: frozen transformer; it is copied.
        num_classes: full width of the head.
        experiences: length of the stream.
        rank: rank of each adapter.
        scale: factor of the adapters' output (alpha / rank).
        seed: seed of the initial parameters of adapters and head.

    Raises:
        ConfigError: if an argument is not allowed; the message names it.
    """
    for name, number in (
        ("num_classes", num_classes),
        ("experiences", experiences),
        ("rank", rank),
    ):
        if number < 1:
            raise ConfigError.of(name, number, "whole numbers from 1")
    with seeded(seed):
        body = Adapted(backbone, rank, experiences, scale)
        return Classifier(body, backbone.width, num_classes)
