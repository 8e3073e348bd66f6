"""Rule: the signal grows or fades from layer to layer before any training."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace
from perdure.tasks import NextToken, SingleLabel
from perdure.utils.modules import evaluating
from perdure.utils.seeding import drawing_from

ROWS = 64
SERIES = "variance of the outputs of each layer"
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class InitialVariance(Rule):
    """Find initial weights with which the differences between records grow, fade, or are lost.

    The deviation of a layer is that of its outputs over random records, averaged over units; the
    outputs of different records differ by it.

    Symptom: the ratio of the variances of two layers is above `ratio`; or all units of a hidden
    layer have the same weights; or the first loss of a classifier is above `loss` times that of
    chance, ln C.

    Remedy: an initialisation that keeps the variance (He, Xavier, orthogonal).

    Source: SageMaker Debugger, PoorWeightInitialization (variance ratio), with the variance of
    outputs for that of weights; He, Zhang, Ren, Sun 2015, section 2.2. Own measurement: below
    2,000 on the library's models with PyTorch's initialisation, above 1e6 with weights of a tenth
    or ten times the size in three layers.

    Args:
        ratio: ratio of variances above which there is a finding.
        loss: first loss relative to chance above which there is a finding.
    """

    name: ClassVar[str] = "initial variance"
    cause: ClassVar[Cause] = "initialisation"
    source: ClassVar[str] = "SageMaker Debugger, PoorWeightInitialization; own measurement"
    explained_by: ClassVar[tuple[str, ...]] = (
        "dead units",
        "exploding gradient",
        "unscaled input",
        "vanishing gradient",
    )

    ratio: float = 1e5
    loss: float = 3.0

    def examine(self, case: Case) -> Finding | None:
        """Run random records through a copy of the model, and compare its layers."""
        variances = _variances(case)
        same = _equal_units(case.model)
        if same or not variances:
            return self._symmetric(same) if same else None
        # outputs that are all equal come from dead units before them, which have a rule
        variances = {name: value for name, value in variances.items() if value > 0} or variances
        least = min(variances, key=variances.__getitem__)
        most = max(variances, key=variances.__getitem__)
        ratio = variances[most] / variances[least] if variances[least] else math.inf
        if ratio <= self.ratio:
            return self._of_loss(case, variances)
        return self.finding(
            f"the variance of outputs over random records is {variances[most]:.3g} in {most!r} "
            f"and {variances[least]:.3g} in {least!r}",
            measured=min(ratio, 1e300),
            threshold=self.ratio,
            remedy=_remedy(),
            series=list(variances.values()),
            series_name=SERIES,
        )

    def watch(self, trace: Trace) -> Finding | None:
        """Look at the loss on public records before the first step of the first experience."""
        start = trace.public_start
        if trace.experience > 0 or start is None or trace.chance is None:
            return None
        if trace.probes[0].step > 0 or start <= self.loss * trace.chance:
            return None
        return self.finding(
            f"the loss on public records is {start:.3g} before training, {start / trace.chance:.2g}"
            " times that of chance",
            measured=min(start / trace.chance, 1e300),
            threshold=self.loss,
            remedy=_remedy(),
            series=tuple(trace.probes[0].layers.spread.values()),
            series_name="standard deviation of the outputs of each layer",
            experience=trace.experience,
            step=0,
        )

    def _of_loss(self, case: Case, variances: Mapping[str, float]) -> Finding | None:
        if not isinstance(case.task, SingleLabel | NextToken) or case.loss is not None:
            return None
        chance = math.log(max(2, case.stream.num_classes))
        outputs = case.outputs(case.random_inputs(ROWS))
        first = float(case.mean_loss(outputs, case.random_targets(ROWS))) / chance
        if first <= self.loss:
            return None
        return self.finding(
            f"the loss of random labels is {first:.3g} times that of chance before training, so "
            "the outputs are too large",
            measured=min(first, 1e300),
            threshold=self.loss,
            remedy=_remedy(),
            series=list(variances.values()),
            series_name=SERIES,
        )

    def _symmetric(self, layer: str) -> Finding:
        return self.finding(
            f"all units of {layer!r} have the same weights, so that they learn the same",
            measured=math.inf,
            threshold=self.ratio,
            remedy=_remedy(),
        )


def _remedy() -> Remedy:
    return Remedy(advice='init = "he"', changes={"model.init": "he"})


def _variances(case: Case) -> Mapping[str, float]:
    """Return the variance of each layer's outputs over random records, by the layer's name."""
    model = case.fresh_model()
    found: dict[str, float] = {}
    handles: list[RemovableHandle] = []
    for name, layer in model.named_modules():
        if isinstance(layer, LAYERS):
            handles.append(layer.register_forward_hook(_noting(found, name)))
    with torch.no_grad(), evaluating(model), drawing_from(case.seed):
        model(case.random_inputs(ROWS))
    for handle in handles:
        handle.remove()
    return found


def _noting(
    found: dict[str, float], name: str
) -> Callable[[nn.Module, tuple[object, ...], Tensor], None]:
    """Return a forward hook that notes the variance of a layer's outputs at its first call.

    A recurrent layer sees its initial state first, which is the same for all records. So a call
    with equal outputs counts only if there is no other.
    """

    def note(layer: nn.Module, inputs: tuple[object, ...], outputs: Tensor) -> None:
        if len(outputs) == ROWS and not found.get(name):
            found[name] = float(outputs.double().var(0).mean())

    return note


def _equal_units(model: nn.Module) -> str:
    """Return the name of the first hidden layer whose units all have the same weights."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LAYERS)]
    for name, layer in layers[:-1]:
        rows = layer.weight.detach().flatten(1)
        if len(rows) > 1 and bool((rows == rows[0]).all()):
            return str(name)
    return ""
