"""Table `[explain]` of a config."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from perdure.errors import ConfigError
from perdure.experiment.field_checks import COUNTS, check, counts
from perdure.experiment.from_tables import checked_value, extension, placed, read_hints
from perdure.explain import Background, Explainer, constant_background
from perdure.explain import find as find_explainer
from perdure.explain import names as explainer_names
from perdure.utils.checked_fields import CheckedFields


@dataclass(frozen=True, kw_only=True)
class ExplainConfig(CheckedFields):
    """Explanations of predictions after the first and the last experience.

    Args:
        method: one of `perdure.explain.names()`, or "my_package.my_module:MyExplainer".
        explainer: the explainer with the values of its own fields.
        records: number of test records that are explained: of the first experience, and with drift
            of every experience.
        drift: measure after every experience, in every arm, how far the explanations of the test
            records of earlier experiences have moved.
        baseline: value of absent features; for token numbers the token of an absent one, such as
            that of a mask or of padding.
        kept: tokens that are always present, such as those at the start and end of a text.
    """

    TABLE: ClassVar[str] = (
        "a table with method = NAME, records, drift, baseline, kept, and the explainer's own fields"
    )

    OWN: ClassVar[tuple[str, ...]] = ("records", "drift", "baseline", "kept")
    """Keys of the table that are not the explainer's."""

    method: str
    explainer: Explainer
    records: int = 6
    drift: bool = False
    baseline: float = 0.0
    kept: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check(self, "records", counts, COUNTS)
        check(self, "baseline", math.isfinite, "a finite number")
        check(self, "kept", lambda kept: min(kept, default=0) >= 0, "token numbers from 0")

    def background(self, inputs: Tensor) -> Background:
        """Return the background of instances (n, ...): public, as it does not use their values.

        Raises:
            ConfigError: if the baseline or the kept tokens do not fit the instances.
        """
        return constant_background(inputs, self.baseline, kept=self.kept)

    @classmethod
    def from_table(cls, table: Mapping[str, Any], where: str) -> "ExplainConfig":
        """Find the explainer by its name, and build it from the other fields of the table."""
        options = dict(table)
        hints = read_hints(cls, where)
        own: dict[str, Any] = {
            name: checked_value(options.pop(name), hints[name], f"{where}.{name}")
            for name in cls.OWN
            if name in options
        }
        method, explainer = extension(find_explainer, explainer_names, "method", options, where)
        try:
            return cls(method=method, explainer=explainer, **own)
        except ConfigError as error:
            raise ConfigError(placed(str(error), where, cls.OWN)) from None
