"""AutoAttack: four attacks without settings, by their authors' code (Croce and Hein 2020)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from perdure.adversarial.base import Attack, InputLosses, Logits
from perdure.adversarial.objectives import Objective
from perdure.errors import ConfigError
from perdure.utils.extras import imported

if TYPE_CHECKING:
    from pyautoattack.autoattack import AttackName

LOWEST = -1e6
"""Logits at or below this number belong to masked classes."""


@dataclass(frozen=True, kw_only=True)
class AutoAttack(Attack):
    """Ensemble of APGD with two losses, FAB and Square, for evaluations; needs the extra `robust`.

    With fewer than four classes, its loss of differences of logits does not exist in its targeted
    form, and APGD and FAB run without targets; with two, APGD runs with cross entropy only. Square
    needs images (channels, height, width). Classes that are masked in all records are left out,
    because masked logits hide the gradient from it.

    Args:
        epsilon: radius of the ball; one number.
        norm: norm of the ball; see `Attack`.
        bounds: smallest and largest value of an input, one number each; the attack needs them.

    Source: Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks"; code of the package pyautoattack.
    """

    OWN_LOSSES: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.epsilon, Sequence) or self.epsilon == 0:
            raise ConfigError.of("epsilon", self.epsilon, "one number above 0")
        if self.bounds is None or any(isinstance(bound, Sequence) for bound in self.bounds):
            raise ConfigError.of("bounds", self.bounds, "(low, high), one number each")

    def perturb(
        self, losses: InputLosses, inputs: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Refuse to run: the attack needs logits and labels, so it serves evaluations only.

        Raises:
            ConfigError: always.
        """
        raise ConfigError.of(
            "adversary", "AutoAttack", "an attack on losses, such as PGD; AutoAttack evaluates only"
        )

    def against(
        self,
        predict: Logits,
        inputs: Tensor,
        labels: Tensor,
        *,
        objectives: Sequence[Objective],
        generator: torch.Generator | None,
    ) -> Tensor:
        """Return inputs (n, ...) after all attacks; they have their own losses.

        Raises:
            ConfigError: without a generator, or if the extra is missing.
        """
        if generator is None:
            raise ConfigError.of("generator", None, "a torch.Generator, for random starts")
        assert self.bounds is not None
        low, high = (float(bound) for bound in self.bounds)  # type: ignore[arg-type]
        span = high - low
        with torch.no_grad():
            logits = predict(inputs)
        allowed = (logits > LOWEST).any(0).nonzero().squeeze(1)
        places = torch.searchsorted(allowed, labels)
        pictures = inputs if inputs.ndim == 4 else inputs.flatten(1)
        model = _Unmasked(predict, allowed, inputs.shape[1:], low, span)
        seed = int(torch.randint(2**31, (), generator=generator))
        scaled = self._run(model, (pictures - low) / span, places, len(allowed), span, seed)
        return self._feasible(inputs, scaled.view_as(inputs) * span + low, self._limits(inputs))

    def _run(
        self, model: nn.Module, inputs: Tensor, labels: Tensor, classes: int, span: float, seed: int
    ) -> Tensor:
        """Run the package on inputs from 0 to 1; its global random numbers do not leave it."""
        package = imported("pyautoattack", "robust", "AutoAttack")
        assert isinstance(self.epsilon, int | float)
        names: list[AttackName] = ["apgd-ce", "apgd-t", "fab-t"]
        if classes < 4:
            names = ["apgd-ce", "apgd-dlr", "fab"] if classes == 3 else ["apgd-ce", "fab"]
        attack = package.AutoAttack(
            model,
            attacks=[*names, "square"] if inputs.ndim == 4 else names,
            device=inputs.device,
            eps=self.epsilon / span,
            norm={"linf": "Linf", "l2": "L2", "l1": "L1"}[self.norm],
            seed=seed,
            version="custom",
        )
        attack.apgd_targeted.n_target_classes = min(9, classes - 1)
        attack.fab.n_target_classes = min(9, classes - 1)
        with torch.random.fork_rng():
            found: Tensor = attack.run_standard_evaluation(inputs, labels, batch_size=len(inputs))[
                0
            ]
        return found


class _Unmasked(nn.Module):
    """Model of inputs from 0 to 1 whose outputs are the logits of the allowed classes."""

    def __init__(
        self, predict: Logits, allowed: Tensor, shape: torch.Size, low: float, span: float
    ) -> None:
        super().__init__()
        self._logits = (predict,)  # a module in a tuple is no submodule
        self._allowed = allowed
        self._shape = shape
        self._low = low
        self._span = span

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self._logits[0](rows.view(-1, *self._shape) * self._span + self._low)
        return logits[:, self._allowed]
