"""Inspection of a model and a strategy's losses on synthetic records, before anything is charged.

Synthetic records cover the declared input domain. The guard compares batches that share some
records and differ in all others: in inputs, classes, experiences, and in being new or from memory
(see `perdure.privacy.guard` and `synthetic_rows`).
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from perdure.contract.forward import Forward
from perdure.contract.state import State
from perdure.data.augmentation import Views
from perdure.data.domain import InputDomain
from perdure.data.records import Batch
from perdure.errors import GuardError
from perdure.learner.loss_path import LossPath
from perdure.learner.synthetic_rows import DROPPED, MIXTURES, SyntheticRows
from perdure.planning.training_plan import TrainingPlan
from perdure.privacy.clipping.clip import Clip, clipped_sum, per_pass
from perdure.privacy.guard.independence import Independence, independence
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
    whole,
    whole_batch,
)
from perdure.privacy.guard.writes import Seen, WriteWatch
from perdure.queries.batch_gradients import clipped_gradient
from perdure.queries.per_record import gradient_rows
from perdure.types import Params
from perdure.utils.modules import trainable_parameters
from perdure.utils.seeding import derive, generator, undisturbed

Losses = Callable[[int, Tensor, Tensor], Tensor]
"""Function from an experience's index, inputs (n, ...) and facts (n, 4) to the losses (n,)."""

TRIAL_RECORDS = 6
"""Number of random records in tests that remove or change one record at a time."""

GLANCE = ("highest", "not a number", "sequences, full length")
"""Kinds of other rows that are tested if records are independent by construction."""

MIXED = ("highest", "lowest", "positive and negative", *GLANCE)
"""Kinds of other rows that are also tested as rows from memory."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Result of the guard: the reason why records are independent in private gradients.

    Args:
        independence: "by construction" or "tested", for the ledger and the statement.
        alone: True if the model must see one record at a time.
    """

    independence: Independence
    alone: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Inspection:
    """A model and its computation from rows to losses, with the synthetic data for its tests.

    Args:
        training: stream and strategy.
        model: the module that is trained.
        path: computation from rows to their losses.
        rows: source of synthetic batches.
        expected: declared number of records in a step.
        at_once: most records of one pass through the model.
        seed: seed of the synthetic records.
        device: device of the model.
    """

    training: TrainingPlan
    model: nn.Module
    path: LossPath
    rows: SyntheticRows
    expected: float
    at_once: float = math.inf
    seed: int
    device: str | torch.device

    @property
    def name(self) -> str:
        """Name of model and losses, for messages about an error in either of them."""
        model = type(self.model).__name__
        return f"the forward of {model}, or {self.training.strategy.name}.losses()"

    @property
    def state(self) -> State:
        """State of the strategy."""
        return self.rows.state

    @cached_property
    def watch(self) -> WriteWatch:
        """Watch over writes to the tensors of the model and the state."""
        return WriteWatch(self.model)

    @cached_property
    def before(self) -> Seen:
        """Tensors of the model and the state, before the first test."""
        return self.watch.see(self.state, values=True)

    def losses(self, index: int, inputs: Tensor, facts: Tensor) -> Tensor:
        """Return (n,) losses; writes into parameters, buffers and state are refused."""
        batch = self.rows.batch(index, inputs, facts)
        return self._unwritten(index, batch, self.name)

    def changed_losses(self, index: int, inputs: Tensor, facts: Tensor) -> Tensor:
        """(n,) losses of rows that an attack or views have changed, with fixed random numbers."""
        batch = self.rows.batch(index, inputs, facts)
        if self.path.adversary is not None:
            batch = self._under_attack(index, batch, generator(self.seed, "attack"))
        batch = self.path.with_views(batch, self.seed)
        return self._unwritten(index, batch, f"{self.name} under {self.path.foreign_changes}")

    def _under_attack(self, index: int, batch: Batch, draws: torch.Generator) -> Batch:
        parameters = dict(self.model.named_parameters())
        with torch.enable_grad():  # as in a step
            return self.path.perturbed(
                lambda forward, rows: self._of(forward, index, rows),
                self.model,
                parameters,
                batch,
                draws,
                context=self.rows.context_of(index),
            )

    def draws(self, index: int, inputs: Tensor) -> bool:
        """Return True if an attack, or views, use random numbers.

        The random numbers of a row depend on its position, so they differ in a smaller batch.
        """
        if self.path.adversary is None:
            return True
        own = generator(self.seed, "attack")
        batch = self.rows.batch(index, inputs, self.rows.facts(index, len(inputs)))
        with undisturbed():
            before = own.get_state(), torch.get_rng_state()
            self._under_attack(index, batch, own)
            after = own.get_state(), torch.get_rng_state()
        return not all(map(torch.equal, before, after))

    def row_gradients(self, index: int, inputs: Tensor, facts: Tensor) -> object:
        """Compute the gradient of every record alone, as the mode `record-by-record` does."""
        batch = self.rows.batch(index, inputs, facts)
        params = {
            name: value.detach().clone() for name, value in trainable_parameters(self.model).items()
        }
        rows = gradient_rows(lambda forward, rows: self._of(forward, index, rows), self.model)
        return clipped_sum(rows, params, batch.tensors(), Clip(norm=1.0), per_pass(params))

    def step(self, index: int, inputs: Tensor, facts: Tensor, alone: bool) -> object:
        """Change rows by attack and views, and clip their gradients, as a training step does."""
        parameters: Params = dict(trainable_parameters(self.model))
        rows = self.path.changed(
            self.rows.batch(index, inputs, facts),
            lambda forward, rows: self._of(forward, index, rows),
            self.model,
            parameters,
            seed_of=lambda purpose: derive(self.seed, "guard"),
            watched=nullcontext,
            private=True,
            context=self.rows.context_of(index),
        )
        at_once = None if math.isinf(self.at_once) else int(self.at_once)
        return clipped_gradient(
            Forward(self.model),
            lambda forward, rows: self._of(forward, index, rows),
            parameters,
            rows,
            Clip(norm=1.0),
            at_once,
            alone=alone,
        )

    def _of(self, forward: Forward, index: int, batch: Batch) -> Tensor:
        return self.path.losses(forward, batch, self.rows.context_of(index), self.state)

    def _unwritten(self, index: int, batch: Batch, name: str) -> Tensor:
        before = self.before
        losses = self._of(Forward(self.model), index, batch)
        self.watch.refuse_writes(before, self.state, name)
        return losses

    @property
    def generator(self) -> torch.Generator:
        """Random generator of the synthetic records; every call begins with the same seed."""
        return generator(self.seed, "guard")

    def domains(self) -> list[tuple[int, InputDomain]]:
        """Every declared domain of the stream, with the first experience that has it.

        Raises:
            GuardError: if inputs are not floats and have no declared domain.
        """
        found: dict[InputDomain, int] = {}
        for experience in self.training.stream:
            found.setdefault(self.domain_of(experience.index), experience.index)
        return [(index, domain) for domain, index in found.items()]

    def domain_of(self, index: int) -> InputDomain:
        """Domain of an experience's inputs, as the model sees them.

        It is larger than the declared one if an attack or views may leave that domain.
        """
        records = self.training.stream[index].train
        domain = domain_of(records.inputs, records.domain)
        widened = self.path.adversary is not None or self.path.views is not None
        return replace(domain, range=None) if widened and domain.floats else domain

    def pairs(self, domain: InputDomain, rows: int | None = None) -> list[Neighbours]:
        """Pairs of synthetic batches that share some rows only, on the model's device."""
        return [pair.to(self.device) for pair in neighbours(domain, self.generator, rows=rows)]

    def facts(self, index: int, rows: int) -> tuple[Tensor, Tensor]:
        """Return label, id, experience and role (rows, 4) of new rows, for a pair of batches."""
        return (
            self.rows.facts(index, rows),
            self.rows.facts(index, rows, neighbours=True),
        )

    @property
    def later(self) -> tuple[int, ...]:
        """Indices of the experiences after the first one on which the guard tests, too.

        They are the second experience, and the last one if user code is on the path.
        """
        last = len(self.training.stream) - 1
        return tuple(sorted({min(1, last), last if self.foreign_parts else 0} - {0}))

    @cached_property
    def foreign_parts(self) -> tuple[str, ...]:
        """Names of the parts between rows and losses that may not keep records independent."""
        listed = all(
            independence(self.model, domain) == "by construction" for _, domain in self.domains()
        )
        return self.path.foreign_parts() if listed else ("the model", *self.path.foreign_parts())

    def verdict(self) -> Verdict:
        """Run all tests, and return how records are known to be independent.

        Raises:
            GuardError: names the part that breaks the bound on one record's influence.
        """
        known: Independence = "tested" if self.foreign_parts else "by construction"
        privacy = self.training.privacy
        asked = privacy is not None and privacy.custom_forward == "record-by-record"
        alone = asked and known == "tested"
        if alone:
            self._refuse_batches()
        for index, domain in self.domains():
            _look_at_memory(self, index, domain)
            if alone:
                _look_alone(self, index, domain)
            else:
                _look(self, index, domain, known)
            _look_at_steps(self, index, domain, alone=alone)
        return Verdict(independence="by construction" if alone else known, alone=alone)

    def _refuse_batches(self) -> None:
        """Refuse code that needs whole batches if the model must see one record at a time."""
        adversary = self.path.adversary
        if adversary is not None:
            raise GuardError(
                f"the adversary {type(adversary).__name__} runs the model in batches, but "
                'custom_forward is "record-by-record"; allowed: one of the two; remove the '
                "adversary, or use a model, losses and an attack of this library"
            )
        views = self.path.views
        if views is not None and type(views) is not Views:
            raise GuardError(
                f"{type(views).__name__} may use whole batches, which "
                'custom_forward="record-by-record" forbids; allowed: perdure.data.Views with a '
                "`change` function of your own"
            )


def losses_of(inspection: Inspection) -> dict[str, Losses]:
    """Losses to test, by name, including those under an attack that is user code."""
    found: dict[str, Losses] = {inspection.name: inspection.losses}
    if changes := inspection.path.foreign_changes:
        found[f"{inspection.name} under {changes}"] = inspection.changed_losses
    return found


def _look(inspection: Inspection, index: int, domain: InputDomain, known: Independence) -> None:
    """Refuse layers and losses of a record that depend on the other rows of its batch.

    If records are independent by construction, a short test confirms this.
    """
    model = inspection.model
    name = inspection.name
    pairs = inspection.pairs(domain)
    if known == "by construction":
        pairs = [pair for pair in pairs if pair.name in GLANCE]
    with explained("the model", "a small batch"):
        check_buffers(model, pairs[0].one, *(pair.other for pair in pairs))
    inputs = domain.random(TRIAL_RECORDS, inspection.generator).to(inspection.device)
    losses = partial(inspection.losses, index)
    facts = inspection.facts(index, len(pairs[0].one))
    for mode in (model.eval, partial(quiet_training, model)):
        mode()
        for which in sorted({index, *inspection.later}):
            own = inspection.rows.facts(which, TRIAL_RECORDS)
            with explained(name, "a small batch"):
                check_losses(partial(inspection.losses, which), inputs, own, name)
        check_neighbours(model, losses, pairs, facts, name, layers=model.training)
    check_rows(model, losses, inputs, inspection.rows.facts(index, TRIAL_RECORDS), name)
    tested = known == "tested"
    for which in inspection.later:
        layers = tested and which == inspection.later[-1]
        look_at_mixtures(inspection, inspection.losses, name, which, pairs, layers=layers)
    if known == "tested":
        check_alone(losses, pairs[0], facts[0], name)
        _look_at_changes(inspection, pairs, index, inputs)
        _look_closer(inspection, pairs, index, domain)


def look_at_mixtures(
    inspection: Inspection,
    losses: Losses,
    name: str,
    index: int,
    pairs: list[Neighbours],
    *,
    layers: bool = False,
    drop: bool = True,
) -> None:
    """Refuse losses that depend on other rows, in batches of new and stored rows or experiences.

    Args:
        inspection: inspection with the model and the synthetic rows.
        losses: function that computes the losses.
        name: name of the losses, for messages.
        index: index of the experience.
        pairs: pairs of batches that share some rows only.
        layers: True to test the layers as well.
        drop: True to also remove one record at a time.
    """
    rows = inspection.rows
    if not rows.mixes(index):
        return
    asked = partial(losses, index)
    chosen = [pair for pair in pairs if pair.name in MIXED]
    mixtures = MIXTURES if rows.rehearses(index) else MIXTURES[:1]
    dropped = DROPPED if drop else ()
    if not inspection.foreign_parts:  # a few tests, to check the construction
        chosen, mixtures, dropped = chosen[:1], mixtures[-1:], dropped[:1]
    for mixture in mixtures:
        facts = rows.beside(index, pairs[0], mixture)
        what = f"{name} ({mixture.name})"
        check_neighbours(inspection.model, asked, chosen, facts, what, layers=layers)
    inputs = inspection.domain_of(index).random(TRIAL_RECORDS, inspection.generator)
    inputs = inputs.to(inspection.device)
    for roles in dropped:
        facts_of = rows.facts(index, TRIAL_RECORDS, roles)
        with explained(name, f"a small batch, {roles}"):
            check_losses(asked, inputs, facts_of, f"{name} (rows: {roles})")


def _look_at_changes(
    inspection: Inspection, pairs: list[Neighbours], index: int, inputs: Tensor
) -> None:
    """Refuse losses that depend on other rows after an attack or views, if these are user code."""
    changes = inspection.path.foreign_changes
    if not changes:
        return
    name = f"{inspection.name} under {changes}"
    with explained(name, "a small batch"):
        drop = not inspection.draws(index, inputs)
    for which in sorted({index, *inspection.later}):
        losses = partial(inspection.changed_losses, which)
        facts = inspection.facts(which, len(pairs[0].one))
        check_neighbours(inspection.model, losses, pairs, facts, name, layers=False)
        if drop:
            check_losses(losses, inputs, inspection.rows.facts(which, TRIAL_RECORDS), name)
        look_at_mixtures(inspection, inspection.changed_losses, name, which, pairs, drop=drop)


def _look_at_memory(inspection: Inspection, index: int, domain: InputDomain) -> None:
    """Refuse a `remember` that fails on a kind of record alone, or writes to model or state."""
    strategy = inspection.training.strategy
    if not strategy.uses("remember"):
        return
    inputs = probe_rows(domain, inspection.generator).to(inspection.device)
    batch = inspection.rows.batch(index, inputs, inspection.rows.facts(index, len(inputs)))
    what = f"{strategy.name}.remember()"
    before = inspection.before
    for n in (len(batch), 1, 0):
        with explained(what, f"{n} records, each alone"):
            inspection.rows.remembered(batch.take(slice(0, n)))
    inspection.watch.refuse_writes(before, inspection.state, what)


def _look_at_steps(inspection: Inspection, index: int, domain: InputDomain, *, alone: bool) -> None:
    """Refuse a step (attack, views, gradient) that fails on a kind of record, on one or on none.

    Poisson sampling can draw so few records, and an error would then reveal how few there are.
    """
    rows = probe_rows(domain, inspection.generator).to(inspection.device)
    facts, _ = inspection.facts(index, len(rows))
    before = inspection.before
    for n in (len(rows), 1, 0):
        with undisturbed(), explained("a step", f"{n} records"):
            inspection.step(index, rows[:n], facts[:n], alone)
    inspection.watch.refuse_writes(before, inspection.state, "a step")


def _look_closer(
    inspection: Inspection, pairs: list[Neighbours], index: int, domain: InputDomain
) -> None:
    """Refuse outputs, features and losses of a record that depend on the other rows.

    Batches are small, and as large as a step is expected to draw.
    """
    model = inspection.model
    large = inspection.pairs(
        domain, large_batch(domain, min(inspection.expected, inspection.at_once))
    )
    model.eval()
    for batches in (pairs, large):
        check_outputs(model, batches, "the model")
        if callable(features := getattr(model, "features", None)):
            check_outputs(features, batches, "features() of the model")
    quiet_training(model)
    for name, losses in losses_of(inspection).items():
        # an attack gets the whole batch of a step
        at_once = inspection.at_once if name == inspection.name else math.inf
        rows = whole_batch(domain, inspection.expected, at_once)
        batches = large
        if rows > len(large[0].one):
            batches = [*large, whole(domain, inspection.generator, rows).to(inspection.device)]
        _look_at_large(inspection, losses, name, index, batches)
    inspection.watch.refuse_writes(inspection.before, inspection.state, "the model")


def _look_at_large(
    inspection: Inspection, losses: Losses, name: str, index: int, batches: list[Neighbours]
) -> None:
    """Refuse losses that depend on other rows in large batches, of new and of mixed rows."""
    model = inspection.model
    rows = inspection.rows
    for size in sorted({len(pair.one) for pair in batches}):
        same = [pair for pair in batches if len(pair.one) == size]
        facts = inspection.facts(index, size)
        check_neighbours(model, partial(losses, index), same, facts, name, layers=False)
        for which in (which for which in inspection.later[-1:] if rows.mixes(which)):
            mixed = rows.beside(which, same[-1], MIXTURES[-1])
            what = f"{name} ({MIXTURES[-1].name})"
            check_neighbours(model, partial(losses, which), same[-1:], mixed, what, layers=False)


def _look_alone(inspection: Inspection, index: int, domain: InputDomain) -> None:
    """Refuse code that fails if each record's gradient is computed alone, as in training."""
    model = inspection.model
    rows = inspection.rows
    pairs = inspection.pairs(domain)
    with explained("the model", "one record"):
        check_buffers(model, pairs[0].one[:1], *(pair.other[1:2] for pair in pairs))
    quiet_training(model)
    what = f"{inspection.name}, record by record,"
    before = inspection.before
    cases = [(index, rows.facts(index, len(pairs[0].one)), pairs)]
    for which in filter(rows.mixes, inspection.later):
        cases.append((which, rows.facts(which, len(pairs[0].one), "in turn"), pairs[:1]))
    for which, facts, batches in cases:
        for pair in batches:
            with explained(what, pair.name):
                inspection.row_gradients(which, pair.other, facts)
            inspection.watch.refuse_writes(before, inspection.state, what)
