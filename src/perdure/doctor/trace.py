"""Measurements of a training, for rules that watch it.

A `Trace` is about one experience of one party. Norms are of whole tensors; they come from weights
and from gradients that the optimiser got, which are releases under privacy.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from perdure.adversarial import Attack
from perdure.doctor.curvature import Curvature
from perdure.learner.group_measures import GroupMeasures
from perdure.utils.checked_fields import CheckedFields

LEARNT = 0.9
"""Loss relative to its start, or to chance, below which a model has begun to learn."""
EARLY = 0.25
"""Share of an experience whose measurements count as those of its beginning."""


@dataclass(frozen=True, kw_only=True)
class Layers(CheckedFields):
    """Activations of one forward pass on public rows, by the name of the layer.

    Args:
        silent: share of units of a rectifier that are active on less than 1 % of the rows.
        saturated: share of values of a tanh or a sigmoid that are at their bounds.
        spread: standard deviation of the outputs of a layer with weights, over rows and units.
    """

    silent: Mapping[str, float] = field(default_factory=dict)
    saturated: Mapping[str, float] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Probe(CheckedFields):
    """Measurements of the model on public rows, at one step.

    Args:
        step: number of steps that were taken.
        layers: activations.
        loss: mean loss on public test records; None if there are none.
        accuracy: percent of public test records that are classified correctly; None if there are no
            test records, or their task has no classes.
        memory_bytes: memory of the process, or of the device if the model is on one.
    """

    step: int
    layers: Layers
    loss: float | None = None
    accuracy: float | None = None
    memory_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Round(CheckedFields):
    """Updates of one round of a federation, measured on a fixed sample of coordinates.

    Args:
        number: number of the round in its experience.
        norms: norm of each client's update.
        cosines: cosine of each client's update with the mean of the other clients' updates.
        sizes: declared number of records of each client in this experience.
        server_step: norm of the server's step.
        loss: loss of the new global model on public test records; None if there are none.
    """

    number: int
    norms: Mapping[int, float]
    cosines: Mapping[int, float]
    sizes: Mapping[int, int]
    server_step: float
    loss: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """Measurements of one experience in training, of one party.

    S is the number of measured steps, P the number of trained tensors.

    Args:
        experience: index of the experience.
        steps: number of steps of the experience.
        done: number of steps that were taken.
        private: True if the gradients are noisy releases.
        names: names of the trained tensors, in the order of the model.
        matrices: True for trained tensors with two dimensions or more.
        at: measured steps.
        gradients: (S, P) norms of the gradients that the optimiser got.
        weights: (S, P) norms of the tensors before the step.
        updates: (S, P) norms of the changes of the tensors in the step.
        losses: raw training loss of every step; empty under privacy, unless the diagnostics are
            raw. Level debug.
        signal_to_noise: energy of the released gradient over that of its noise, at the measured
            steps; empty without privacy.
        probes: measurements on public rows, oldest first.
        chance: loss of a uniform guess, by the loss of the training; None without classes.
        learning_rate: learning rate of the optimiser at the last measured step.
        mixed_loss: True if the training loss is not the loss of records like the public ones:
            because of dropout, an attack, views, or rows from memory.
        robust_loss: True if the loss of the training bounds what a wrong label can do.
        sharpness: rise of the public loss if weights change at random by 1 % of their norm; None
            before the end of the experience.
        curvature: curvature of the public loss at the end of an experience without progress; None
            elsewhere.
        matrix: accuracy matrix so far, if higher is better; empty before the first evaluation.
        chances: accuracy of a uniform guess after each experience, in percent.
        taken_by_new: share of public test records of earlier classes that are classified as a class
            of the newest experience; None without such records.
        memory_per_class: number of records that memory can hold for each class so far; None without
            a memory.
        rounds: rounds of a federation; empty for a party alone.
        groups: measures of groups of the experience's public test records; None if no groups are
            compared.
        group_counts: number of these records in each group (rows) and class (columns).
        learnt: accuracy of each experience right after it was trained, in percent, among the
            classes of this experience; NaN where it was not measured.
        guesses: accuracy of a uniform guess among these classes, in percent.
        state_bytes: bytes of the strategy's state after each experience, without stored records.
        model_bytes: bytes of the model's parameters and buffers.
        clean: accuracy on public test records at the end of the stream, in percent; None without an
            attack.
        attacked: accuracy on the same records under the attack.
        attack_epsilon: radius of the attack.
        adversary: attack of adversarial training; None for none.
        robust: accuracies under attack on the validation records of the experience, in percent,
            oldest first; () without a `Validation(attack=...)`.
    """

    experience: int
    steps: int
    done: int
    private: bool
    names: tuple[str, ...]
    matrices: tuple[bool, ...]
    at: tuple[int, ...] = ()
    gradients: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    weights: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    updates: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    losses: tuple[float, ...] = ()
    signal_to_noise: tuple[float, ...] = ()
    probes: tuple[Probe, ...] = ()
    chance: float | None = None
    learning_rate: float = 0.0
    mixed_loss: bool = False
    robust_loss: bool = False
    sharpness: float | None = None
    curvature: Curvature | None = None
    matrix: Sequence[Sequence[float]] = ()
    chances: tuple[float, ...] = ()
    taken_by_new: float | None = None
    memory_per_class: float | None = None
    rounds: tuple[Round, ...] = ()
    groups: GroupMeasures | None = None
    group_counts: tuple[tuple[float, ...], ...] = ()
    learnt: tuple[float, ...] = ()
    guesses: tuple[float, ...] = ()
    state_bytes: tuple[int, ...] = ()
    model_bytes: int = 0
    clean: float | None = None
    attacked: float | None = None
    attack_epsilon: float | None = None
    adversary: Attack | None = None
    robust: tuple[float, ...] = ()

    @property
    def share(self) -> float:
        """Share of the steps of the experience that were taken."""
        return self.done / self.steps if self.steps else 0.0

    @property
    def early(self) -> int:
        """Number of measured steps at the beginning of the experience, at least one if any."""
        found = sum(step < EARLY * self.steps for step in self.at)
        return max(found, min(1, len(self.at)))

    @property
    def update_ratios(self) -> tuple[float, ...]:
        """Norm of the update of all weights over their norm, at the measured steps."""
        if not self.at:
            return ()
        ratio = self.updates.norm(dim=1) / self.weights.norm(dim=1).clamp(min=1e-12)
        return tuple(ratio.tolist())

    @property
    def gradient_norms(self) -> tuple[float, ...]:
        """Norm of the whole gradient, at the measured steps."""
        return tuple(self.gradients.norm(dim=1).tolist()) if self.at else ()

    @property
    def public_start(self) -> float | None:
        """Public loss before the first step; None without public test records."""
        return self.public_losses[0] if self.public_losses else None

    @property
    def is_learning(self) -> bool:
        """True if the recent loss is at least a tenth below the loss at the start, or at chance."""
        starts = [each for each in (self.public_start, self.chance) if each is not None]
        if not starts and self.losses:
            starts = [self.smoothed_losses()[0]]
        now = self.loss_now
        return not starts or now is None or now < LEARNT * min(starts)

    @property
    def layer_gradients(self) -> Tensor:
        """(S, L) gradient norms of the tensors with two dimensions or more."""
        if not self.at:
            return torch.empty(0, 0)
        return self.gradients[:, torch.tensor(self.matrices, dtype=torch.bool)]

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the tensors with two dimensions or more."""
        return tuple(name for name, many in zip(self.names, self.matrices, strict=True) if many)

    @property
    def finite(self) -> bool:
        """True if no measured loss, gradient or weight is NaN or infinite."""
        numbers = torch.tensor(self.losses or (0.0,))
        return all(
            bool(values.isfinite().all())
            for values in (numbers, self.gradients, self.updates, self.weights)
        )

    @property
    def public_losses(self) -> tuple[float, ...]:
        """Losses on public test records, oldest first."""
        return tuple(probe.loss for probe in self.probes if probe.loss is not None)

    def smoothed_losses(self, windows: int = 20) -> tuple[float, ...]:
        """Medians of the raw training losses of each window, oldest first.

        Args:
            windows: number of windows, fewer if there are fewer steps.
        """
        size = max(1, len(self.losses) // windows)
        return tuple(
            statistics.median(self.losses[start : start + size])
            for start in range(0, len(self.losses) - size + 1, size)
        )

    def excess_losses(self) -> tuple[float, ...]:
        """Training loss after each probe minus the public loss at it, once the model has learnt.

        The training loss is the median over the steps up to the next probe, so that a loss that
        falls quickly has no excess.
        """
        starts = [each for each in (self.public_start, self.chance) if each is not None]
        first = self.probes[0].step if self.probes else 0
        found = []
        for probe, after in pairwise(self.probes):
            following = self.losses[probe.step - first : after.step - first]
            if probe.loss is not None and following and probe.loss < LEARNT * min(starts):
                found.append(statistics.median(following) - probe.loss)
        return tuple(found)

    @property
    def loss_now(self) -> float | None:
        """Recent training loss, smoothed; under privacy the recent public loss; None if unknown."""
        smoothed = self.smoothed_losses()
        if smoothed:
            return statistics.median(smoothed[-3:])
        public = self.public_losses
        return statistics.median(public[-3:]) if public else None


def rounded(value: float) -> float:
    """Round to one significant digit, for a setting in a remedy."""
    return float(f"{value:.1g}")
