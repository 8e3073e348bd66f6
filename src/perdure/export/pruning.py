"""Magnitude pruning: the smallest weights of a model become 0."""

import torch
from torch import nn

from perdure.errors import ConfigError


def prune(model: nn.Module, share: float) -> None:
    """Set the smallest weights of the model to 0, over all layers together.

    Biases and other vectors stay. The weights keep their places: files become smaller in an archive
    only, and dense kernels do not become faster.

    Args:
        model: model that is changed in place.
        share: share of the weights, above 0 and below 1.

    Raises:
        ConfigError: for a share that is out of range, or a model without a weight matrix.

    Source: Han, Pool, Tran and Dally, Learning both weights and connections for efficient neural
    networks, NeurIPS 2015, section 3; here without training afterwards.
    """
    if not 0 < share < 1:
        raise ConfigError.of("prune", share, "a share above 0 and below 1")
    weights = [value for value in model.parameters() if value.dim() > 1]
    sizes = torch.cat([value.detach().abs().flatten() for value in weights] or [torch.empty(0)])
    count = round(share * len(sizes))
    if not count:
        raise ConfigError.of(
            "prune", share, f"a share that prunes one of the model's {len(sizes)} weights or more"
        )
    smallest = torch.zeros(len(sizes), dtype=torch.bool)
    smallest[sizes.topk(count, largest=False).indices] = True
    with torch.no_grad():
        for value, gone in zip(
            weights, torch.split(smallest, [v.numel() for v in weights]), strict=True
        ):
            value.masked_fill_(gone.view(value.shape), 0.0)
