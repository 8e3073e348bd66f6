"""The model as a function of its input, with given parameters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.contract.context import Context
from perdure.data.records import Batch
from perdure.types import Params
from perdure.utils.modules import evaluating

# --------------------------------------------------------------------------- running the model


class _Method(nn.Module):
    """Module that lets `functional_call` call another method of the model than `forward`."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module = module
        self.name = name

    def forward(self, *inputs: Tensor) -> Any:
        return getattr(self.module, self.name)(*inputs)


_Call = tuple[object, Tensor, int]
"""Call of `features`: its input, its output, and the number of writes to the output so far."""


@contextmanager
def _recorded_features(module: nn.Module) -> Iterator[list[_Call]]:
    """Context manager that records the calls of `features`, to use their results again."""
    calls: list[_Call] = []
    own = vars(module)
    method = getattr(module, "features", None)
    # skip an attribute `features` that is a submodule, and a method that was set on the object
    if not callable(method) or isinstance(method, nn.Module) or "features" in own:
        yield calls
        return

    graph = torch.is_grad_enabled()

    def features(*inputs: Any, **named: Any) -> Any:
        answer = method(*inputs, **named)
        plain = len(inputs) == 1 and not named and torch.is_grad_enabled() == graph
        if plain and isinstance(answer, Tensor) and not answer.is_inference():
            calls.append((inputs[0], answer, answer._version))
        return answer

    own["features"] = features
    try:
        yield calls
    finally:
        del own["features"]


class Forward:
    """The model as a function of its input, with given parameters.

    `forward(x)` returns logits (n, C). `forward.features(x)` returns the features (the input of the
    head). `forward.with_features(x)` returns both from one pass. `forward.method("decode")(z)`
    calls another method of the model. `forward.at(params)` is the same model with other parameters,
    without hooks and gradients, for use as a teacher; if `params` has running statistics, it uses
    them, too.

    Args:
        module: the model.
        params: parameters by name; None for the model's own parameters.
        frozen: True for a teacher, which has no hooks and no gradients.
    """

    def __init__(
        self, module: nn.Module, params: Params | None = None, *, frozen: bool = False
    ) -> None:
        self.module = module
        self.params = params
        self._frozen = frozen

    def __call__(self, x: Tensor) -> Tensor:
        """Return (n, C) logits."""
        logits: Tensor = self._run(self.module, self.params, x)
        return logits

    def features(self, x: Tensor) -> Tensor:
        """Return (n, f) features, which are the input of the head."""
        features: Tensor = self.method("features")(x)
        return features

    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, C) and features (n, f), from one pass if the model's `forward` allows it.

        A model may have a method of this name (see `perdure.models.wrap`). For other models, the
        calls of `features` inside `forward` are recorded. If `forward` does not call it exactly
        once on x, or changes its result in place, the features are computed by a second pass.
        """
        if callable(getattr(type(self.module), "with_features", None)):
            both: tuple[Tensor, Tensor] = self.method("with_features")(x)
            return both
        with _recorded_features(self.module) as calls:
            logits = self(x)
        if len(calls) == 1:
            entered, features, version = calls[0]
            if entered is x and features._version == version:
                return logits, features
        return logits, self.features(x)

    def method(self, name: str) -> Callable[..., Any]:
        """Return another method of the model as a function, with the same parameters as `forward`.

        The method takes tensors with one row per record.

        Hooks and book-keeping treat the layers and passes of the method as those of `forward`.
        """
        params = self.params and {f"module.{own}": value for own, value in self.params.items()}
        return partial(self._run, _Method(self.module, name), params)

    def at(self, params: Params) -> "Forward":
        """Return a teacher: the model with the parameters `params`, without gradients."""
        return Forward(self.module, params, frozen=True)

    def _run(self, module: nn.Module, params: Params | None, *inputs: Tensor) -> Any:
        if params is None:
            return module(*inputs)
        if not self._frozen:
            return torch.func.functional_call(module, params, inputs)
        with torch.no_grad(), evaluating(module):
            return torch.func.functional_call(module, params, inputs)


# --------------------------------------------------------------------------- the contract


def cross_entropy_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy (n,) of each row, for strategies that support single-label records only."""
    return F.cross_entropy(logits, labels, reduction="none")


def task_losses(forward: Forward, batch: Batch, context: Context) -> Tensor:
    """Loss (n,) of the task for each row, over the classes that the row may be predicted as.

    For single-label records this is the cross entropy.

    Args:
        forward: the model, from inputs (n, ...) to outputs (n, ..., C).
        batch: n rows.
        context: context with the task, and with the classes that each row may be predicted as.
    """
    return context.losses(forward(batch.inputs), batch)
