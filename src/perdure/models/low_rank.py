"""Low-rank adapters on named linear layers of any model.

    W x + b + scale * B A x                    A (rank, ins) at random, B (outs, rank) at 0

All other parts of the model are frozen, except those that the user names.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, section 4.1.
"""

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from perdure.errors import ConfigError
from perdure.models.frozen import without_statistics
from perdure.models.low_rank_adapters import LowRank
from perdure.utils.seeding import seeded


class LowRankLinear(nn.Module):
    """Frozen linear layer with a trained low-rank change.

    Args:
        layer: frozen layer.
        ins: length of the layer's inputs.
        outs: length of the layer's outputs.
        rank: rank of the change.
        scale: factor of the change; alpha / rank of the paper.
    """

    def __init__(self, layer: nn.Module, ins: int, outs: int, rank: int, scale: float) -> None:
        super().__init__()
        self.layer = layer
        self.change = LowRank(ins, outs, rank, scale)

    def forward(self, x: Tensor) -> Tensor:
        """Compute outputs (n, ..., outs) of inputs (n, ..., ins)."""
        outputs: Tensor = self.layer(x)
        change: Tensor = self.change(x)
        return outputs + change


def low_rank(
    model: nn.Module,
    *,
    modules: str | Sequence[str],
    rank: int = 8,
    scale: float = 1.0,
    trained: str | Sequence[str] = (),
    seed: int = 0,
) -> nn.Module:
    """Return a copy of a model in which only low-rank changes of some linear layers are trained.

        low_rank(llama, modules=("q_proj", "v_proj"), rank=8)
        low_rank(gpt2, modules="c_attn", trained="lm_head")

    Frozen parts become buffers that are neither stored nor sent: checkpoints and messages of a
    federation hold the adapters and the parts named in `trained`. BatchNorm with running statistics
    is replaced by its scale and shift in evaluation mode.

    Guarantee: no step, round or checkpoint changes frozen parts. The earlier training of the model,
    on other records, is not counted in any ledger.

    Args:
        model: any module with `nn.Linear` layers, or `Conv1D` of Hugging Face; it is not changed.
        modules: names of the layers, in full or by their last parts, as `q_proj` for
            `model.layers.0.self_attn.q_proj`.
        rank: rank of each change.
        scale: factor of every change: alpha / rank of the paper.
        trained: names of other parts that are trained as a whole, such as the head.
        seed: seed of the adapters' initial parameters.

    Returns:
        A module of the model's class. Layer `NAME` is a `LowRankLinear`, whose trained parameters
        are `NAME.change.down.weight` (A) and `NAME.change.up.weight` (B).

    Raises:
        ConfigError: if no layer has a given name, a layer is not linear, or the rank is below 1.

    Example:
        >>> net = low_rank(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), modules="0", rank=1)
        >>> [name for name, _ in net.named_parameters()]
        ['0.change.down.weight', '0.change.up.weight']
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError.of("rank", rank, "whole numbers from 1")
    if not isinstance(model, nn.Module):
        raise ConfigError.of("model", model, "a torch.nn.Module")
    result = copy.deepcopy(model)
    places = _named(result, modules, "modules")
    sizes = {name: _sizes(name, layer) for name, layer in places.items()}
    kept = {
        id(value)
        for part in _named(result, trained, "trained").values()
        for value in part.parameters()
    }
    result = without_statistics(result)
    _freeze(result, kept)
    with seeded(seed):
        for name, layer in places.items():
            parent, _, own = name.rpartition(".")
            adapted = LowRankLinear(layer, *sizes[name], rank, scale)
            setattr(result.get_submodule(parent), own, adapted)
    return result.train(model.training)


def _named(model: nn.Module, names: str | Sequence[str], field: str) -> dict[str, nn.Module]:
    """Find the modules whose dotted name equals, or ends with, one of the given names.

    Raises:
        ConfigError: if no module has a given name; the message names some linear layers.
    """
    found: dict[str, nn.Module] = {}
    for wanted in (names,) if isinstance(names, str) else tuple(names):
        own = {
            name: module
            for name, module in model.named_modules()
            if name and f".{name}".endswith(f".{wanted}")
        }
        if not own:
            linear = (n for n, module in model.named_modules() if _is_linear(module) and n)
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise ConfigError.of(field, wanted, f"names in model.named_modules(), as {known}")
        found |= own
    if field == "modules" and not found:
        raise ConfigError.of(field, names, "one name of a layer, or more")
    return found


def _is_linear(module: nn.Module) -> bool:
    """Return True for a linear layer of torch, or the `Conv1D` of Hugging Face."""
    of_hugging_face = type(module).__module__.startswith("transformers.")
    return isinstance(module, nn.Linear) or (of_hugging_face and type(module).__name__ == "Conv1D")


def _sizes(name: str, layer: nn.Module) -> tuple[int, int]:
    """Lengths of the inputs and the outputs of a linear layer."""
    if not _is_linear(layer):
        kind = type(layer).__name__
        raise ConfigError.of(
            "modules",
            name,
            f"a linear layer, but this is a {kind}; give the names of the layers inside it",
        )
    weight = layer.weight
    assert isinstance(weight, Tensor)
    # Conv1D keeps its weight as (ins, outs)
    outs, ins = weight.shape if isinstance(layer, nn.Linear) else reversed(weight.shape)
    return ins, outs


def _freeze(model: nn.Module, kept: set[int]) -> None:
    """Turn all parameters except some into buffers, which are stored only next to parameters.

    Args:
        model: model, which is changed in place.
        kept: identities (`id`) of the parameters that stay parameters.
    """
    for part in model.modules():
        own = [*part.named_parameters(recurse=False)]
        for name, value in own:
            if id(value) not in kept:
                delattr(part, name)
                part.register_buffer(name, value.detach(), persistent=False)
        if not any(id(value) in kept for _, value in own):
            for name, buffer in [*part.named_buffers(recurse=False)]:
                part.register_buffer(name, buffer, persistent=False)
