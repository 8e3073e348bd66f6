"""Forward pass of a model on public rows, with the activations of its layers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from perdure.doctor.trace import Layers
from perdure.utils.modules import evaluating
from perdure.utils.seeding import undisturbed

SILENT = 1e-4
"""Output of a rectifier, in size, up to which a unit counts as not active."""
ACTIVE_SHARE = 0.01
"""Share of rows on which a living unit is active, as in SageMaker Debugger's DeadRelu."""
BOUND = 0.01
"""Distance from its bounds, relative to its range, at which a tanh or sigmoid is saturated."""
RECTIFIERS = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.gelu, F.silu}
TANHS = {torch.tanh, Tensor.tanh, F.tanh}
SIGMOIDS = {torch.sigmoid, Tensor.sigmoid, F.sigmoid}


class _Watch(TorchFunctionMode):
    """Measure the activations of a forward pass, by the name of the module that computes them.

    It sees functions, so an activation needs no module of its own.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names
        self._inside: list[str] = []
        self.silent: dict[str, list[Tensor]] = {}
        self.saturated: dict[str, list[Tensor]] = {}
        self.spread: dict[str, list[Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function, and measure its output if it is an activation."""
        answer = func(*args, **(kwargs or {}))
        name = self._inside[-1] if self._inside else "model"
        if func in RECTIFIERS:
            self.silent.setdefault(name, []).append(_silent_units(answer))
        elif func in TANHS:
            self.saturated.setdefault(name, []).append(_share(answer.abs() > 1 - 2 * BOUND))
        elif func in SIGMOIDS:
            self.saturated.setdefault(name, []).append(_share((answer - 0.5).abs() > 0.5 - BOUND))
        return answer

    def enter(self, module: nn.Module, inputs: object) -> None:
        """Note that the forward pass of a module begins."""
        if id(module) in self._names:
            self._inside.append(self._names[id(module)])

    def leave(self, module: nn.Module, inputs: object, outputs: object) -> None:
        """Note that the forward pass of a module ends, and measure its outputs."""
        if id(module) not in self._names:
            return
        name = self._inside.pop()
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() > 1 and isinstance(outputs, Tensor):
            self.spread.setdefault(name, []).append(outputs.float().std())

    def layers(self) -> Layers:
        """Return the measurements; a layer that was called several times has their mean."""
        return Layers(
            silent=_means(self.silent), saturated=_means(self.saturated), spread=_means(self.spread)
        )


def _share(found: Tensor) -> Tensor:
    return found.float().mean()


def _silent_units(outputs: Tensor) -> Tensor:
    """Share () of units that are almost never active; a unit is a channel, or a feature."""
    unit = 1 if outputs.dim() == 4 else outputs.dim() - 1
    others = [axis for axis in range(outputs.dim()) if axis != unit]
    active = (outputs.abs() > SILENT).float().mean(dim=others)
    return _share(active < ACTIVE_SHARE)


def _means(found: Mapping[str, list[Tensor]]) -> dict[str, float]:
    if not found:
        return {}
    means = torch.stack([torch.stack(each).mean() for each in found.values()])
    return dict(zip(found, means.tolist(), strict=True))


@contextmanager
def _watching(model: nn.Module) -> Iterator[_Watch]:
    watch = _Watch({id(part): name or "model" for name, part in model.named_modules()})
    with ExitStack() as stack:
        # two hooks for all modules are set much faster than two for each module
        for handle in (
            register_module_forward_pre_hook(watch.enter),
            register_module_forward_hook(watch.leave),
        ):
            stack.callback(handle.remove)
        stack.enter_context(watch)
        yield watch


def probe_layers(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Layers]:
    """Run a model on public rows, in evaluation mode, and measure the activations of its layers.

    The modes of the model and the random numbers of the caller do not change.

    Args:
        model: any module.
        inputs: (n, ...) public rows.

    Returns:
        The outputs (n, ..., C), and the activations.
    """
    with torch.no_grad(), evaluating(model), undisturbed(), _watching(model) as watch:
        outputs: Tensor = model(inputs)
    return outputs, watch.layers()
