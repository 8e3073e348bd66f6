"""Functions for the modes, buffers and running statistics of modules."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor, nn

from perdure.types import Params

WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes by the number of bytes; tensors of other sizes are compared byte by byte."""

STATE_METHODS = ("state_dict", "_save_to_state_dict", "get_extra_state")
"""Methods of a module that decide the content of its `state_dict`."""

WITHOUT_MODE: frozenset[type[nn.Module]] = frozenset(
    {
        nn.AdaptiveAvgPool2d,
        nn.AvgPool2d,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.Embedding,
        nn.Flatten,
        nn.GELU,
        nn.GroupNorm,
        nn.Identity,
        nn.LayerNorm,
        nn.LeakyReLU,
        nn.Linear,
        nn.MaxPool2d,
        nn.ModuleList,
        nn.ReLU,
        nn.Sequential,
        nn.SiLU,
        nn.Sigmoid,
        nn.Tanh,
    }
)
"""Modules of torch that compute the same in training mode and in evaluation mode."""


def ignores_mode(module: nn.Module) -> bool:
    """Return True if it is known that training mode changes nothing in a module.

    A module with other parts than common layers of torch and models of this library is not known.
    """
    return all(
        type(part) in WITHOUT_MODE or type(part).__module__.startswith("perdure.models.")
        for part in module.modules()
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode inside the `with` block.

    Afterwards every submodule has its earlier mode again.
    """
    modes = {part: part.training for part in module.modules()}
    end_training(module)
    try:
        yield
    finally:
        for part, training in modes.items():
            if part.training is not training:
                part.training = training


@contextmanager
def evaluating_with_gradients(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, also where gradients of its outputs are needed.

    cuDNN has no gradients of recurrent layers in evaluation mode; torch's own kernels have.
    """
    recurrent = any(isinstance(part, nn.RNNBase) for part in module.modules())
    own = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    with evaluating(module), own:
        yield


def statistics_of(module: nn.Module) -> Params:
    """Return copies of the running means and variances of normalisation layers, by name."""
    own = ("running_mean", "running_var")
    return {
        name: value.clone()
        for name, value in module.named_buffers()
        if name.rsplit(".", 1)[-1] in own
    }


def detached_copies(tensors: Params) -> Params:
    """Return a copy of each tensor, outside the graph of gradients, by name."""
    return {name: value.detach().clone() for name, value in tensors.items()}


def begin_training(module: nn.Module) -> None:
    """Put every module into training mode, several times as fast as `module.train()`."""
    _put_into_mode(module, training=True)


def end_training(module: nn.Module) -> None:
    """Put every module into evaluation mode, several times as fast as `module.eval()`."""
    _put_into_mode(module, training=False)


def _put_into_mode(module: nn.Module, *, training: bool) -> None:
    parts = parts_of(module)
    if any(type(part).train is not nn.Module.train for part in parts):
        module.train(training)
        return
    for part in parts:
        own = vars(part)
        if "training" in own:
            own["training"] = training  # skips the slow checks for parameters
        else:
            part.training = training


def parts_of(module: nn.Module) -> list[nn.Module]:
    """Return a module and all modules inside it, each once, faster than `modules()`."""
    found: dict[nn.Module, None] = {}
    waiting = [module]
    while waiting:
        part = waiting.pop()
        if part not in found:
            found[part] = None
            waiting += [each for each in vars(part)["_modules"].values() if each is not None]
    return list(found)


def state_of(module: nn.Module) -> Params:
    """Return the tensors of `state_dict()` by name, not detached, faster than `state_dict`."""
    state: Params = {}
    waiting = [("", module)]
    while waiting:
        prefix, part = waiting.pop()
        own = vars(part)
        if own["_state_dict_hooks"] or own["_state_dict_pre_hooks"] or not _plain(type(part)):  # type: ignore[arg-type]  # classes are hashable
            return dict(module.state_dict(keep_vars=True))
        for name, value in own["_parameters"].items():
            if value is not None:
                state[prefix + name] = value
        for name, value in own["_buffers"].items():
            if value is not None and name not in own["_non_persistent_buffers_set"]:
                state[prefix + name] = value
        if own["_modules"]:
            inside = [(f"{prefix}{n}.", m) for n, m in own["_modules"].items() if m is not None]
            waiting += reversed(inside)
    return state


@cache
def _plain(kind: type[nn.Module]) -> bool:
    """Return True if modules of a type have no `state_dict` of their own."""
    return all(getattr(kind, name) is getattr(nn.Module, name) for name in STATE_METHODS)


def share_memory(tensors: Params, others: Params) -> None:
    """Let the parameters among named tensors use the memory of the others', on the processor.

    They get the values of the others. A parameter without a counterpart of the same name, shape,
    strides and dtype keeps its own memory.
    """
    for name, own in tensors.items():
        value = others.get(name)
        if value is not None and _layout(own) == _layout(value) and _is_shareable(own):
            own.data = value.data


def own_memory(tensors: Params) -> None:
    """Move the parameters among named tensors out of the memory that they share with others."""
    for own in tensors.values():
        if _is_shareable(own):
            own.data = own.data.clone()


def _is_shareable(value: Tensor) -> bool:
    return isinstance(value, nn.Parameter) and value.device.type == "cpu"


def _layout(value: Tensor) -> tuple[object, ...]:
    return type(value), value.dtype, value.device, value.shape, value.stride()


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Context manager that restores the buffers of a module, such as running statistics."""
    before = {buffer: buffer.clone() for buffer in module.buffers()}
    try:
        yield
    finally:
        for buffer, value in before.items():
            buffer.copy_(value)


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require gradients, by name."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return True if two tensors have the same bits, dtype and device, also for signs of zeros."""
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    whole = WHOLE.get(one.element_size(), torch.uint8)
    return torch.equal(one.flatten().view(whole), other.flatten().view(whole))
