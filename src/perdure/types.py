"""Types that all packages share, each defined once."""

from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor

__all__ = ["SCENARIOS", "Params", "Scenario", "Tensors"]

Params = dict[str, Tensor]
"""Named parameters of a model, in the order of `named_parameters()`."""

Scenario = Literal["task", "domain", "class"]
"""Incremental learning of tasks, domains or classes (van de Ven et al. 2022)."""
SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)
"""All scenarios, in a tuple."""

Tensors = Mapping[str, Tensor]
"""Tensors by name, for reading only."""
