"""Table `[explain]` of a config."""

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from perdure.errors import ConfigError
from perdure.experiment.field_checks import COUNTS, check, counts
from perdure.experiment.from_tables import checked_value, extension, placed
from perdure.explain import Explainer
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
    """

    TABLE: ClassVar[str] = (
        "a table with method = NAME, records, drift, and the explainer's own fields"
    )

    method: str
    explainer: Explainer
    records: int = 6
    drift: bool = False

    def __post_init__(self) -> None:
        check(self, "records", counts, COUNTS)

    @classmethod
    def from_table(cls, table: Mapping[str, Any], where: str) -> "ExplainConfig":
        """Find the explainer by its name, and build it from the other fields of the table."""
        options = dict(table)
        records = checked_value(options.pop("records", cls.records), int, f"{where}.records")
        drift = checked_value(options.pop("drift", cls.drift), bool, f"{where}.drift")
        method, explainer = extension(find_explainer, explainer_names, "method", options, where)
        try:
            return cls(
                method=method,
                explainer=explainer,
                records=typing.cast(int, records),
                drift=typing.cast(bool, drift),
            )
        except ConfigError as error:
            raise ConfigError(placed(str(error), where, ("records", "drift"))) from None
