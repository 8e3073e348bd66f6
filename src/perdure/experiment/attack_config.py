"""Tables of a config that name an attack, such as `[attack]`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from perdure.adversarial import Attack
from perdure.adversarial import find as find_attack
from perdure.adversarial import names as attack_names
from perdure.data.experience import Stream
from perdure.experiment.from_tables import extension
from perdure.utils.checked_fields import CheckedFields
from perdure.utils.chunking import row_slices


@dataclass(frozen=True, kw_only=True)
class AttackConfig(CheckedFields):
    """Table of a config that names an attack: `[attack]`, `[training.adversary]` and the like.

    Args:
        name: name of an attack, or "my_package.my_module:MyAttack".
        attack: attack with the values of its own fields.
        bounds_given: True to use the input bounds of `attack`. Otherwise inputs stay in [0, 1]
            where all public test inputs lie there, and are unbounded elsewhere.
    """

    TABLE: ClassVar[str] = "a table with name = NAME and the attack's own fields"

    name: str
    attack: Attack
    bounds_given: bool = True

    @classmethod
    def from_table(cls, table: Mapping[str, Any], where: str) -> "AttackConfig":
        """Find the attack by its name, and build the attack from the table's other keys."""
        name, attack = extension(find_attack, attack_names, "name", table, where)
        return cls(name=name, attack=attack, bounds_given="bounds" in table)

    def on(self, stream: Stream) -> Attack:
        """Return the attack with the bounds that hold for a stream's inputs.

        Raises:
            ConfigError: if a list of epsilons or bounds does not have one number per feature.
        """
        self.attack.refuse_shape(stream[0].test.inputs)
        if self.bounds_given:
            return self.attack
        unit = all(
            bool(((rows >= 0) & (rows <= 1)).all())
            for e in stream
            for rows in (e.test.inputs[piece] for piece in row_slices(e.test.inputs))
        )
        return replace(self.attack, bounds=(0.0, 1.0) if unit else None)
