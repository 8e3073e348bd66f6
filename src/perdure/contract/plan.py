"""Plan of an experience: its pool, its memory, and its declared privacy cost."""

from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Literal, get_args

from perdure.errors import ConfigError, StrategyError
from perdure.tasks import SingleLabel
from perdure.utils.checked_fields import CheckedFields

if TYPE_CHECKING:
    from perdure.data.experience import Experience

Selection = Literal["reservoir", "class-balanced", "ring", "herding", "loss-aware"]
"""Rule by which memory chooses records; see `MemoryPlan`."""
Update = Literal["experience", "step"]
"""Time when memory takes records in: at the end of an experience, or in every step."""
Use = Literal["rehearsal", "pooled", "reference", "references"]
MODELLED = ("herding", "loss-aware")
"""Selections that depend on outputs of the model for the records."""
ALLOWED = {"selection": get_args(Selection), "update": get_args(Update), "use": get_args(Use)}
Pooled = Literal["experience", "all", "memory"]
"""Records that an experience is trained on; see `Plan`."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan(CheckedFields):
    """Size, selection and use of the memory for replay.

    Args:
        capacity: total number of stored records.
        selection: `reservoir` (uniform over everything seen; Vitter 1985, algorithm R), or equal
            quotas for every pair of stage and class (the pieces of an `online` stream are one
            stage), filled at random (`class-balanced`), by the latest (`ring`; Chaudhry et al.
            2019), by the records whose mean feature follows the class mean best (`herding`; Rebuffi
            et al. 2017, algorithm 4) or by those of the highest loss (`loss-aware`; after Buzzega
            et al. 2020, "Rethinking experience replay", section 3.4, who drop those of low loss).
            Under differential privacy none of these selections is used: each record stays in memory
            or not by a secret random number of its own, independent of other records. (If one
            record replaced another in memory, one record would change two.)
        per_class: number of stored records for each pair of stage and class, instead of an equal
            share of `capacity`. With it, `capacity` is ignored; under differential privacy
            `per_class` is ignored instead.
        batch_size: rows drawn from memory at every step; None for as many as new ones. Under
            differential privacy new and stored records are one pool.
        update: `experience` offers all records to the memory at the end of the experience; `step`
            offers the rows of each step after that step. The values that a strategy stores with a
            row are computed when the row is offered; under differential privacy, in the last step
            that drew the row.
        use: use of stored records. `rehearsal`: a separate batch in addition to the new records.
            `pooled`: shuffled with the new records. `reference`: not trained on; gives one
            reference gradient per step. `references`: not trained on; gives one per step and
            earlier experience.
    """

    capacity: int
    selection: Selection = "class-balanced"
    per_class: int | None = None
    batch_size: int | None = None
    update: Update = "experience"
    use: Use = "rehearsal"

    def __post_init__(self) -> None:
        if not whole(self.capacity):
            raise ConfigError.of("memory capacity", self.capacity, "1 or more records")
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ConfigError.of(f"memory {name}", getattr(self, name), allowed)
        for name in ("per_class", "batch_size"):
            value = getattr(self, name)
            if value is not None and not whole(value):
                raise ConfigError.of(f"memory {name}", value, "1 or more records, or None")
        if self.use == "pooled" and self.update == "step":
            raise ConfigError.of(
                "memory use",
                "pooled",
                "with update='experience', because a pool is shuffled as a whole",
            )
        if self.selection in MODELLED and self.update == "step":
            raise ConfigError.of(
                "memory selection",
                self.selection,
                "with update='experience', because this selection compares all records",
            )

    @property
    def rehearsed(self) -> bool:
        """True if stored rows are part of the gradient itself, not only of reference gradients."""
        return self.use in ("rehearsal", "pooled")


def records_in(size: int | str, experience: "Experience") -> int:
    """Compute the number of records in a memory of the given size.

    The values that a strategy stores with a row are not counted.

    Args:
        size: number of records, or a text such as "2 MB" for inputs, labels and ids.
        experience: experience whose rows have the size of a stored row.

    Raises:
        ConfigError: if the size has another form.
    """
    refuse_size(size)
    if not isinstance(size, str):
        return int(size)
    number, _, unit = size.partition(" ")
    inputs = experience.train.inputs
    row = inputs[:0].new_empty(inputs.shape[1:]).nbytes + 2 * experience.train.ids.element_size()
    return max(1, int(float(number) * UNITS[unit]) // row)


def refuse_single_class(strategy: str, experience: "Experience") -> None:
    """Refuse an experience of one class, for a loss that compares the classes of one experience.

    Cross entropy over one class is always 0, so nothing would be learnt.

    Args:
        strategy: name of the strategy, for the message.
        experience: experience to check; only single-label records are refused.

    Raises:
        StrategyError: names the experience and its class.
    """
    if isinstance(experience.task, SingleLabel) and len(set(experience.classes)) == 1:
        raise StrategyError(
            f"{strategy} learns nothing from experience {experience.index}, whose only class is "
            f"{experience.classes[0]}: its loss compares the classes of one experience with each "
            "other; give every experience 2 classes or more"
        )


def refuse_size(size: int | str) -> None:
    """Refuse a size that is neither a number of records nor a text such as "2 MB".

    Raises:
        ConfigError: if the size is neither.
    """
    number, _, unit = str(size).partition(" ")
    text = unit in UNITS and number.replace(".", "", 1).isdecimal() and float(number) > 0
    if not (text if isinstance(size, str) else whole(size)):
        raise ConfigError.of(
            "memory_size", size, "a number of records, or bytes such as '500 kB', '2 MB' or '1 GB'"
        )


def whole(value: object) -> bool:
    """Return True if a value is a whole number, 1 or more."""
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= 1


UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, kw_only=True)
class Plan(CheckedFields):
    """Plan of an experience: pool, memory and trained parameters, from public facts only.

    Args:
        pool: records from which batches are drawn: `experience` for the records of this experience,
            `all` for the records of all experiences so far, `memory` for the stored records after
            those of this experience were offered.
        memory: plan of the memory for replay, or None.
        restart: start with the initial parameters and a new optimiser.
        trainable: prefixes of the names of trained parameters; None for all.
        train: False if the experience has no gradient steps, because the strategy learns from
            releases only.
        applies_penalty: False if the penalty is 0 in the whole experience, so that it is not
            computed.
    """

    pool: Pooled = "experience"
    memory: MemoryPlan | None = None
    restart: bool = False
    trainable: tuple[str, ...] | None = None
    train: bool = True
    applies_penalty: bool = True

    def __post_init__(self) -> None:
        if self.pool not in get_args(Pooled):
            raise ConfigError.of("plan.pool", self.pool, get_args(Pooled))


@dataclass(frozen=True, kw_only=True)
class PrivacyCost:
    """Declared privacy cost: the releases that a strategy needs in addition to the gradient.

    Args:
        releases: number of noisy sums over the experience, after each experience.
        memory_releases: number of noisy sums over memory, after each experience.
        histograms: number of histograms with integer noise, after each experience.
        selections: number of choices of one public answer, after each experience; a top-k counts k.
        references: number of reference gradients per step that use one stored record: 0 or 1.
        reuses_past_records: True if records of earlier experiences are used again.
    """

    releases: int = 0
    histograms: int = 0
    selections: int = 0
    memory_releases: int = 0
    references: int = 0
    reuses_past_records: bool = False
