"""Base class of explainers, and the type of explanations, on plain tensors."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.utils.checked_fields import CheckedFields
from perdure.utils.finite_outputs import finite_outputs

Predict = Callable[[Tensor], Tensor]
"""Function from inputs (rows, ...) to outputs (rows, outputs); row i depends on input i only.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Attribution:
    """Result of an explainer: contribution of each feature to one output, for each instance.

    Args:
        values: (n, ...) contributions in the shape of the inputs, in units of the model's output.
        base: (n,) output of which the contributions are the difference, such as the mean output
            over the background.
        targets: (n,) int64, index of the explained output.
    """

    values: Tensor
    base: Tensor
    targets: Tensor

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.values)} of shape {tuple(self.values.shape[1:])})"


@dataclass(frozen=True, kw_only=True)
class Explainer(CheckedFields, ABC):
    """Base class of explainers, which compute the contribution of each feature to an output.

    A subclass is a frozen dataclass. Its fields are numbers and strings, so that a config can set
    them. Tensors in the shape of the data are arguments of `explain`.

    Args:
        chunk: largest number of rows in one forward pass.

    Raises:
        ConfigError: if a value is not allowed.
    """

    chunk: int = 8192

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ConfigError.of("chunk", self.chunk, "1 or more rows")

    @abstractmethod
    def explain(
        self,
        predict: Predict,
        inputs: Tensor,
        background: Tensor,
        *,
        targets: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Attribution:
        """Compute the contribution of every feature of every instance to one output.

        Guarantee: none. For a model that was released under privacy the explanation is
        post-processing, if `background` is public or synthetic.

        Args:
            predict: function (rows, ...) -> (rows, outputs), called without gradients.
            inputs: (n, ...) instances to explain.
            background: (b, ...) public or synthetic rows that give the values of absent features;
                some explainers do not use them.
            targets: (n,) int64 output to explain for each instance; None for the largest output.
            generator: CPU generator for the explainer's randomness; None for seed 0.
        """


def scores(predict: Predict, rows: Tensor, targets: Tensor) -> Tensor:
    """Return (rows,) float64 output `targets[i]` of the model for each row i."""
    outputs = predict(rows)
    if outputs.ndim != 2 or len(outputs) != len(rows):
        raise ConfigError.of(
            "predict(inputs).shape", tuple(outputs.shape), f"({len(rows)}, outputs)"
        )
    return finite_outputs(outputs).gather(1, targets[:, None]).squeeze(1).double()


@torch.no_grad()
def chosen_targets(predict: Predict, inputs: Tensor, targets: Tensor | None, chunk: int) -> Tensor:
    """Return the outputs (n,) to explain: the given ones, or each instance's largest output."""
    if targets is None:
        return torch.cat(
            [finite_outputs(predict(rows)).argmax(1) for rows in torch.split(inputs, chunk)]
        )
    if targets.shape != inputs.shape[:1] or targets.dtype != torch.int64:
        given = f"{tuple(targets.shape)} {targets.dtype}"
        raise ConfigError.of("targets", given, f"({len(inputs)},) int64, one output per instance")
    return targets.to(inputs.device)


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """Return the given generator; for None, a generator with seed 0, so that results repeat."""
    return torch.Generator().manual_seed(0) if generator is None else generator
