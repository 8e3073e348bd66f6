"""Table `[training.mixing]` of a config."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from perdure.data.mixing import CutMix, Mixing, Mixup
from perdure.errors import ConfigError
from perdure.experiment.from_tables import build, named_option
from perdure.utils.checked_fields import CheckedFields

MIXINGS: dict[str, type[Mixup] | type[CutMix]] = {"mixup": Mixup, "cutmix": CutMix}
"""Ways to mix pairs of records, by their names in a config."""


@dataclass(frozen=True, kw_only=True)
class MixingConfig(CheckedFields):
    """Mixed pairs of records in every step; not for private arms.

    Args:
        name: `mixup` for weighted means, `cutmix` for boxes of other images.
        mixing: way to mix as the argument `mixing` of `Learner`.
    """

    TABLE: ClassVar[str] = 'a table with name = "mixup" or "cutmix", and alpha'

    name: str
    mixing: Mixing

    @classmethod
    def from_table(cls, table: Mapping[str, Any], where: str) -> "MixingConfig":
        """Find the way to mix by its name, and build it from the table's other keys."""
        name, options = named_option("name", table, where, tuple(MIXINGS))
        if name not in MIXINGS:
            raise ConfigError.of(f"{where}.name", name, tuple(MIXINGS))
        try:
            return cls(name=name, mixing=build(MIXINGS[name], options, where))
        except ConfigError as error:
            message = str(error).replace(f"{where}: mixing.", f"{where}.")
            raise ConfigError(message) from None
