"""Table `[training.defence]` of a config, which names a defence."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from perdure.adversarial.defences import Defence
from perdure.adversarial.defences import find as find_defence
from perdure.adversarial.defences import names as defence_names
from perdure.experiment.from_tables import extension
from perdure.utils.checked_fields import CheckedFields


@dataclass(frozen=True, kw_only=True)
class DefenceConfig(CheckedFields):
    """Losses of rows and their perturbed versions.

    Args:
        name: name of a defence, or "my_package.my_module:MyDefence".
        defence: defence with the values of its own fields.
    """

    TABLE: ClassVar[str] = "a table with name = NAME and the defence's own fields"

    name: str
    defence: Defence

    @classmethod
    def from_table(cls, table: Mapping[str, Any], where: str) -> "DefenceConfig":
        """Find the defence by its name, and build it from the table's other keys."""
        name, defence = extension(find_defence, defence_names, "name", table, where)
        return cls(name=name, defence=defence)
