"""Look at a model and the losses of a strategy on synthetic records, before anything is charged.

Records are drawn over the declared input domain, and batches are compared that share some records
and differ in all others (see `perdure.privacy.guard`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from perdure.contract.strategy import Strategy
from perdure.data.domain import InputDomain
from perdure.planning.training_plan import TrainingPlan
from perdure.privacy.guard.independence import Independence, independence, is_own
from perdure.privacy.guard.loss_checks import (
    check_losses,
    check_rows,
    quiet_training,
)
from perdure.privacy.guard.model_checks import check_buffers
from perdure.privacy.guard.neighbour_checks import (
    check_alone,
    check_neighbours,
    check_outputs,
    explained,
)
from perdure.privacy.guard.probes import (
    Neighbours,
    domain_of,
    large_batch,
    neighbours,
    probe_rows,
)
from perdure.privacy.guard.writes import Seen, WriteWatch
from perdure.utils.seeding import generator

TRIAL_RECORDS = 6
"""Random records in the tests that leave out, or change, one record at a time."""

GLANCE = ("highest", "not a number", "sequences, full length")
"""Neighbours that are looked at where records are independent by construction."""

OWN_STRATEGIES = ("perdure.strategies.", "perdure.contract.")
"""Packages whose strategies compute each loss from its own row; their tests hold it."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """By what records are known to be independent of each other in private gradients.

    Args:
        independence: the word for the ledger and the statement.
        alone: the model has to see one record at a time.
    """

    independence: Independence
    alone: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Inspection:
    """A model and the losses of a strategy, as the guard looks at them.

    Args:
        training: stream and strategy.
        model: the module that is trained.
        losses: index of an experience, inputs (n, ...), labels and ids (n, 2) to the losses (n,).
        row_gradients: of the same arguments; runs the model on every record alone, as
            `custom_forward="record-by-record"` does.
        remember: of the same arguments; asks what memory would store beside records; None where
            the strategy stores nothing.
        step: of the same arguments, and whether each record goes alone; changes the rows by
            adversary and views, and clips their gradients, as a step does.
        widened: inputs are changed before the model sees them, by views or an adversary, and may
            leave their domain.
        state: of the strategy.
        rows: declared number of records in one pass.
        seed: of the synthetic records.
        device: where the model is.
    """

    training: TrainingPlan
    model: nn.Module
    losses: Callable[[int, Tensor, Tensor], Tensor]
    row_gradients: Callable[[int, Tensor, Tensor], object]
    remember: Callable[[int, Tensor, Tensor], object] | None = None
    step: Callable[[int, Tensor, Tensor, bool], object] | None = None
    widened: bool = False
    state: Mapping[str, Tensor]
    rows: float
    seed: int
    device: str | torch.device

    @property
    def name(self) -> str:
        """Name of the losses and of what they run, for messages: either may be at fault."""
        model = type(self.model).__name__
        return f"the forward of {model}, or {self.training.strategy.name}.losses()"

    @cached_property
    def watch(self) -> WriteWatch:
        """Watch over the tensors of the model and the state."""
        return WriteWatch(self.model)

    @cached_property
    def before(self) -> Seen:
        """Tensors of the model and the state before the first probe."""
        return self.watch.see(self.state, values=True)

    def watched(self, index: int, inputs: Tensor, facts: Tensor) -> Tensor:
        """Losses, refusing what they write into parameters, buffers and state."""
        before = self.before
        losses = self.losses(index, inputs, facts)
        self.watch.refuse_writes(before, self.state, self.name)
        return losses

    @property
    def generator(self) -> torch.Generator:
        """Generator of the probes; the same one every time."""
        return generator(self.seed, "guard")

    def domains(self) -> list[tuple[int, InputDomain]]:
        """Every declared domain of the stream, with the first experience that has it.

        Raises:
            GuardError: for inputs other than floats without a declared domain.
        """
        found: dict[InputDomain, int] = {}
        for experience in self.training.stream:
            records = experience.train
            domain = domain_of(records.inputs, records.domain)
            if self.widened and domain.floats:
                domain = replace(domain, range=None)
            found.setdefault(domain, experience.index)
        return [(index, domain) for domain, index in found.items()]

    def pairs(self, domain: InputDomain, rows: int | None = None) -> list[Neighbours]:
        """Batches with other neighbours, on the model's device."""
        return [pair.to(self.device) for pair in neighbours(domain, self.generator, rows=rows)]

    def facts(self, index: int, rows: int) -> tuple[Tensor, Tensor]:
        """Labels and ids (rows, 2): labels in turn, and all of the first class."""
        classes = self.training.stream[index].classes
        turns = [(classes[i % len(classes)], i) for i in range(rows)]
        first = [(classes[0], rows + i) for i in range(rows)]
        return torch.tensor(turns).to(self.device), torch.tensor(first).to(self.device)

    def verdict(self) -> Verdict:
        """Look at everything, and say by what records are known to be independent.

        Raises:
            GuardError: naming the part that breaks the bound on one record's influence.
        """
        domains = self.domains()
        listed = all(independence(self.model, domain) == "by construction" for _, domain in domains)
        known: Independence = "tested"
        if listed and is_own_strategy(self.training.strategy):
            known = "by construction"
        privacy = self.training.privacy
        asked = privacy is not None and privacy.custom_forward == "record-by-record"
        alone = asked and known == "tested"
        for index, domain in domains:
            _look_at_memory(self, index, domain)
            if alone:
                _look_alone(self, index, domain)
            else:
                _look(self, index, domain, known)
            _look_at_steps(self, index, domain, alone=alone)
        return Verdict(independence="by construction" if alone else known, alone=alone)


def is_own_strategy(strategy: Strategy) -> bool:
    """Return whether the losses are those of this library's strategies alone."""
    parts = getattr(strategy, "parts", ())
    return is_own(type(strategy), OWN_STRATEGIES) and all(map(is_own_strategy, parts))


def _look(inspection: Inspection, index: int, domain: InputDomain, known: Independence) -> None:
    """Look at the model and the losses in batches, over the whole domain.

    Where records are independent by construction, a glance checks the construction.
    """
    model = inspection.model
    name = inspection.name
    pairs = inspection.pairs(domain)
    if known == "by construction":
        pairs = [pair for pair in pairs if pair.name in GLANCE]
    with explained("the model", "a small batch"):
        check_buffers(model, pairs[0].one, *(pair.other for pair in pairs))
    inputs = domain.random(TRIAL_RECORDS, inspection.generator).to(inspection.device)
    labels, _ = inspection.facts(index, TRIAL_RECORDS)
    losses = partial(inspection.watched, index)
    facts = inspection.facts(index, len(pairs[0].one))
    for mode in (model.eval, partial(quiet_training, model)):
        mode()
        for which in sorted({index, min(1, len(inspection.training.stream) - 1)}):
            own, _ = inspection.facts(which, TRIAL_RECORDS)
            with explained(name, "a small batch"):
                check_losses(partial(inspection.watched, which), inputs, own, name)
        check_neighbours(model, losses, pairs, facts, name, layers=model.training)
    check_rows(model, losses, inputs, labels, name)
    if known == "tested":
        check_alone(losses, pairs[0], facts[0], name)
        _look_closer(inspection, pairs, index, domain)


def _look_at_memory(inspection: Inspection, index: int, domain: InputDomain) -> None:
    """Ask what memory would store beside every kind of record, each record alone."""
    if inspection.remember is None:
        return
    rows = probe_rows(domain, inspection.generator).to(inspection.device)
    facts, _ = inspection.facts(index, len(rows))
    what = f"{inspection.training.strategy.name}.remember()"
    before = inspection.before
    for n in (len(rows), 1, 0):
        with explained(what, f"{n} records, each alone"):
            inspection.remember(index, rows[:n], facts[:n])
    inspection.watch.refuse_writes(before, inspection.state, what)


def _look_at_steps(inspection: Inspection, index: int, domain: InputDomain, *, alone: bool) -> None:
    """Go through a step's adversary, views and gradient, with records of every kind, one and none.

    Few records are drawn sooner or later, and then an error would tell how few there are.
    """
    if inspection.step is None:
        return
    rows = probe_rows(domain, inspection.generator).to(inspection.device)
    facts, _ = inspection.facts(index, len(rows))
    before = inspection.before
    for n in (len(rows), 1, 0):
        with torch.random.fork_rng(devices=[]), explained("a step", f"{n} records"):
            inspection.step(index, rows[:n], facts[:n], alone)
    inspection.watch.refuse_writes(before, inspection.state, "a step")


def _look_closer(
    inspection: Inspection, pairs: list[Neighbours], index: int, domain: InputDomain
) -> None:
    """Look at outputs and features too, and at a batch of the declared size."""
    model = inspection.model
    rows = large_batch(domain, inspection.rows)
    large = inspection.pairs(domain, rows)
    model.eval()
    for batches in (pairs, large):
        check_outputs(model, batches, "the model")
        if callable(features := getattr(model, "features", None)):
            check_outputs(features, batches, "features() of the model")
    quiet_training(model)
    facts = inspection.facts(index, len(large[0].one))
    losses = partial(inspection.watched, index)
    check_neighbours(model, losses, large, facts, inspection.name, layers=False)
    inspection.watch.refuse_writes(inspection.before, inspection.state, "the model")


def _look_alone(inspection: Inspection, index: int, domain: InputDomain) -> None:
    """Run the gradient of every probe record alone, as training will."""
    model = inspection.model
    pairs = inspection.pairs(domain)
    with explained("the model", "one record"):
        check_buffers(model, pairs[0].one[:1], *(pair.other[1:2] for pair in pairs))
    quiet_training(model)
    facts, _ = inspection.facts(index, len(pairs[0].one))
    what = f"{inspection.name}, record by record,"
    before = inspection.before
    for pair in pairs:
        with explained(what, pair.name):
            inspection.row_gradients(index, pair.other, facts)
        inspection.watch.refuse_writes(before, inspection.state, what)
