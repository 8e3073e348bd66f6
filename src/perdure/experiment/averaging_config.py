"""Table `[training.averaging]` of a config."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from perdure.errors import ConfigError
from perdure.experiment.from_tables import build, named_option
from perdure.learner.averaging import EMA, SWA
from perdure.utils.checked_fields import CheckedFields

AVERAGES: dict[str, type[EMA] | type[SWA]] = {"ema": EMA, "swa": SWA}
"""Averages of the parameters, by their names in a config."""


@dataclass(frozen=True, kw_only=True)
class AveragingConfig(CheckedFields):
    """Average of the parameters over the steps of an experience, by which the model answers.

    Args:
        name: `ema` for an exponential moving average, `swa` for the mean over the last steps.
        averaging: average as the argument `averaging` of `Learner`.
    """

    TABLE: ClassVar[str] = 'a table with name = "ema" or "swa" and the average\'s own fields'

    name: str
    averaging: EMA | SWA

    @classmethod
    def from_table(cls, table: Mapping[str, Any], where: str) -> "AveragingConfig":
        """Find the average by its name, and build it from the table's other keys."""
        name, options = named_option("name", table, where, tuple(AVERAGES))
        if name not in AVERAGES:
            raise ConfigError.of(f"{where}.name", name, tuple(AVERAGES))
        return cls(name=name, averaging=build(AVERAGES[name], options, where))
