"""Types that every layer shares, each defined once."""

from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor

Params = dict[str, Tensor]
"""Named parameters of a model, in the order of `named_parameters()`."""

Scenario = Literal["task", "domain", "class"]
SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)

Tensors = Mapping[str, Tensor]
