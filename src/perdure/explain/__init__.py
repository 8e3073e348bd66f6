"""Explanations on plain tensors: Shapley values, local linear models, measures, and pictures.

    from perdure.explain import find    # find("kernel_shap") is KernelSHAP

To add an explainer, add a file `my_explainer.py` with one class `MyExplainer(Explainer)`.
"""

from typing import TYPE_CHECKING, TypeGuard

from perdure.explain._model import Predict
from perdure.explain.backgrounds import Background, TokenBackground, constant_background
from perdure.explain.base import Attribution, Explainer
from perdure.explain.deep_lift_shap import DeepLiftSHAP
from perdure.explain.exact_shapley import ExactShapley
from perdure.explain.fidelity import (
    deletion_area,
    faithfulness_correlation,
    insertion_area,
    max_sensitivity,
    rank_correlation,
    sparsity,
    top_overlap,
)
from perdure.explain.grad_cam import GradCAM
from perdure.explain.gradient_shap import GradientSHAP
from perdure.explain.groups import column_groups, grid_groups, segment_groups, token_groups
from perdure.explain.integrated_gradients import IntegratedGradients
from perdure.explain.kernel_shap import KernelSHAP
from perdure.explain.lime import LIME, LocalModel
from perdure.explain.plots import heat_maps
from perdure.explain.stability import stability
from perdure.utils.extensions import Extensions, is_proper_subclass

__all__ = [
    "LIME",
    "Attribution",
    "Background",
    "DeepLiftSHAP",
    "ExactShapley",
    "Explainer",
    "GradCAM",
    "GradientSHAP",
    "IntegratedGradients",
    "KernelSHAP",
    "LocalModel",
    "Predict",
    "TokenBackground",
    "column_groups",
    "constant_background",
    "deletion_area",
    "faithfulness_correlation",
    "find",
    "grid_groups",
    "heat_maps",
    "insertion_area",
    "max_sensitivity",
    "names",
    "rank_correlation",
    "segment_groups",
    "sparsity",
    "stability",
    "token_groups",
    "top_overlap",
]


def _is_explainer(value: object) -> TypeGuard[type[Explainer]]:
    return is_proper_subclass(value, Explainer)


_EXTENSIONS = Extensions(
    kind="explainer",
    package=__name__,
    group="perdure.explainers",
    fits=_is_explainer,
    wanted="a subclass of perdure.explain.Explainer",
    helpers=("backgrounds", "base", "fidelity", "groups", "plots", "stability"),
)


def names() -> tuple[str, ...]:
    """Return the sorted names of all explainers: files of this package, and entry points."""
    return _EXTENSIONS.names()


def find(name: str, *, field: str = "explainer") -> type[Explainer]:
    """Return the class of an explainer.

    Args:
        name: one of `names()`, or "my_package.my_module:MyExplainer".
        field: name of the setting or argument with this value, for the error message.

    Raises:
        ConfigError: if there is no such explainer, or it cannot be imported.
    """
    return _EXTENSIONS.find(name, field=field)


# Hidden from type checkers: they would take every name for one that exists.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> type[Explainer]:
        return _EXTENSIONS.attribute(name)
