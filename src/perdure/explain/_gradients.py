"""Explainers of the package captum, which need gradients of the outputs by the inputs."""

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from perdure.errors import ConfigError
from perdure.explain.base import (
    Attribution,
    Background,
    Explainer,
    Predict,
    Question,
    Rows,
    Targets,
    attribution,
    seeded,
)
from perdure.utils.extras import imported
from perdure.utils.modules import evaluating_with_gradients

KERNELS = "kernel_shap or lime, which need outputs only"


class Network(nn.Module):
    """The model as a module from inputs (rows, ...) to outputs (rows, outputs), for captum.

    Args:
        asked: checked arguments of `explain`.
        body: module that the model runs; None if it is not known.
    """

    def __init__(self, asked: Question, body: nn.Module | None) -> None:
        super().__init__()
        self.body = body
        self._call = asked.model.call

    def forward(self, rows: Tensor) -> Tensor:
        """Return outputs (rows, outputs) with their graph."""
        outputs: Tensor = self._call(rows)
        return outputs[:, None] if outputs.ndim == 1 else outputs


@dataclass(frozen=True, kw_only=True)
class GradientExplainer(Explainer):
    """Base class of explainers by captum; see `Explainer`.

    The model must be a torch module, a learner's predictor, or a function of tensors that keeps
    gradients. Its modes and the gradients of its parameters do not change.
    """

    NEEDS_GRADIENTS: ClassVar[bool] = True

    def unknowns(self, shape: Sequence[int]) -> int:
        """Return the number of features, if captum is installed; see `Explainer.unknowns`."""
        self._captum()
        return super().unknowns(shape)

    def explain(
        self,
        predict: Predict,
        inputs: Rows,
        background: Background,
        *,
        targets: Targets = None,
        generator: torch.Generator | None = None,
    ) -> Attribution:
        """Compute contributions from gradients, with one call of captum for each target.

        Raises:
            ConfigError: if an argument is not allowed, the model has no gradients of its outputs by
                its inputs, or captum is not installed.
        """
        captum = self._captum()
        asked = self.question(predict, inputs, background, targets)
        body = predict if isinstance(predict, nn.Module) else getattr(predict, "model", None)
        network = Network(asked, body if isinstance(body, nn.Module) else None)
        seed = int(torch.randint(2**31, (), generator=seeded(generator)))
        modes = evaluating_with_gradients(network.body) if network.body else nullcontext()
        with modes, torch.enable_grad():
            _require_gradients(self, asked, network)
            columns = []
            for target in asked.targets.unbind(1):
                with _draws(seed, asked.inputs.device), _without_captum_warnings():
                    columns.append(self._values(captum, asked, network, target))
        values = torch.stack([each.detach().flatten(1) for each in columns], -1)
        return self._result(asked, values)

    def try_on(self, predict: Predict, inputs: Rows, background: Background) -> None:
        """Explain the instance, because captum refuses some models late; see `Explainer`."""
        self.explain(predict, inputs, background, targets=0)

    @abstractmethod
    def _values(self, captum: Any, asked: Question, network: Network, target: Tensor) -> Tensor:
        """Return contributions (n, ...) to the outputs `target` (n,)."""

    def _result(self, asked: Question, values: Tensor) -> Attribution:
        """Make the result with the mean output of the background as its base."""
        outputs = torch.cat([asked.model(part) for part in torch.split(asked.absent, asked.chunk)])
        return attribution(asked, values, asked.one_for_all(outputs.mean(0)))

    def _captum(self) -> Any:
        return imported("captum.attr", "explain", type(self).__name__)


def _require_gradients(explainer: Explainer, asked: Question, network: Network) -> None:
    """Refuse a model of which captum would find no gradients."""
    name = type(explainer).__name__
    if asked.model.takes_arrays:
        allowed = f"a torch module or a function of tensors for {name}; for arrays use {KERNELS}"
        raise ConfigError.of("predict", "a function of numpy arrays", allowed)
    if not asked.inputs.is_floating_point():
        allowed = f"floats for {name}; for token numbers use {KERNELS}"
        raise ConfigError.of("inputs.dtype", str(asked.inputs.dtype), allowed)
    row = asked.inputs[:1].clone().requires_grad_()
    outputs = network(row)
    if not outputs.requires_grad:
        allowed = f"a model with gradients of its outputs by its inputs for {name}, or {KERNELS}"
        raise ConfigError.of("predict", "a model without gradients", allowed)


@contextmanager
def _draws(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators that captum draws from, and restore them afterwards."""
    state = np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)


@contextmanager
def _without_captum_warnings() -> Iterator[None]:
    """Hide the notes of captum about its own hooks and about inputs that require no gradient."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="captum")
        yield


def by_pieces(asked: Question, rows_each: int) -> Iterator[slice]:
    """Cut the instances into slices whose passes have at most `asked.chunk` rows, if one fits.

    Args:
        asked: checked arguments of `explain`.
        rows_each: rows of a pass for one instance.
    """
    size = max(1, asked.chunk // rows_each)
    for start in range(0, len(asked.inputs), size):
        yield slice(start, start + size)
