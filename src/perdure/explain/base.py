"""Base class of explainers, and the type of explanations, on plain tensors."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.explain._model import Predict, Rows
from perdure.explain._question import Question, Targets, question
from perdure.explain.backgrounds import Background
from perdure.utils.checked_fields import CheckedFields

if TYPE_CHECKING:
    from shap import Explanation

__all__ = [
    "Attribution",
    "Background",
    "Explainer",
    "Predict",
    "Question",
    "Rows",
    "Targets",
    "attribution",
    "seeded",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Attribution:
    """Result of an explainer: contribution of each feature to an output, for each instance.

    With `targets="all"` there are k outputs; otherwise the last dimension is left out.

    Args:
        values: (n, ...) or (n, ..., k) contributions in the shape of the inputs, in units of the
            explained output.
        base: (n,) or (n, k) output of which the contributions are the difference, such as the mean
            output over the background.
        targets: (n,) or (n, k) int64, index of the explained output.
        outputs: (n,) or (n, k) explained output of the model at the instances, where the explainer
            keeps it.
    """

    values: Tensor
    base: Tensor
    targets: Tensor
    outputs: Tensor | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.values)} of shape {tuple(self.values.shape[1:])})"

    @property
    def additivity_gap(self) -> Tensor:
        """Model's output less base and contributions, (n,) or (n, k); 0 for Shapley values.

        Raises:
            ConfigError: if the explainer did not keep the outputs.
        """
        if self.outputs is None:
            raise ConfigError.of("attribution.outputs", None, "the outputs, kept by the explainer")
        dims = tuple(range(1, self.values.ndim - self.base.ndim + 1))
        return self.outputs - self.base - self.values.sum(dims)

    def by_group(self, groups: Tensor) -> Tensor:
        """Sum the contributions of the features of each group, (n, groups) or (n, groups, k).

        Args:
            groups: (...) integers in the shape of one instance; the columns are in their order.
        """
        members = torch.unique(groups.flatten().cpu(), return_inverse=True)[1]
        flat = self.values.flatten(1, groups.ndim)
        sums = flat.new_zeros(len(flat), int(members.max()) + 1, *flat.shape[2:])
        return sums.index_add(1, members.to(flat.device), flat)

    def to_shap(
        self, inputs: Rows | None = None, *, feature_names: Sequence[str] | None = None
    ) -> "Explanation":
        """Return the values as `shap.Explanation`, for the plots of the package `shap`.

        Args:
            inputs: (n, ...) the instances, which plots show beside the values.
            feature_names: name of each feature.

        Raises:
            ConfigError: if the package `shap` is not installed.
        """
        try:
            from shap import Explanation
        except ImportError:
            raise ConfigError("to_shap needs the package shap; pip install shap") from None
        data = None if inputs is None else torch.as_tensor(inputs).detach().cpu().numpy()
        return Explanation(
            values=self.values.detach().cpu().numpy(),
            base_values=self.base.detach().cpu().numpy(),
            data=data,
            feature_names=None if feature_names is None else list(feature_names),
        )


@dataclass(frozen=True, kw_only=True)
class Explainer(CheckedFields, ABC):
    """Base class of explainers, which compute the contribution of each feature to an output.

    A subclass is a frozen dataclass. Its fields are numbers and strings, so that a config can set
    them. Tensors in the shape of the data are arguments of `explain`.

    Args:
        chunk: largest number of rows in one forward pass; None for a size that suits the caches.
            It changes values by rounding only.

    Raises:
        ConfigError: if a value is not allowed.
    """

    NEEDS_GRADIENTS: ClassVar[bool] = False
    """True if the model must have gradients of its outputs by its inputs."""

    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ConfigError.of("chunk", self.chunk, "1 or more rows")

    @abstractmethod
    def explain(
        self,
        predict: Predict,
        inputs: Rows,
        background: Background,
        *,
        targets: Targets = None,
        generator: torch.Generator | None = None,
    ) -> Attribution:
        """Compute the contribution of every feature of every instance to one output, or to all.

        Guarantee: none. For a model that was released under privacy the explanation is
        post-processing, if `background` is public or synthetic. A background of private records
        must be released first. An explanation of a record reveals its features: values are 0 where
        the record equals the background, and of a linear model they are the record itself. So an
        explanation of a private record is as private as the record.

        Args:
            predict: the model: a torch module, a function (rows, ...) -> (rows, outputs) or (rows,)
                of tensors or of numpy arrays, or an object with `predict_proba` or `predict` as in
                scikit-learn. Row i of the result depends on row i only. It is called without
                gradients, unless the explainer needs them.
            inputs: (n, ...) instances to explain. Integers and booleans are explained as floats of
                the same values, if the model takes them.
            background: (b, ...) public or synthetic rows that give the values of absent features,
                or a `TokenBackground` for token numbers; some explainers do not use it.
            targets: output to explain: (n,) integers, one for each instance; an integer for all
                instances; "all" for every output in one pass; None for each instance's largest.
            generator: CPU generator for the explainer's randomness; None for seed 0.
        """

    def unknowns(self, shape: Sequence[int]) -> int:
        """Return the number of features, or of groups, of an instance of this shape.

        A run calls it before the training, so that a config is refused early.

        Raises:
            ConfigError: if the explainer's fields do not suffice for so many.
        """
        return math.prod(shape)

    def try_on(self, predict: Predict, inputs: Rows, background: Background) -> None:
        """Refuse a model that cannot be explained, by a few passes over one instance.

        A run calls it with the untrained model, so that a config is refused early.

        Args:
            predict: see `explain`.
            inputs: (1, ...) an instance.
            background: see `explain`.

        Raises:
            ConfigError: as `explain` would.
        """
        self.question(predict, inputs, background, 0)

    def question(
        self, predict: Predict, inputs: Rows, background: Background | None, targets: Targets
    ) -> Question:
        """Check the arguments of `explain`, and return them in one form for all kinds of models.

        Args:
            predict: see `explain`.
            inputs: see `explain`.
            background: see `explain`; None where it is not used.
            targets: see `explain`.

        Raises:
            ConfigError: if an argument is not allowed, or the model fails on the inputs.
        """
        return question(predict, inputs, background, targets, self.chunk)


def attribution(asked: Question, values: Tensor, base: Tensor) -> Attribution:
    """Make the result of an explainer.

    Args:
        asked: the checked arguments of `explain`.
        values: (n, features, k) contributions to the k explained outputs.
        base: (n, k) outputs of which the contributions are the difference.
    """
    return Attribution(
        values=asked.shaped(values.reshape(*asked.inputs.shape, -1)),
        base=asked.shaped(base),
        targets=asked.targets if asked.every else asked.targets[:, 0],
        outputs=asked.shaped(asked.outputs),
    )


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """Return the given generator; for None, a generator with seed 0, so that results repeat."""
    return torch.Generator().manual_seed(0) if generator is None else generator
