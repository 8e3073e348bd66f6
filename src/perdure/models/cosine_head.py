"""Cosine head, whose logits depend on the angles between features and class weights only.

A class therefore cannot win by the length of its weights. Each row of logits depends only on the
same row of features; no statistics are computed or stored.
"""

import math

import torch
from torch import Tensor, nn

SCALE = 10.0
"""Initial value of eta, from Gidaris and Komodakis, Dynamic few-shot visual learning without
forgetting, CVPR 2018.
"""
SHORTEST = 1e-6
"""Number whose square is added to squared lengths, so that a vector of zeros has a gradient."""


class CosineHead(nn.Module):
    """Head with logits eta <f / |f|, w_c / |w_c|> of features f; eta is learnt, no bias.

    Args:
        in_features: length of f.
        out_features: number of rows w_c, which is the number of all classes of the stream.

    Source: Hou, Pan, Loy, Wang and Lin, Learning a Unified Classifier Incrementally via
    Rebalancing, CVPR 2019, section 3.2, equation 4.

    Example:
        >>> head = CosineHead(8, 10)
        >>> [name for name, _ in head.named_parameters()]
        ['weight', 'scale']
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        bound = 1 / math.sqrt(max(1, in_features))
        self.weight = nn.Parameter(torch.empty(out_features, in_features).uniform_(-bound, bound))
        self.scale = nn.Parameter(torch.full((1,), SCALE))

    def forward(self, features: Tensor) -> Tensor:
        """Return (..., out_features) logits of features (..., in_features)."""
        return self.scale * cosines(features, self.weight)

    def extra_repr(self) -> str:
        """Show the sizes as torch's own layers do."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def cosines(features: Tensor, weight: Tensor) -> Tensor:
    """Cosines (..., C) of the angles between features (..., f) and the rows of weight (C, f)."""
    return directions(features) @ directions(weight).mT


def directions(vectors: Tensor) -> Tensor:
    """Divide vectors (..., f) by their length."""
    return vectors * reciprocal_lengths(vectors)


def reciprocal_lengths(vectors: Tensor) -> Tensor:
    """Return (..., 1) one divided by the length of each vector (..., f)."""
    return (vectors.square().sum(-1, keepdim=True) + SHORTEST**2).rsqrt()
