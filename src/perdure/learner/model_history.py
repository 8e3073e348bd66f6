"""History that a trained model carries: which ledger was charged for it, and what nobody counted.

Names of partitions do not identify records: `experience-0` is another set of records under another
class order. So a partition keeps the charges of an older one of its name only where both were
placed by the same public rule (`Records.placed_by`). The records of any other partition may be
those of any older one, and count as exposed as the worst of these.

A mark on every module of the model, which goes with copies of the module and with parts of it that
are built into another model. Bare weights (`state_dict`) carry none.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from perdure.errors import ConfigError, PrivacyError
from perdure.privacy.accounting.charges import Charge, bounding, merged
from perdure.privacy.ledger.account import Account
from perdure.privacy.ledger.entries import Entry, Stated, weakest

ATTRIBUTE = "_perdure_training"
"""Name of the mark in a module's `__dict__`."""
EARLIER = ", earlier"
"""Added to the name of an older partition that now stands for other records."""
START_BARE = (
    "so no ledger counts what that training revealed; use an untrained model. To accept this, "
    "load the weights into a new model (new.load_state_dict(...)): the printed epsilon then says "
    "'training before this ledger not counted'"
)


@dataclass(kw_only=True, eq=False)
class Training:
    """One training that a model went through.

    Args:
        by: names the session that trained it.
        sizes: those of its ledger, which go on growing while it trains.
        rules: as `sizes`.
        entries: as `sizes`.
        uncounted: reason why no ledger has its cost; "" where one has.
        simulated: whether noise came from a seed that the user chose.
    """

    by: str
    sizes: dict[str, int] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    uncounted: str = ""
    simulated: bool = False

    @property
    def begun(self) -> bool:
        """True where the model was trained at all."""
        return bool(self.entries or self.uncounted)


@dataclass(frozen=True)
class Carried:
    """Earlier charges of the records of a partition, and their declared facts.

    The size is 0 where only the charges are known.

    Args:
        size: declared number of records.
        charges: that they were exposed to.
        rule: digest of the public rule that placed them; "" for none known.
        independence: the weakest of what the charges' entries say.
    """

    size: int = 0
    charges: tuple[Charge, ...] = ()
    rule: str = ""
    independence: Stated = "by construction"

    def and_also(self, other: "Carried") -> "Carried":
        """Return what records of both were exposed to."""
        return Carried(
            size=max(self.size, other.size),
            charges=merged([*self.charges, *other.charges]),
            rule=self.rule if self.rule == other.rule else "",
            independence=weakest([self.independence, other.independence]),
        )


History = Mapping[str, Carried]
"""Partition to what its records were exposed to before the present ledger."""


def trainings_of(model: nn.Module) -> list[Training]:
    """Return the trainings that a model or any part of it went through, each once.

    Of several copies of one, the one that knows most counts.
    """
    found: dict[str, Training] = {}
    for part in model.modules():
        mark = vars(part).get(ATTRIBUTE)
        if not isinstance(mark, Training) or not mark.begun:
            continue
        known = found.get(mark.by)
        if known is None or len(mark.entries) > len(known.entries):
            found[mark.by] = mark
    return list(found.values())


def mark(model: nn.Module, training: Training) -> None:
    """Attach a training to a model and all its parts, in place of an earlier one."""
    for part in model.modules():
        vars(part)[ATTRIBUTE] = training


def carried(model: nn.Module, training: Training) -> bool:
    """Tell if a model and all its parts carry this very mark."""
    return all(vars(part).get(ATTRIBUTE) is training for part in model.modules())


def forget(model: nn.Module) -> nn.Module:
    """Take the marks off a model that is never released, such as the copy that an audit trains."""
    for part in model.modules():
        vars(part).pop(ATTRIBUTE, None)
    return model


def refuse_trained(trainings: Sequence[Training], *, warm_start: bool) -> None:
    """Refuse a model that was trained before, unless that is asked for.

    Raises:
        ConfigError: naming what the model went through.
    """
    if trainings and not warm_start:
        told = "; ".join(mark.uncounted or "trained with privacy" for mark in trainings)
        raise ConfigError.of(
            "model",
            f"one that a learner has trained already ({told})",
            "an untrained model, or Learner(warm_start=True), which continues from it and keeps "
            "the earlier cost",
        )


def refuse_unreplaced(trainings: Sequence[Training], folder: object) -> None:
    """Refuse a trained model in a folder whose checkpoint has not replaced its weights yet.

    Raises:
        ConfigError: naming what the model went through.
    """
    if trainings:
        told = "; ".join(mark.uncounted or "trained with privacy" for mark in trainings)
        raise ConfigError.of(
            "model",
            f"one that a learner has trained already ({told})",
            f"resume(), which loads the checkpoint of {folder}, or an untrained model",
        )


def history_of(
    trainings: Iterable[Training], partitions: Mapping[str, str], *, simulated: bool
) -> dict[str, Carried]:
    """Return the charges of a stream's partitions, and of earlier ones, by past trainings.

    Args:
        trainings: that the model went through.
        partitions: of the stream that comes, to the digest of the rule that placed their records.
        simulated: whether the noise to come is simulated.

    Raises:
        PrivacyError: for a training that no ledger counts, or whose noise was a simulation where
            the one to come is not.
    """
    history: dict[str, Carried] = {}
    for training in trainings:
        if training.uncounted:
            raise PrivacyError(f"the model was {training.uncounted}; {START_BARE}")
        if training.simulated and not simulated:
            raise PrivacyError(
                "the model was trained with simulated noise, which protects no record; train a "
                "new model with secret noise"
            )
        account = Account()
        account.sizes |= training.sizes
        account.rules |= training.rules
        account.entries += training.entries
        for name, new in exposed_before(account, partitions).items():
            history[name] = history[name].and_also(new) if name in history else new
    return history


def exposed_before(account: Account, partitions: Mapping[str, str]) -> dict[str, Carried]:
    """Return what an account says of its own partitions, and of those that come.

    An older partition whose name now stands for other records goes on under another one.

    Args:
        account: of an earlier training.
        partitions: that come, to the digest of the rule that placed their records.
    """
    found: dict[str, Carried] = {}
    same = {
        name
        for name, rule in partitions.items()
        if name in account.sizes and rule and account.rules.get(name) == rule
    }
    taken = {*account.sizes, *partitions}
    for name, size in account.sizes.items():
        kept = name
        if name in partitions and name not in same:
            while kept in taken:
                kept += EARLIER
            taken.add(kept)
        found[kept] = Carried(
            size=size,
            charges=merged(account.charges(name)),
            rule=account.rules.get(name, ""),
            independence=account.independence_of([name]),
        )
    worst = Carried(
        charges=bounding(account.charges(name) for name in account.sizes),
        independence=account.independence_of(account.sizes),
    )
    others = [name for name in partitions if name not in same]
    return found | {name: replace(worst, rule=partitions[name]) for name in others}
