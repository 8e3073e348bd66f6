"""Explanations on plain tensors: Shapley values, local linear models, and their pictures."""

from perdure.explain.base import Attribution, Predict
from perdure.explain.lime import LocalModel, lime
from perdure.explain.plots import heat_maps
from perdure.explain.shapley import exact_shapley, kernel_shap

__all__ = [
    "Attribution",
    "LocalModel",
    "Predict",
    "exact_shapley",
    "heat_maps",
    "kernel_shap",
    "lime",
]
