"""Table `[training.validation]` of a config."""

from dataclasses import dataclass

from perdure.adversarial import Attack
from perdure.data.experience import Stream
from perdure.experiment.attack_config import AttackConfig
from perdure.learner.validation import Validation
from perdure.utils.checked_fields import CheckedFields


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(CheckedFields):
    """Measurement on held-out training records, early stopping, and the best model.

    Args:
        share: share of the records of an experience that is held out.
        every: steps between two measurements, a number or a share of the steps of an experience.
        patience: measurements in a row without an improvement that end the experience.
        keep_best: end the experience with the parameters of the best measurement.
        attack: attack under which the accuracy is measured, against catastrophic overfitting of
            fast adversarial training; left out for the metric of the task.
    """

    share: float = 0.1
    every: int | float = 0.1
    patience: int = 3
    keep_best: bool = True
    attack: AttackConfig | None = None

    def __post_init__(self) -> None:
        self._with(None)  # its checks

    def on(self, stream: Stream) -> Validation:
        """Return the argument `validation` of `Learner`, with an attack that fits the stream."""
        return self._with(self.attack.on(stream) if self.attack else None)

    def _with(self, attack: Attack | None) -> Validation:
        return Validation(
            share=self.share,
            every=self.every,
            patience=self.patience,
            keep_best=self.keep_best,
            attack=attack,
        )
