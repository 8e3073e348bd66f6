"""Table `[search]` of a config: the search of `perdure tune` for the best settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from perdure.errors import ConfigError
from perdure.experiment.field_checks import COUNTS, check, counts
from perdure.experiment.search_space import Range, space_of_table
from perdure.privacy.accounting.selection import Repeats
from perdure.utils.checked_fields import CheckedFields

GoalName = Literal["accuracy", "robust_accuracy", "epsilon", "seconds", "parameters"]
SEARCHED = ("arms", "federation", "model", "privacy", "private_training", "training")
"""Tables of a config whose settings can be searched; others change the data or the records."""

NOT_SEARCHED = frozenset(
    {
        ("arms", "name"),
        ("arms", "private"),
        ("privacy", "delta"),
        ("privacy", "diagnostics"),
        ("privacy", "relation"),
        ("privacy", "seed"),
        ("privacy", "spent"),
        ("privacy", "unit"),
    }
)
"""Settings that decide which statement a training makes, so all trials must have the same."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig(CheckedFields):
    """Search for the best settings of one arm, by `perdure tune`.

    Args:
        space: paths of settings, such as "training.learning_rate" and "arms.0.strength", and for
            each a range [lowest, highest] or {low = L, high = H, scale = SCALE}, or {choices =
            [...]}.
        sampler: `tpe`, `cmaes` for two ranges or more, `nsga2` for several goals, or `random`.
        goals: `accuracy`, `robust_accuracy` (with `[attack]`), `epsilon`, `seconds` or
            `parameters`; several goals need `nsga2`.
        trials: number of trainings; with `privacy = "select"`, their mean.
        experiences: number of first experiences to search on; left out for 2, or for fewer where
            the stream has no later one.
        held_out: share of records that gives the score: of training records, or under privacy of
            the public test records.
        arm: name of the arm; left out where the config has one arm.
        seed: seed of the search and of the held-out records.
        privacy: for a private arm, `charge_all` (every training is charged, all are shown) or
            `select` (the best of a random, secret number of trainings, and nothing else).
        repeats: distribution of the number of trainings with `select`: `geometric`, `logarithmic`
            or `poisson`.
    """

    space: Mapping[str, Any]
    sampler: Literal["tpe", "cmaes", "nsga2", "random"] = "tpe"
    goals: tuple[GoalName, ...] = ("accuracy",)
    trials: int = 30
    experiences: int | None = None
    held_out: float = 0.2
    arm: str | None = None
    seed: int = 0
    privacy: Literal["charge_all", "select"] | None = None
    repeats: Repeats = "geometric"

    def __post_init__(self) -> None:
        check(self, "trials experiences", counts, COUNTS)
        check(self, "held_out", lambda value: 0 < value < 1, "a share between 0 and 1")
        check(self, "seed", lambda value: 0 <= value < 2**32, "0 to 4294967295")
        if not self.goals or len(set(self.goals)) < len(self.goals):
            raise ConfigError.of("goals", self.goals, "one or more different goals")
        if len(self.goals) > 1 and self.sampler != "nsga2":
            raise ConfigError.of("sampler", self.sampler, "nsga2 for several goals")
        for path in self.ranges:
            first, *rest = path.split(".")
            named = (first, rest[-1]) if rest else (first, "")
            if first not in SEARCHED or not rest or named in NOT_SEARCHED:
                allowed = f"settings of the tables {', '.join(SEARCHED)} that change no statement"
                raise ConfigError.of("space", path, allowed)

    @cached_property
    def ranges(self) -> dict[str, Range | list[Any]]:
        """Paths of settings, with a `Range` or a list of choices for each."""
        return space_of_table(self.space, "space")
