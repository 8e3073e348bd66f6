"""Independence of records by construction: models made of modules that are known row by row.

Probes can refute independence and never prove it. A model is private *by construction* where every
module is listed here, with settings under which row i of its output depends on row i of its input
alone, and nothing is hooked or overridden. Any other model is *tested*, or goes record by record.
"""

import sys
from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import nn

from perdure.data.domain import InputDomain

Independence = Literal["by construction", "tested"]
"""By what the rows of a model's outputs are known to be independent of each other."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_ELEMENTWISE = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Identity,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)
_DROPOUT = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_POOLING = (
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.LPPool1d,
    nn.LPPool2d,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.Upsample,
    nn.ChannelShuffle,
)
_WEIGHTED = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.Linear,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
_PADDING = (
    nn.ConstantPad1d,
    nn.ConstantPad2d,
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
)

Condition = Callable[[nn.Module], bool]


def _behind_records(name: str) -> Condition:
    """Build the condition that an axis is the last one or stands behind the batch axis."""

    def holds(module: nn.Module) -> bool:
        axis = getattr(module, name)
        return isinstance(axis, int) and (axis == -1 or axis >= 1)

    return holds


def _batch_first(module: nn.Module) -> bool:
    return bool(getattr(module, "batch_first", False))


def _plain_table(module: nn.Module) -> bool:
    assert isinstance(module, nn.Embedding | nn.EmbeddingBag)
    return (
        module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
        and not getattr(module, "include_last_offset", False)
    )


def _no_statistics(module: nn.Module) -> bool:
    return not module.track_running_stats and module.running_mean is None


def _known_activation(module: nn.Module) -> bool:
    assert isinstance(module, nn.TransformerEncoderLayer)
    activation: object = module.activation
    known = activation in (F.relu, F.gelu) or isinstance(activation, nn.Module)
    return known and _batch_first(module.self_attn)


LISTED: dict[type[nn.Module], Condition] = {
    **dict.fromkeys(
        (*_CONTAINERS, *_ELEMENTWISE, *_DROPOUT, *_POOLING, *_WEIGHTED, *_PADDING),
        lambda module: True,
    ),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.GLU), _behind_records("dim")),
    **dict.fromkeys((nn.Embedding, nn.EmbeddingBag), _plain_table),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _no_statistics),
    nn.Flatten: _behind_records("start_dim"),
    nn.Unflatten: _behind_records("dim"),
    nn.MultiheadAttention: _batch_first,
    nn.TransformerEncoder: lambda module: True,
    nn.TransformerEncoderLayer: _known_activation,
    # inside attention; a linear layer
    nn.modules.linear.NonDynamicallyQuantizableLinear: lambda module: True,
}
"""Modules of torch whose output rows are functions of the input rows one by one, each with the
condition on its settings.
"""

OWN = ("perdure.models.", "perdure.privacy.guard.repair")
"""Modules of this library whose classes keep records apart; their tests hold it."""

OPACUS = ("DPGRU", "DPLSTM", "DPMultiheadAttention", "DPRNN")
OPACUS_PARTS = ("DPGRUCell", "DPLSTMCell", "DPRNNCell", "RNNLinear", "SequenceBias")


def independence(model: nn.Module, domain: InputDomain | None = None) -> Independence:
    """Return by what the rows of a model's outputs are known to be independent.

    Args:
        model: any module.
        domain: of its inputs. Records of no axis have no rows behind the batch axis to work on.

    Returns:
        "by construction" where every module is listed, with harmless settings, unhooked, and with
        the forward pass of its class; else "tested".
    """
    if domain is not None and not domain.shape:
        return "tested"
    known = all(_is_listed(module) for module in model.modules())
    return "by construction" if known else "tested"


def unlisted(model: nn.Module) -> tuple[str, ...]:
    """Names and types of the modules for which a model is tested only, in order."""
    return tuple(
        f"{name or 'model'}: {type(module).__name__}"
        for name, module in model.named_modules()
        if not _is_listed(module)
    )


def _is_listed(module: nn.Module) -> bool:
    if _overridden(module):
        return False
    kind = type(module)
    if kind in LISTED:
        return LISTED[kind](module)
    if kind.__module__.startswith("opacus.layers."):
        name = kind.__name__
        found = getattr(sys.modules.get(kind.__module__), name, None) is kind
        return found and (name in OPACUS_PARTS or (name in OPACUS and _batch_first(module)))
    return is_own(kind, OWN) and _own_condition(module)


def _own_condition(module: nn.Module) -> bool:
    """Settings under which a module of this library keeps records apart."""
    if hasattr(module, "batch_first") and not _batch_first(module):
        return False
    transform = getattr(module, "transform", None)  # of `perdure.models.frozen.Fixed`
    return transform is None or is_own(type(transform), OWN)


def is_own(kind: type, packages: tuple[str, ...]) -> bool:
    """Return whether this very class is defined in one of the packages of this library.

    A subclass is defined elsewhere, and a class that took over the names of another one is not
    found under them.
    """
    inside = kind.__module__.startswith(packages)
    return inside and getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind


def _overridden(module: nn.Module) -> bool:
    """Return whether hooks, or methods put on the object, may change what the class does."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    own = vars(module)
    return any(map(len, hooks)) or any(callable(getattr(type(module), name, None)) for name in own)
