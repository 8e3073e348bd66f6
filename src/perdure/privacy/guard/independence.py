"""Independence of records by construction: models of modules that handle each row by itself.

Probes can refute independence, but never prove it. A model is private *by construction* if every
module is listed here, with settings under which row i of its output depends only on row i of its
input, and nothing is hooked or overridden. Any other model is *tested*, or runs record by record.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from perdure.data.domain import InputDomain
from perdure.privacy.clipping.rules.registry import clipping_rules
from perdure.utils.modules import evaluating

Independence = Literal["by construction", "tested"]
"""The two ways in which the rows of a model's outputs are known to be independent."""

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

_OVER_SEQUENCES = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
_OVER_FEATURES = (nn.Linear, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.GLU)

Condition = Callable[[nn.Module], bool]


def _behind_records(name: str) -> Condition:
    """Return a function that is true for a module whose axis `name` is not the batch axis."""

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
"""Modules of torch that compute each output row from one input row, with conditions.

The condition is a test of the module's settings.
"""

OWN = ("perdure.models.", "perdure.privacy.guard.repair")
"""Modules of this library whose classes keep records independent, as tests check."""

OWN_RULES = ("perdure.privacy.clipping.rules.",)
"""Clipping rules of this library; tests compare them with gradients of single records."""

REPAIRED = "RepairedAttention"
OPACUS = ("DPGRU", "DPLSTM", "DPMultiheadAttention", "DPRNN")
OPACUS_PARTS = ("DPGRUCell", "DPLSTMCell", "DPRNNCell", "RNNLinear", "SequenceBias")

PROBED_ROWS = 3
"""Number of synthetic records that show how many axes the inputs of modules have."""


def independence(model: nn.Module, domain: InputDomain | None = None) -> Independence:
    """Tell if the rows of a model's outputs are independent by construction, or only tested.

    Args:
        model: any module.
        domain: domain of the model's inputs. The model runs on random inputs of this domain, to
            find layers whose inputs have too few axes, so that they would work on the batch axis.
            None to assume that every layer gets inputs with enough axes.

    Returns:
        "by construction" if every module is on the library's list, with safe settings, without
        hooks, and with the unchanged forward pass of its class; "tested" in all other cases.
    """
    if domain is not None and not domain.shape:
        return "tested"
    if unlisted(model) or (domain is not None and too_flat(model, domain)):
        return "tested"
    return "by construction"


def unlisted(model: nn.Module) -> tuple[str, ...]:
    """Names and types of the modules that are not known to treat every record on its own.

    With any of them the independence of records is tested, and not guaranteed by construction.
    """
    hooked = _hooked_everywhere()
    return tuple(
        f"{name or 'model'}: {type(module).__name__}"
        for name, module in model.named_modules()
        if hooked or not _is_listed(module)
    )


def too_flat(model: nn.Module, domain: InputDomain) -> tuple[str, ...]:
    """Names of the modules whose inputs have so few axes that they work on the batch axis.

    With two axes in all, padding of the last two axes shifts records into each other, and attention
    takes the batch for a sequence.

    Args:
        model: a model of listed modules only; it runs on random inputs.
        domain: domain of the inputs.
    """
    least = {name: _least_axes(module) for name, module in model.named_modules()}
    found: dict[str, None] = {}

    def listen(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if any(isinstance(x, Tensor) and x.dim() < least[name] for x in inputs[:1]):
                found[name or "model"] = None

        return module.register_forward_pre_hook(note)

    handles = [listen(name, module) for name, module in model.named_modules()]
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    inputs = domain.random(PROBED_ROWS, torch.Generator().manual_seed(0)).to(device)
    try:
        with torch.no_grad(), evaluating(model):
            model(inputs)
    except Exception:  # the tests of the guard will name this error
        found["model"] = None
    finally:
        for handle in handles:
            handle.remove()
    return tuple(found)


def _least_axes(module: nn.Module) -> int:
    """Fewest axes of an input, batch axis included, with which a listed module is safe.

    With fewer, torch takes the batch for channels or a sequence, or pads or normalises over it.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.weight.dim()
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return len(module.normalized_shape) + 1
    if isinstance(module, _PADDING):
        return len(module.padding) // 2 + 1
    if isinstance(module, nn.PixelShuffle | nn.PixelUnshuffle):
        return 4
    if isinstance(module, _OVER_SEQUENCES) or type(module).__name__ in (*OPACUS, REPAIRED):
        return 3
    return 2 if isinstance(module, _OVER_FEATURES) else 1


def _is_listed(module: nn.Module) -> bool:
    if _overridden(module) or not _plain_tensors(module) or not _own_gradients(module):
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
    """Return True if the settings of a module of this library keep records independent."""
    if hasattr(module, "batch_first") and not _batch_first(module):
        return False
    transform = getattr(module, "transform", None)  # of `perdure.models.frozen.Fixed`
    return transform is None or is_own(type(transform), OWN)


def is_own(kind: type, packages: tuple[str, ...]) -> bool:
    """Return True if a class is defined in one of the packages of this library.

    A subclass that is defined elsewhere does not count, nor does a class that only copies the name
    of one of the library's classes.
    """
    inside = kind.__module__.startswith(packages)
    return inside and getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind


def _plain_tensors(module: nn.Module) -> bool:
    """Return True if parameters and buffers are plain tensors of torch, without hooks."""
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return all(
        type(value) in (nn.Parameter, Tensor)
        and not value._backward_hooks
        and not value._post_accumulate_grad_hooks
        for value in tensors
    )


def foreign_rules(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules whose per-record gradients come from the user's own code."""
    named = model.named_modules()
    return tuple(name or "model" for name, module in named if not _own_gradients(module))


def _own_gradients(module: nn.Module) -> bool:
    """Return True if per-record gradients of a module come from this library or from Opacus."""
    kind = type(module)
    rule = clipping_rules().get(kind)
    if rule is not None and not is_own(type(rule), OWN_RULES):
        return False
    sampler = opacus_samplers().get(kind)
    return sampler is None or _defined_in(sampler, "opacus")


def opacus_samplers() -> Mapping[type, object]:
    """Return the functions by which Opacus computes per-record gradients, by layer type.

    The result is empty if Opacus is not loaded.
    """
    wrapped = sys.modules.get("opacus.grad_sample.grad_sample_module")
    found: Mapping[type, object] = wrapped.GradSampleModule.GRAD_SAMPLERS if wrapped else {}
    return found


def _hooked_everywhere() -> bool:
    """Return True if torch has hooks that run in every module."""
    return any(
        len(getattr(torch_module, name))
        for name in (
            "_global_forward_hooks",
            "_global_forward_pre_hooks",
            "_global_backward_hooks",
            "_global_backward_pre_hooks",
        )
    )


def keeps_methods(thing: object, *names: str) -> bool:
    """Return True if an object's methods come from its class and from known libraries.

    No method was replaced on the object or the class, and no method was wrapped.

    Args:
        thing: any object.
        names: names of the methods that are looked up in the class.
    """
    kind = type(thing)
    if any(callable(getattr(kind, name, None)) for name in vars(thing)):
        return False
    libraries = {base.__module__.partition(".")[0] for base in kind.__mro__}
    return all(_defined_in(getattr(kind, name), *libraries) for name in names)


def _defined_in(method: object, *libraries: str) -> bool:
    """Return True if the code of a method is defined in a library, whatever name it claims."""
    place: str = getattr(method, "__globals__", {}).get("__name__", "")
    return place.partition(".")[0] in libraries


def _overridden(module: nn.Module) -> bool:
    """Return True if hooks or replaced methods may change the behaviour of a module."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(map(len, hooks)) or not keeps_methods(module, "forward")
