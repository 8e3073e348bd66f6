"""Published rules of two other doctors, at their published defaults, as callbacks of the learner.

SageMaker Debugger: the criteria of its documentation. AutoTrainer: Zhang et al. 2021, "AUTOTRAINER:
an automatic DNN training problem detection and repair system". Both read raw losses and gradients;
under privacy they get what a callback may read, which is the noisy gradient.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from perdure import Learner
from perdure.utils import evaluating

BOUNDS: dict[type[nn.Module], tuple[float, float]] = {
    nn.Tanh: (-9.5, 9.5),
    nn.Sigmoid: (-23.0, 17.0),
}
"""Inputs of an activation beyond which SageMaker Debugger calls it saturated."""


@dataclass(kw_only=True, eq=False)
class Published:
    """Collector of the numbers that the published rules read, and the rules themselves."""

    sagemaker: set[str] = field(default_factory=set)
    autotrainer: set[str] = field(default_factory=set)
    _before: dict[str, Tensor] = field(default_factory=dict)
    _unchanged: dict[str, int] = field(default_factory=dict)
    _losses: list[float] = field(default_factory=list)
    _validation: list[float] = field(default_factory=list)
    _accuracy: list[float] = field(default_factory=list)
    _epoch: int = 0

    def __call__(self, point: str, learner: Learner) -> None:
        """Read the numbers of a step, and of an epoch."""
        if point == "experience.begin":
            self._losses.clear()
            self._validation.clear()
            self._accuracy.clear()
            self._imbalance(learner)
            declared = learner.stream[learner.position.experience].train.declared_size
            self._epoch = max(1, math.ceil(declared / learner.batch_size))
            self._weights(learner)
        elif point == "step.sampled":
            self._before = {n: p.detach().clone() for n, p in learner.params.items()}
        elif point == "step.done":
            self._step(learner)
            if learner.position.step % self._epoch == 0:
                self._end_of_epoch(learner)

    def _step(self, learner: Learner) -> None:
        tensors = [(name, p, p.grad) for name, p in learner.params.items() if p.grad is not None]
        for name, value, gradient in tensors:
            if not bool(value.isfinite().all() and gradient.isfinite().all()):
                self.sagemaker.add("exploding gradient")
            if float(gradient.abs().mean()) < 1e-7:
                self.sagemaker.add("vanishing gradient")
            before = self._before[name]
            ratio = float((value.detach() - before).norm() / before.norm().clamp(min=1e-12))
            if ratio > 10:
                self.sagemaker.add("learning rate too high")
            if ratio < 1e-8:
                self.sagemaker.add("learning rate too low")
            same = torch.allclose(value, before)
            self._unchanged[name] = self._unchanged.get(name, 0) + 1 if same else 0
            if self._unchanged[name] >= 3:
                self.sagemaker.add("unchanged parameters")
        frozen = [p for p in learner.model.parameters() if not p.requires_grad]
        if frozen and learner.position.step >= 3:
            self.sagemaker.add("unchanged parameters")
        if learner.position.step == 10:
            self._weights(learner)
        shown = None if learner.privacy else learner.curator.diagnostics
        if shown is not None:
            self._losses.append(float(shown.loss))
            if len(self._losses) > 10 and self._losses[-1] >= self._losses[-11]:
                self.sagemaker.add("loss plateau")

    def _weights(self, learner: Learner) -> None:
        """Compare the variances of the layers' weights."""
        matrices = [p.detach() for p in learner.model.parameters() if p.dim() > 1]
        variances = [float(p.var()) for p in matrices]
        if min(variances) <= 0 or max(variances) / min(variances) > 10:
            self.sagemaker.add("initial variance")

    def _imbalance(self, learner: Learner) -> None:
        experience = learner.stream[learner.position.experience]
        if learner.privacy is None:
            counts = torch.bincount(experience.train.labels, minlength=learner.stream.num_classes)[
                list(experience.classes)
            ]
            if float(counts.max()) > 10 * float(counts.min()):
                self.sagemaker.add("class imbalance")

    def _end_of_epoch(self, learner: Learner) -> None:
        test = learner.stream[learner.position.experience].test
        with torch.no_grad(), evaluating(learner.model), self._activations(learner.model):
            outputs = learner.model(test.inputs)
        loss = float(nn.functional.cross_entropy(outputs, test.labels))
        self._validation.append(loss)
        right = outputs.argmax(-1) == test.labels
        self._accuracy.append(float(right.float().mean()))
        for label in sorted(set(test.labels.tolist())):
            error = 1 - float(right[test.labels == label].float().mean())
            if error > 0.7 and learner.position.step >= self._epoch * 2:
                self.sagemaker.add("class imbalance")
        if self._losses:
            train = sum(self._losses[-self._epoch :]) / self._epoch
            if loss - train > 0.1 * train:
                self.sagemaker.add("overfitting")
        best = min(range(len(self._validation)), key=self._validation.__getitem__)
        if len(self._validation) - 1 - best >= 10:
            self.sagemaker.add("overfitting")
        self._by_autotrainer(learner)

    def _by_autotrainer(self, learner: Learner) -> None:
        gradients = [p.grad for p in learner.params.values() if p.grad is not None and p.dim() > 1]
        first, last = (float(each.abs().mean()) for each in (gradients[0], gradients[-1]))
        if not math.isfinite(first + last) or (last > 0 and first / last > 70):
            self.autotrainer.add("exploding gradient")
        if last > 0 and first / last < 1e-3:
            self.autotrainer.add("vanishing gradient")
        zero = torch.cat([each.flatten() == 0 for each in gradients]).float().mean()
        if float(zero) >= 0.7:
            self.autotrainer.add("dead units")
        changes = [after - before for before, after in pairwise(self._accuracy)]
        falls = sum(change < -0.03 for change in changes)
        if len(changes) >= 5 and falls / len(changes) >= 0.2:
            self.autotrainer.add("learning rate too high")

    @contextmanager
    def _activations(self, model: nn.Module) -> Iterator[None]:
        """Look at the activations of the modules of a forward pass."""

        def look(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            if isinstance(module, nn.ReLU):
                active = (output > 0).float().mean(0)
                if float((active < 0.01).float().mean()) > 0.5:
                    self.sagemaker.add("dead units")
                return
            low, high = BOUNDS[type(module)]
            beyond = (inputs[0] < low) | (inputs[0] > high)
            if float(beyond.float().mean()) > 0.5:
                self.sagemaker.add("saturated activation")

        parts = [part for part in model.modules() if type(part) in (nn.ReLU, *BOUNDS)]
        handles = [part.register_forward_hook(look) for part in parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
