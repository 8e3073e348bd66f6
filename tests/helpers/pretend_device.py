"""A pretend accelerator: tensors that keep their values on the CPU and claim another device.

The device is "meta", which autograd, `functional_call` and `vmap` accept without hardware. Every
operation runs on the CPU. A tensor of the pretend device that meets a CPU tensor which is no scalar
raises an error, as CUDA does. So a run on it gives the bits of the same run on the CPU, or shows
where tensors of two devices meet.

    with pretend_device() as device:
        learner = Learner(..., device=device)

Known limit: digests that contain the device's name differ, so that private runs draw other noise.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = "meta"
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
OF_MEMORY = (torch.Tensor.tolist, torch.Tensor.data_ptr, torch.Tensor.untyped_storage)
# CUDA takes indices that lie on the CPU.
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten.index_fill_.int_Scalar,
}


class PretendTensor(torch.Tensor):
    """Tensor of the pretend device; `inner` holds its values on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        outer = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
        )
        outer.inner = inner
        return outer

    def __repr__(self):
        return f"{type(self).__name__}({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, types)


def _unwrap(value):
    return value.inner if isinstance(value, PretendTensor) else value


def _wrap(value):
    plain = isinstance(value, torch.Tensor) and not isinstance(value, PretendTensor)
    return PretendTensor(value) if plain else value


def _run(func, args, kwargs, types):
    """Run an operation on the CPU, and return its result on the device that CUDA would choose."""
    if not {*types} <= {torch.Tensor, torch.nn.Parameter, PretendTensor}:
        return NotImplemented  # a class with operations of its own, such as a view of rows
    tensors = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, torch.Tensor)]
    here = [value for value in tensors if isinstance(value, PretendTensor)]
    elsewhere = [v for v in tensors if not isinstance(v, PretendTensor) and v.dim() > 0]
    if here and elsewhere and func not in COPIES | INDEXING:
        shapes = [[tuple(value.shape) for value in side] for side in (here, elsewhere)]
        raise RuntimeError(
            f"{func}: tensors on two devices, {shapes[0]} and on the cpu {shapes[1]}"
        )
    device = kwargs.get("device")
    on_cpu = kwargs if device is None else {**kwargs, "device": torch.device("cpu")}
    result = func(*tree_map(_unwrap, args), **tree_map(_unwrap, on_cpu))
    if device is not None:
        wrapped = torch.device(device).type == DEVICE
    elif func is aten.copy_.default:
        wrapped = isinstance(args[0], PretendTensor)
    else:
        wrapped = bool(here)
    if func is aten._to_copy.default and device is not None:
        result = result.clone() if result is _unwrap(args[0]) else result
        return PretendTensor(result) if wrapped else result
    if not wrapped or result is None:
        return result
    return return_and_correct_aliasing(func, args, kwargs, tree_map(_wrap, result))


class _Operations(TorchDispatchMode):
    """Catches the operations that make tensors from nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, types)


class _Values(TorchFunctionMode):
    """Makes on the CPU what torch would leave empty on "meta": tensors from lists and indices."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.new_tensor:
            device = torch.device(kwargs.pop("device", None) or args[0].device)
            kwargs.setdefault("dtype", args[0].dtype)
            made = torch.tensor(*args[1:], **kwargs)
            return PretendTensor(made) if device.type == DEVICE else made
        if func in (torch.tensor, torch.as_tensor) and _names_device(kwargs.get("device")):
            if isinstance(args[0], PretendTensor):
                return args[0]
            return PretendTensor(func(*args, **{**kwargs, "device": "cpu"}))
        if func in OF_MEMORY and isinstance(args[0], PretendTensor):
            return func(args[0].inner, *args[1:])
        indexing = func in (torch.Tensor.__setitem__, torch.Tensor.__getitem__)
        if indexing and isinstance(args[0], PretendTensor):
            index = args[1]
            index = tuple(map(_index, index)) if isinstance(index, tuple) else _index(index)
            args = (args[0], index, *args[2:])
        return func(*args, **kwargs)


def _names_device(device):
    return device is not None and torch.device(device).type == DEVICE


def _index(index):
    return PretendTensor(torch.tensor(index)) if isinstance(index, list) else index


class _Autocast(torch.autocast):
    """`torch.autocast` that takes the pretend device for the CPU."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu" if device_type == DEVICE else device_type, *args, **kwargs)


class _DeviceModule:
    """The module `torch.meta`, as `torch.cuda`: random numbers come from the CPU's generator."""

    device_count = staticmethod(lambda: 1)
    get_rng_state = staticmethod(lambda device=None: torch.empty(0))
    set_rng_state = staticmethod(lambda state, device=None: None)
    manual_seed = staticmethod(lambda seed: None)


def _of_cpu(function):
    def call(device_type=None, *args):
        if device_type is None:
            return function()
        return function("cpu" if device_type == DEVICE else device_type, *args)

    return call


@contextmanager
def pretend_device() -> Iterator[str]:
    """Context manager in which the device "meta" has values; returns the name of the device."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            patch.setattr(torch, name, _of_cpu(getattr(torch, name)))
        patch.setattr(torch, "autocast", _Autocast)
        patch.setattr(torch, DEVICE, _DeviceModule, raising=False)
        before = torch.__future__.get_swap_module_params_on_conversion()
        # `module.to` takes tensors of another class only so
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            with _Values(), _Operations():
                yield DEVICE
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)


def on_cpu(value):
    """Return tensors of any nesting on the CPU."""
    return tree_map(_unwrap, value)
