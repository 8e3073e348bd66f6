"""Training history that a model carries: the ledgers that were charged, and uncounted training.

Names of partitions do not identify records: `experience-0` contains other records for another class
order. So a partition keeps the charges of an older one with its name only if the same public rule
assigned the records of both (`Records.placed_by`). The records of any other partition may be those
of any older partition, so they count as exposed as the worst of these.

The history is a mark on every module of the model, which copies of the module keep, also inside
other models. Weights alone (`state_dict`) have no mark.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from perdure.errors import ConfigError, PrivacyError
from perdure.privacy.accounting.charges import Charge, bounding, merged
from perdure.privacy.ledger.account import Account
from perdure.privacy.ledger.entries import Entry, Stated, weakest
from perdure.utils.modules import parts_of

ATTRIBUTE = "_perdure_training"
"""Name of the attribute of a module that holds the `Training`."""
EARLIER = ", earlier"
"""Suffix for the name of an older partition if the name is now used for other records."""
START_BARE = (
    "so no ledger counts what that training revealed; use an untrained model. To accept this, "
    "load the weights into a new model (new.load_state_dict(...)): the printed epsilon then says "
    "'training before this ledger not counted'"
)


@dataclass(kw_only=True, eq=False)
class Training:
    """One training of a model, as recorded in its mark.

    Args:
        by: random name of the session that trained the model.
        sizes: partition to declared size in the session's ledger; the ledger adds to it.
        rules: partition to the digest of the rule that assigned its records, in that ledger.
        entries: entries of that ledger, with the privacy cost; the ledger adds to it.
        uncounted: reason why no ledger has the cost of the training; "" if one has it.
        simulated: True if the noise came from a seed that the user chose.
        private: True if the training had privacy, but its ledgers are elsewhere.
    """

    by: str
    sizes: dict[str, int] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    uncounted: str = ""
    simulated: bool = False
    private: bool = False

    @property
    def begun(self) -> bool:
        """True if the model was trained at all."""
        return bool(self.entries or self.uncounted)


@dataclass(frozen=True)
class Carried:
    """Earlier charges of the records of a partition, and its declared facts.

    The size is 0 if only the charges are known.

    Args:
        size: declared number of records.
        charges: charges of the records.
        rule: digest of the public rule that assigned the records; "" if none is known.
        independence: weakest kind of independence in the entries of these charges.
    """

    size: int = 0
    charges: tuple[Charge, ...] = ()
    rule: str = ""
    independence: Stated = "by construction"

    def and_also(self, other: "Carried") -> "Carried":
        """Return the combined charges of records that have these charges and those of `other`."""
        return Carried(
            size=max(self.size, other.size),
            charges=merged([*self.charges, *other.charges]),
            rule=self.rule if self.rule == other.rule else "",
            independence=weakest([self.independence, other.independence]),
        )


History = Mapping[str, Carried]
"""Partition to the charges of its records before the current ledger."""


def trainings_of(model: nn.Module) -> list[Training]:
    """Return the trainings of a model and of all its parts, each once.

    If there are several copies of one training, the one with the most entries counts.
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
    """Attach a training to a model and all its parts, instead of an earlier training."""
    for part in model.modules():
        vars(part)[ATTRIBUTE] = training


def carried(model: nn.Module, training: Training) -> bool:
    """Return True if a model and all its parts carry exactly this training."""
    return all(vars(part).get(ATTRIBUTE) is training for part in parts_of(model))


def forget(model: nn.Module) -> nn.Module:
    """Remove the marks from a model that is never released, such as a copy for an audit."""
    for part in model.modules():
        vars(part).pop(ATTRIBUTE, None)
    return model


def refuse_trained(trainings: Sequence[Training], *, warm_start: bool) -> None:
    """Refuse a model that was trained before, unless a warm start was asked for.

    Raises:
        ConfigError: names the earlier training.
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
    """Refuse a trained model if the checkpoint in its folder has not replaced its weights yet.

    Raises:
        ConfigError: names the earlier training.
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
    """Return the earlier charges of a stream's partitions, and of older partitions.

    Args:
        trainings: trainings of the model.
        partitions: partitions of the new stream, with the digests of the rules that assigned their
            records.
        simulated: True if the coming noise is simulated.

    Raises:
        PrivacyError: if no ledger counts a training, or if its noise was simulated and the coming
            noise is not.
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
    """Return the charges in an account, for its own partitions and for new ones.

    An older partition whose name is now used for other records gets another name.

    Args:
        account: account of an earlier training.
        partitions: new partitions, with the digests of the rules that assigned their records.
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
