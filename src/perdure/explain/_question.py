"""Checked arguments of `Explainer.explain`, the same for every explainer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from perdure.errors import ConfigError, NonFiniteError
from perdure.explain._model import Model, Predict, Rows, adapted, refuse_failing
from perdure.explain.backgrounds import Background, TokenBackground
from perdure.utils.chunking import rows_per_pass

Targets = Rows | Sequence[int] | int | str | None
"""Outputs to explain: one for each instance, one for all instances, "all", or None."""

FORMS = 'an integer, one integer per instance, "all", or None for the largest output'


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """Model and instances in the form that the model takes.

    Args:
        model: function from tensors (rows, ...) to float64 outputs (rows, outputs).
        inputs: (n, ...) instances.
        background: (b, ...) rows for absent features in the same dtype; None if not given.
        targets: (n, k) int64 explained outputs of each instance; k is 1, or all outputs.
        every: True if all outputs are explained.
        outputs: (n, k) float64 explained outputs at the instances.
        dtype: floating dtype of attributions.
        chunk: largest number of rows in one forward pass.
        kept: (n, ...) bool, features that are always present; None if there are none.
    """

    model: Model
    inputs: Tensor
    background: Tensor | None
    targets: Tensor
    every: bool
    outputs: Tensor
    dtype: torch.dtype
    chunk: int
    kept: Tensor | None = None

    @property
    def absent(self) -> Tensor:
        """Background rows (b, ...), for explainers that need them."""
        if self.background is None:
            allowed = "public or synthetic rows, shaped as the inputs"
            raise ConfigError.of("background", None, allowed)
        return self.background

    def scores(self, rows: Tensor, owner: Tensor | None = None) -> Tensor:
        """Return the explained outputs (rows, k) float64 of the model, in one forward pass.

        Args:
            rows: (rows, ...) changed instances, at most `chunk`.
            owner: (rows,) index of the instance from which each row was made; None if row i is made
                from instance i.
        """
        return self.chosen(self.model(rows), owner)

    def chosen(self, outputs: Tensor, owner: Tensor | None = None) -> Tensor:
        """Choose the explained outputs (rows, k) from all outputs; see `scores`."""
        if not self.every:
            targets = self.targets if owner is None else self.targets[owner]
            outputs = outputs.gather(1, targets)
        return outputs

    def one_for_all(self, outputs: Tensor) -> Tensor:
        """Choose the explained outputs (n, k) from outputs (outputs,) that all instances share."""
        return finite_scores(outputs.expand(len(self.inputs), -1).gather(1, self.targets))

    def shaped(self, values: Tensor) -> Tensor:
        """Return values (n, ..., k) in the dtype of attributions, without k for a single output."""
        values = values.to(self.dtype)
        return values if self.every else values.squeeze(-1)


def question(
    predict: Predict,
    inputs: Rows,
    background: Background | None,
    targets: Targets,
    chunk: int | None,
) -> Question:
    """Check the arguments of `explain`; see `Explainer.question`."""
    given = _rows(inputs, "inputs", None)
    kept = None
    if isinstance(background, TokenBackground):
        background, kept = _tokens(background, given)
    others = None if background is None else _rows(background, "background", given.shape[1:])
    size = chunk or rows_per_pass(given.to(torch.float32) if given.ndim == 0 else given)
    model, rows, outputs = adapted(predict, inputs, size)
    found, every = _targets(targets, outputs)
    absent = None if others is None else _cast(others, rows)
    if absent is not None and not absent.is_floating_point():
        refuse_failing(model, absent, size)
    return Question(
        model=model,
        inputs=rows,
        background=absent,
        targets=found,
        every=every,
        outputs=finite_scores(outputs.gather(1, found)),
        dtype=given.dtype if given.is_floating_point() else torch.get_default_dtype(),
        chunk=chunk or rows_per_pass(rows),
        kept=kept,
    )


def _tokens(background: TokenBackground, given: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row of absent tokens, and True where the instances (n, length) have kept ones."""
    if given.is_floating_point() or given.ndim != 2:
        shown = f"{tuple(given.shape)} {given.dtype}"
        allowed = "whole numbers (n, length), one token each, with a TokenBackground"
        raise ConfigError.of("inputs", shown, allowed)
    kept = torch.tensor(list(background.kept), dtype=given.dtype, device=given.device)
    return torch.full_like(given[:1], background.baseline), torch.isin(given, kept)


def _cast(background: Tensor, rows: Tensor) -> Tensor:
    """Return the background in the dtype of the rows; a cast that changes a number is refused."""
    cast = background.to(rows)
    if not rows.is_floating_point() and not torch.equal(cast.to(background), background):
        raise ConfigError.of("background", background.dtype, f"whole numbers, as {rows.dtype}")
    return cast


def _rows(rows: Rows, name: str, shape: torch.Size | None) -> Tensor:
    """Return rows (n, ...) of numbers as a tensor; there must be at least one."""
    if not isinstance(rows, Tensor | np.ndarray):
        raise ConfigError.of(name, type(rows).__name__, "a tensor or a numpy array")
    try:
        tensor = torch.as_tensor(rows)
    except TypeError:
        raise ConfigError.of(f"{name}.dtype", str(rows.dtype), "numbers or booleans") from None
    if tensor.is_complex():
        raise ConfigError.of(f"{name}.dtype", str(tensor.dtype), "real numbers or booleans")
    if shape is None and (tensor.ndim < 2 or tensor.numel() == 0):
        allowed = "(n, ...), one row for each of n instances, at least one; for one use row[None]"
        raise ConfigError.of(f"{name}.shape", tuple(tensor.shape), allowed)
    if shape is not None and (tensor.shape[1:] != shape or len(tensor) == 0):
        allowed = f"(b, {', '.join(map(str, shape))}) with b of 1 or more, rows as in inputs"
        raise ConfigError.of(f"{name}.shape", tuple(tensor.shape), allowed)
    return tensor


def _targets(given: Targets, outputs: Tensor) -> tuple[Tensor, bool]:
    """Return the explained outputs (n, k), and True if these are all outputs."""
    n, count = outputs.shape
    device = outputs.device
    if given is None:
        return outputs.argmax(1, keepdim=True), False
    if isinstance(given, str):
        if given != "all":
            raise ConfigError.of("targets", given, FORMS)
        return torch.arange(count, device=device).expand(n, count), True
    targets = torch.as_tensor(given).to(device)
    integer = not (targets.is_floating_point() or targets.is_complex())
    if not integer or targets.dtype == torch.bool or targets.shape not in ((), (n,)):
        shown = f"{tuple(targets.shape)} {targets.dtype}"
        raise ConfigError.of("targets", shown, f"{FORMS}; there are {n} instances")
    wrong = targets[(targets < 0) | (targets >= count)]
    if len(wrong):
        raise ConfigError.of(
            "targets", int(wrong[0]), f"0 to {count - 1}, because the model has {count} outputs"
        )
    return targets.long().expand(n)[:, None], False


def finite_scores(outputs: Tensor) -> Tensor:
    """Refuse explained outputs (n, ..., k) that are infinite, as those of excluded classes are."""
    finite = torch.isfinite(outputs)
    if not bool(finite.all()):
        raise NonFiniteError(
            f"explained outputs of the model are infinite for {int((~finite).any(-1).sum())} of "
            f"{finite[..., 0].numel()} rows; allowed: finite outputs; explain outputs that the "
            "model allows"
        )
    return outputs
