"""Table `[training.loss]` of a config, which names the loss of every record."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from perdure.experiment.from_tables import extension
from perdure.tasks.losses import Loss
from perdure.tasks.losses import find as find_loss
from perdure.tasks.losses import names as loss_names
from perdure.utils.checked_fields import CheckedFields


@dataclass(frozen=True, kw_only=True)
class LossConfig(CheckedFields):
    """Table of a config that names a loss: `[training.loss]`, or `loss` of an arm.

    Args:
        name: name of a loss, or "my_package.my_module:MyLoss".
        loss: loss with the values of its own fields.
    """

    TABLE: ClassVar[str] = "a table with name = NAME and the loss's own fields"

    name: str
    loss: Loss

    @classmethod
    def from_table(cls, table: Mapping[str, Any], where: str) -> "LossConfig":
        """Find the loss by its name, and build it from the table's other keys."""
        name, loss = extension(find_loss, loss_names, "name", table, where)
        return cls(name=name, loss=loss)
