"""Replacements, with the same weights, for layers that cannot be trained privately.

Opacus's own ModuleValidator.fix is not used: as of 1.6 it copies the model by pickle, leaves frozen
and affine-free BatchNorm unchanged, drops the scale and shift of other BatchNorm layers, keeps
updating the running statistics of InstanceNorm, and changes the function of attention with more
than one head and batch_first=True. Its recurrent layers are right.
"""

import copy
import math

import torch
from torch import Tensor, nn

from perdure.models.bodies import LARGEST_GROUP_COUNT
from perdure.utils.seeding import undisturbed

Replacements = dict[str, tuple[nn.Module, nn.Module]]
"""Dotted name of a module to the pair (old layer, new layer)."""


def repaired(model: nn.Module) -> nn.Module:
    """Copy the model, with every layer replaced that has a safe counterpart."""
    result = copy.deepcopy(model)
    for name, (_, new) in replacements(result).items():
        if not name:
            return new
        parent, _, own = name.rpartition(".")
        setattr(result.get_submodule(parent), own, new)
    for module in result.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(part, RepairedAttention) for part in module.modules()
        ):
            # disables a faster inference that reads the weights of torch's attention
            module.use_nested_tensor = False
    return result


def replacements(model: nn.Module) -> Replacements:
    """Replacements by name; a layer that occurs twice in the model has one replacement.

    The random state of torch does not change.
    """
    found: Replacements = {}
    made: dict[nn.Module, nn.Module | None] = {}
    with undisturbed():
        for name, module in model.named_modules(remove_duplicate=False):
            if module not in made:
                made[module] = counterpart(module)
            new = made[module]
            if new is not None:
                found[name] = (module, new)
    return found


def counterpart(module: nn.Module) -> nn.Module | None:
    """Build the safe replacement of a layer, with its weights, mode, device and precision.

    None if no replacement is needed or known.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        new: nn.Module | None = _group_norm(module)
    elif isinstance(module, nn.modules.instancenorm._InstanceNorm):
        new = _instance_norm(module)
    elif type(module) in (nn.LSTM, nn.GRU, nn.RNN):
        new = _recurrent(module)  # type: ignore[arg-type]
    elif (
        type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn
    ):
        return RepairedAttention(module)
    else:
        return None
    return None if new is None else _carried(module, new)


def groups(module: nn.Module) -> int:
    """Number of groups of the GroupNorm that replaces a BatchNorm.

    It is at most 16, and 1 if a channel may be a single number.
    """
    channels = int(module.num_features)  # type: ignore[arg-type]
    return 1 if isinstance(module, nn.BatchNorm1d) else math.gcd(LARGEST_GROUP_COUNT, channels)


def _group_norm(module: nn.modules.batchnorm._BatchNorm) -> nn.Module | None:
    if not module.num_features:
        return None
    return nn.GroupNorm(groups(module), module.num_features, eps=module.eps, affine=module.affine)


def _instance_norm(module: nn.modules.instancenorm._InstanceNorm) -> nn.Module | None:
    if module.running_mean is None and not module.track_running_stats:
        return None
    return type(module)(
        module.num_features, eps=module.eps, affine=module.affine, track_running_stats=False
    )


def _recurrent(module: nn.RNNBase) -> nn.Module | None:
    from opacus import layers

    if module.proj_size:
        return None
    kind = {"nonlinearity": module.nonlinearity} if isinstance(module, nn.RNN) else {}
    # torch applies dropout between layers only, so not for one layer; Opacus would apply it
    dropout = module.dropout if module.num_layers > 1 else 0.0
    new: nn.Module = getattr(layers, f"DP{type(module).__name__}")(
        module.input_size,
        module.hidden_size,
        num_layers=module.num_layers,
        bias=module.bias,
        batch_first=module.batch_first,
        dropout=dropout,
        bidirectional=module.bidirectional,
        **kind,
    )
    return new


def _carried(old: nn.Module, new: nn.Module) -> nn.Module:
    """Copy the old layer's parameters, mode, device and precision to the new layer."""
    given = dict(old.named_parameters())
    for value in given.values():
        new.to(value.device, value.dtype)
        break
    for name, param in new.named_parameters():
        if name in given:
            param.data.copy_(given[name].data)
            param.requires_grad_(given[name].requires_grad)
    return new.train(old.training)


class RepairedAttention(nn.Module):
    """Attention like torch.nn.MultiheadAttention, built from linear layers with a dropout layer.

    softmax(q k^T / sqrt(d) + mask) v for each head of d features; arguments, shapes and result are
    those of the layer it is made from (which needs inputs with a batch dimension). Every linear
    layer sees (n, length, features), also where `batch_first` is False, so that book-keeping finds
    each record in its own row.

    Args:
        source: layer whose weights, mode, device and precision are copied; it has no bias_k and no
            add_zero_attn.
    """

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim = source.embed_dim
        self.num_heads = source.num_heads
        self.batch_first = source.batch_first
        joint = source.in_proj_weight
        weights = (
            joint.chunk(3)
            if joint is not None
            else (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
        )
        shifts = (None,) * 3 if source.in_proj_bias is None else source.in_proj_bias.chunk(3)
        self.query, self.key, self.value = (
            _linear(w, b) for w, b in zip(weights, shifts, strict=True)
        )
        self.out_proj = _linear(source.out_proj.weight, source.out_proj.bias)
        self.dropout = nn.Dropout(source.dropout)
        # torch's encoder layers read these before they skip the layer for speed
        self._qkv_same_embed_dim = False
        self.in_proj_weight = None
        self.in_proj_bias = None
        self.train(source.training).requires_grad_(source.out_proj.weight.requires_grad)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention output, and the weights (n, length, length) if they are asked for.

        See torch.nn.MultiheadAttention.
        """
        inputs = (
            [query, key, value]
            if self.batch_first
            else [x.transpose(0, 1) for x in (query, key, value)]
        )
        layers = (self.query, self.key, self.value)
        q, k, v = (self._heads(layer(x)) for layer, x in zip(layers, inputs, strict=True))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        for mask in (attn_mask, key_padding_mask):
            scores = (
                scores
                if mask is None
                else scores + _penalty(mask, scores, padding=mask is key_padding_mask)
            )
        weights = self.dropout(scores.softmax(-1))
        out = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        shown = weights.mean(1) if average_attn_weights else weights
        return out if self.batch_first else out.transpose(0, 1), shown if need_weights else None

    def _heads(self, x: Tensor) -> Tensor:
        """Reshape (n, length, features) to (n, heads, length, d)."""
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out, size = weight.shape
    layer = nn.Linear(size, out, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return layer


def _penalty(mask: Tensor, scores: Tensor, *, padding: bool) -> Tensor:
    """Turn a mask into numbers that are added to the scores (n, heads, length, length).

    The number is minus infinity where a boolean mask is True.
    """
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, -math.inf)
    if padding:
        return mask[:, None, None, :]
    return mask if mask.dim() == 2 else mask.view(scores.shape)
