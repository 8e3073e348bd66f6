"""Recorder of the measurements of one experience of one party."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from perdure.contract.context import Context
from perdure.doctor.curvature import Curvature, hessian_extremes
from perdure.doctor.probing import probe_layers
from perdure.doctor.trace import Probe, Trace
from perdure.learner.learner import Learner
from perdure.tasks import SingleLabel, mask_outputs
from perdure.utils.modules import evaluating
from perdure.utils.seeding import generator, undisturbed

ROWS = 128
"""Number of public rows of a probe."""
PRODUCTS = 12
"""Products with the Hessian for its extreme eigenvalues."""
FIRST = 5
"""Number of steps at the beginning that are all measured: an explosion can be over in a few."""
SHAKE = 0.01
"""Norm of the random change of weights, relative to theirs, that measures sharpness."""


@dataclass(kw_only=True, eq=False)
class Recorder:
    """Measurements of one experience of one party.

    Nothing waits for a device between two probes: norms stay tensors until a trace is made.

    Args:
        learner: learner in training.
        every: number of steps between two measured steps.
        probe_every: number of steps between two probes.
        loss_shown: True to read the raw training loss of each step.
    """

    learner: Learner
    every: int
    probe_every: int
    loss_shown: bool
    probes: list[Probe] = field(default_factory=list)
    sharpness: float | None = None
    curvature: Curvature | None = None
    _norms: list[Tensor] = field(default_factory=list)
    _at: list[int] = field(default_factory=list)
    _losses: list[Tensor] = field(default_factory=list)
    _ratios: list[float] = field(default_factory=list)
    _before: list[Tensor] = field(default_factory=list)
    _measuring: bool = False
    _taken: int = 0

    def __post_init__(self) -> None:
        learner = self.learner
        self._taken = learner.position.step
        self.experience = learner.position.experience
        self.steps = learner.training.steps(self.experience)
        self._trained = dict(learner.session.trained)
        self._context: Context = learner.session.context(self.experience)
        # read now: a federation may let the learner's session go before its trace is asked for
        self._private = learner.curator.private
        self._mixed_loss = self._is_mixed()
        self._optimizer = learner.current_optimizer
        test = learner.stream[self.experience].test
        self._labels: Tensor | None = None
        if len(test):
            drawn = torch.randperm(len(test), generator=generator(0, "doctor", self.experience))
            rows = drawn[:ROWS].to(test.inputs.device)
            self._inputs = test.inputs[rows].to(learner.device)
            self._labels = test.labels[rows].to(learner.device)
        else:
            self._inputs = learner.curator.synthetic(ROWS).inputs
        self.probe()

    # ------------------------------------------------------------------ during a step

    def before_step(self) -> None:
        """Keep the weights before a step that is measured."""
        step = self.learner.position.step
        self._measuring = step % self.every == 0 or step < FIRST
        if not self._measuring:
            return
        now = [value.detach() for value in self._trained.values()]
        if self._before:
            torch._foreach_copy_(self._before, now)  # into the memory of the last measured step
        else:
            self._before = [value.clone() for value in now]

    def after_step(self) -> None:
        """Measure a step that the optimiser has taken."""
        step = self.learner.position.step
        self._taken = step
        if self.loss_shown:
            shown = self.learner.curator.diagnostics
            if shown is not None:
                self._losses.append(shown.loss)
        if self._measuring:
            self._measure(step - 1)
        if step % self.probe_every == 0 or step == self.steps:
            self.probe()

    def _measure(self, step: int) -> None:
        now = [value.detach() for value in self._trained.values()]
        kept = [value if value.grad is None else value.grad for value in self._trained.values()]
        gradients = torch._foreach_norm(kept)
        weights = torch._foreach_norm(self._before)
        torch._foreach_sub_(self._before, now)
        updates = torch._foreach_norm(self._before)
        self._norms.append(torch.stack([*gradients, *weights, *updates]))
        self._at.append(step)
        if self.learner.curator.private:
            self._ratios.append(self.learner.curator.signal_to_noise)
        self._measuring = False

    # ------------------------------------------------------------------ between steps

    def probe(self) -> None:
        """Run the model on public rows, and measure activations, loss and memory."""
        step = self.learner.position.step
        if self.probes and self.probes[-1].step == step:
            return
        outputs, layers = probe_layers(self.learner.model, self._inputs)
        self.probes.append(
            Probe(
                step=step,
                layers=layers,
                loss=self._loss(outputs),
                accuracy=self._accuracy(outputs),
                memory_bytes=_memory_bytes(outputs.device),
            )
        )

    def end(self) -> None:
        """Measure what is measured once, at the end of an experience."""
        self.probe()
        if self._labels is not None and self.sharpness is None:
            self.sharpness = self._sharpness()
            if not self.trace().is_learning:
                self.curvature = self._curvature()

    def _mask(self) -> Tensor | None:
        return None if self._context.scenario == "domain" else self._context.allowed

    def _loss(self, outputs: Tensor) -> float | None:
        if self._labels is None:
            return None
        losses = self._context.task.losses(outputs, self._labels, self._mask())
        return float(losses.float().mean())

    def _accuracy(self, outputs: Tensor) -> float | None:
        if self._labels is None or not isinstance(self._context.task, SingleLabel):
            return None
        best = mask_outputs(outputs, self._mask()).argmax(-1)
        return 100 * float((best == self._labels).float().mean())

    def _sharpness(self) -> float | None:
        """Rise of the public loss under a random change of the weights, relative to their norm."""
        before = self.probes[-1].loss
        model = self.learner.model
        draws = generator(0, "doctor", "sharpness")
        shaken = {}
        for name, value in self._trained.items():
            noise = torch.randn(value.shape, generator=draws).to(value.device, value.dtype)
            scale = SHAKE * value.detach().norm() / noise.norm().clamp(min=1e-12)
            shaken[name] = value.detach() + scale * noise
        with torch.no_grad(), evaluating(model), undisturbed():
            after = self._loss(functional_call(model, shaken, (self._inputs,)))
        return None if before is None or after is None else after - before

    def _curvature(self) -> Curvature | None:
        """Curvature of the public loss; None for a layer without a second derivative."""
        try:
            return hessian_extremes(
                self.learner, experience=self.experience, steps=PRODUCTS, rows=ROWS
            )
        except RuntimeError:
            return None

    # ------------------------------------------------------------------ what was measured

    def trace(self) -> Trace:
        """Return the measurements so far."""
        names = tuple(self._trained)
        table = torch.stack(self._norms).double().cpu() if self._norms else torch.empty(0, 0)
        count = len(names)
        losses = torch.stack(self._losses).float().tolist() if self._losses else ()
        return Trace(
            experience=self.experience,
            steps=self.steps,
            done=self._taken,
            private=self._private,
            names=names,
            matrices=tuple(value.dim() > 1 for value in self._trained.values()),
            at=tuple(self._at),
            gradients=table[:, :count],
            weights=table[:, count : 2 * count],
            updates=table[:, 2 * count :],
            losses=tuple(losses),
            signal_to_noise=tuple(self._ratios),
            probes=tuple(self.probes),
            chance=self._chance(),
            learning_rate=float(self._optimizer.param_groups[0].get("lr", 0.0)),
            mixed_loss=self._mixed_loss,
            robust_loss=self._resists_wrong_labels(),
            robust=self._robust(),
            adversary=self.learner.adversary,
            sharpness=self.sharpness,
            curvature=self.curvature,
        )

    def _is_mixed(self) -> bool:
        learner = self.learner
        dropout = any(
            isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0
            for part in learner.model.modules()
        )
        changed = bool(learner.adversary or learner.views or learner.mixing or learner.defence)
        memory = learner.training.of(learner.stream[self.experience]).memory
        return dropout or changed or (memory is not None and self.experience > 0)

    def _robust(self) -> tuple[float, ...]:
        """Return the accuracies under the attack of a validation, in this experience."""
        validation = self.learner.validation
        if validation is None or validation.attack is None:
            return ()
        measured = self.learner.validated
        return tuple(score for index, _, score in measured if index == self.experience)

    def _resists_wrong_labels(self) -> bool:
        loss = self._context.task.loss
        return loss is not None and loss.resists_wrong_labels

    def _chance(self) -> float | None:
        """Loss of a uniform guess, over the classes that may be predicted."""
        task = self._context.task
        if not isinstance(task, SingleLabel):
            return None
        allowed = self._context.allowed
        labels = allowed.nonzero().flatten()
        if task.loss is None or len(labels) < 2:
            return math.log(max(2, len(labels)))
        uniform = torch.zeros(len(labels), len(allowed), device=allowed.device)
        return float(task.losses(uniform, labels, allowed).mean())


def _memory_bytes(device: torch.device) -> int:
    """Memory in use: of the device if it counts it, else of the process; 0 if it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * 4096
