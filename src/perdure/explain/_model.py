"""Adapter that turns every kind of model into a function from tensors to float64 outputs."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from perdure.errors import ConfigError, PerdureError
from perdure.utils.finite_outputs import finite_outputs
from perdure.utils.modules import evaluating

Rows = Tensor | np.ndarray[Any, Any]
"""Rows (n, ...) as a tensor or a numpy array."""


class Classifier(Protocol):
    """Model with probabilities, as in scikit-learn."""

    def predict_proba(self, rows: Any, /) -> Any:
        """Return probabilities (rows, classes)."""


class Regressor(Protocol):
    """Model with predictions, as in scikit-learn."""

    def predict(self, rows: Any, /) -> Any:
        """Return predictions (rows,) or (rows, outputs)."""


Predict = Callable[[Any], Any] | Classifier | Regressor
"""Model: row i of its outputs, (rows, outputs) or (rows,), depends on row i of its inputs only."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A model as a function from tensors (rows, ...) to float64 outputs (rows, outputs).

    A module runs in evaluation mode; its modes and running statistics do not change.

    Args:
        call: function of tensors or of numpy arrays.
        dtype: dtype of the rows that the function takes.
        takes_arrays: True if the function takes numpy arrays.
    """

    call: Callable[[Any], Any]
    dtype: torch.dtype
    takes_arrays: bool

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> Tensor:
        """Return (rows, outputs) float64 on the device of the rows.

        Raises:
            ConfigError: if the shape does not fit, or outputs are NaN or infinite.
        """
        module = self.call if isinstance(self.call, nn.Module) else None
        with evaluating(module) if module else nullcontext():
            answer = self.call(rows.cpu().numpy() if self.takes_arrays else rows)
        outputs = torch.as_tensor(answer, device=rows.device).detach()
        if outputs.shape == rows.shape[:1]:
            outputs = outputs[:, None]
        if outputs.ndim != 2 or len(outputs) != len(rows) or outputs.shape[1] == 0:
            allowed = f"({len(rows)}, outputs) or ({len(rows)},), one row per input"
            raise ConfigError.of("predict(inputs).shape", tuple(outputs.shape), allowed)
        return finite_outputs(outputs).double()


def adapted(predict: Predict, inputs: Rows, size: int) -> tuple[Model, Tensor, Tensor]:
    """Find the form of the inputs that the model takes.

    Args:
        predict: the model.
        inputs: (n, ...) instances.
        size: number of rows of one pass.

    Returns:
        The model, the inputs (n, ...) in its dtype, and its outputs (n, outputs) for them.

    Raises:
        ConfigError: if the model fails on every form.
    """
    rows = torch.as_tensor(inputs).detach()
    first: Exception | None = None
    for model in _forms(predict, rows, given_arrays=isinstance(inputs, np.ndarray)):
        cast = rows.to(model.dtype)
        try:
            outputs = torch.cat([model(part) for part in torch.split(cast, size)])
        except PerdureError:
            raise
        # A model may raise anything for a dtype that it does not take; the first error is shown.
        except Exception as error:
            first = first or error
        else:
            return model, cast, outputs
    text = " ".join(str(first).split())
    raise ConfigError(
        f"predict fails on inputs of shape {tuple(rows.shape)} and {rows.dtype}: "
        f"{type(first).__name__}: {text}; allowed: a torch module, a function of tensors or numpy "
        "arrays, or an object with predict_proba or predict"
    ) from first


def refuse_failing(model: Model, background: Tensor, size: int) -> None:
    """Refuse token numbers (b, ...) of a background that the model does not know.

    Raises:
        ConfigError: if the model fails on them.
    """
    try:
        for part in torch.split(background, size):
            model(part)
    except PerdureError:
        raise
    # A model may raise anything for a token beyond its vocabulary.
    except Exception as error:
        text = " ".join(str(error).split())
        shown = sorted(set(background.flatten().tolist()))
        raise ConfigError(
            f"predict fails on the background with the tokens {', '.join(map(str, shown))}: "
            f"{type(error).__name__}: {text}; allowed: tokens that the model knows"
        ) from error


def _forms(predict: Predict, rows: Tensor, *, given_arrays: bool) -> Iterator[Model]:
    """Yield the forms in which a model may take its rows, the likeliest first."""
    own = None
    if isinstance(predict, nn.Module):
        kinds = [False]
        floats = (each.dtype for each in predict.parameters() if each.is_floating_point())
        own = next(floats, None)
    elif callable(predict):
        kinds = [True, False] if given_arrays else [False, True]
    else:
        kinds = [True]
    default = torch.get_default_dtype()
    if rows.is_floating_point():
        dtypes = [own or rows.dtype, rows.dtype, default]
    else:
        # Floats first: attributions of a model of numbers need no other dtype. Models of token
        # numbers refuse floats, and get the integers.
        dtypes = [own or default, rows.dtype]
    for takes_arrays in kinds:
        for dtype in dict.fromkeys(dtypes):
            yield Model(call=_function(predict), dtype=dtype, takes_arrays=takes_arrays)


def _function(predict: Predict) -> Callable[[Any], Any]:
    if callable(predict):
        return predict
    for name in ("predict_proba", "predict"):
        found: Callable[[Any], Any] | None = getattr(predict, name, None)
        if found is not None:
            return found
    allowed = "a torch module, a function, or an object with predict_proba or predict"
    raise ConfigError.of("predict", predict, allowed)
