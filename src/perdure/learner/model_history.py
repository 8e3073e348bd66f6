"""History that a trained model carries: which ledger was charged for it, and what nobody counted.

A mark on every module of the model, which goes with copies of the module and with parts of it that
are built into another model. Bare weights (`state_dict`) carry none.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from perdure.errors import ConfigError, PrivacyError
from perdure.privacy.accounting.charges import Charge, merged
from perdure.privacy.ledger.account import Account
from perdure.privacy.ledger.entries import Entry

ATTRIBUTE = "_perdure_training"
"""Name of the mark in a module's `__dict__`."""
START_BARE = (
    "if that is intended, load its weights into a new model (new.load_state_dict(...)): they start "
    "without a history, and the statement says so"
)


@dataclass(kw_only=True, eq=False)
class Training:
    """One training that a model went through.

    Args:
        by: names the session that trained it.
        sizes, entries: those of its ledger, which go on growing while it trains.
        uncounted: why no ledger says what it cost; "" where one does.
        simulated: whether noise came from a seed that the user chose.
    """

    by: str
    sizes: dict[str, int] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    uncounted: str = ""
    simulated: bool = False

    @property
    def begun(self) -> bool:
        """Whether anything was learnt."""
        return bool(self.entries or self.uncounted)


@dataclass(frozen=True)
class Carried:
    """What the records of a partition were exposed to before, and their declared number.

    The size is 0 where only the charges are known.
    """

    size: int
    charges: tuple[Charge, ...]


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
    """Let a model and all its parts carry a training, in place of what they carried before."""
    for part in model.modules():
        vars(part)[ATTRIBUTE] = training


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
            "an untrained one, or Learner(warm_start=True), which goes on from it and carries over "
            "what was spent",
        )


def history_of(
    trainings: Iterable[Training], partitions: Iterable[str], *, delta: float, simulated: bool
) -> dict[str, Carried]:
    """Return what the partitions of a stream, and those before, were exposed to by trainings.

    A partition of a new name may hold records of any older one: it is taken to hold those that were
    exposed most.

    Args:
        trainings: that the model went through.
        partitions: of the stream that comes.
        delta: at which partitions are compared.
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
                "the model was trained with simulated noise, which hides nothing; train a new "
                "model with secret noise"
            )
        account = Account()
        account.sizes |= training.sizes
        account.entries += training.entries
        worst = account.charges(account.worst(delta)[0])
        for name in {*account.sizes, *partitions}:
            known = name in account.sizes
            charges = account.charges(name) if known else worst
            before = history.get(name, Carried(0, ()))
            history[name] = Carried(
                max(before.size, account.sizes.get(name, 0)),
                merged([*before.charges, *charges]),
            )
    return history
