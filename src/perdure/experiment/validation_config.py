"""Table `[training.validation]` of a config."""

from dataclasses import dataclass

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
    """

    share: float = 0.1
    every: int | float = 0.1
    patience: int = 3
    keep_best: bool = True

    def __post_init__(self) -> None:
        _ = self.validation  # its checks

    @property
    def validation(self) -> Validation:
        """Settings as the argument `validation` of `Learner`."""
        return Validation(
            share=self.share,
            every=self.every,
            patience=self.patience,
            keep_best=self.keep_best,
        )
