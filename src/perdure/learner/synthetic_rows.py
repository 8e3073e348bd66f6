"""Synthetic batches like those of a step: new rows, stored rows, and rows of several experiences.

A loss sees more of a row than its input: its class, its id, its experience, a mark if it is from
memory, and stored tensors. A loss may couple records through any of them, so the guard changes all
of them in the other rows of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perdure.contract.context import Context
from perdure.contract.forward import Forward
from perdure.contract.plan import Plan
from perdure.contract.state import State
from perdure.data.records import Batch
from perdure.planning.training_plan import TrainingPlan
from perdure.privacy.guard.neighbour_checks import explained
from perdure.privacy.guard.probes import Neighbours, domain_of
from perdure.queries.per_record import rows_one_by_one
from perdure.tasks import EXTREME
from perdure.types import Params
from perdure.utils.modules import evaluating
from perdure.utils.seeding import generator

Roles = Literal["new", "stored", "in turn", "one stored", "one new"]
"""Choice of the rows of a batch that are from memory: none, all, every second, the last, or all
but the last.
"""

NEIGHBOURS = 2**20
"""Smallest id of the rows that are changed in a test; kept rows have smaller ids."""

STORED_ROWS = 16
"""Number of synthetic records whose results of `remember` are used as stored tensors."""


LARGE = 100.0
"""Factor for the stored tensors of rows that are changed in a test."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Choice of new and stored rows in two batches that share some rows.

    Args:
        name: description for messages.
        kept: roles of the rows that both batches share.
        one: roles of the other rows of the first batch.
        other: roles of the other rows of the second batch.
    """

    name: str
    kept: Roles
    one: Roles
    other: Roles


MIXTURES = (
    Mixture(name="new rows beside stored ones", kept="new", one="new", other="stored"),
    Mixture(name="stored rows beside new ones", kept="stored", one="stored", other="new"),
    Mixture(name="new and stored rows", kept="in turn", one="stored", other="new"),
)
"""Pairs of batches with different roles of the other rows, and different numbers of stored ones."""

DROPPED: tuple[Roles, ...] = ("in turn", "stored", "one stored", "one new")
"""Roles in tests that remove one record at a time; in the last two, removing the last row leaves
a batch with one role.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadContext(Context):
    """Public facts that record when a loss reads the declared size.

    Args:
        read: names of the facts that were read so far.
    """

    read: set[str]

    def __getattribute__(self, name: str) -> Any:
        if name == "declared_size":
            self.read.add(name)
        return super().__getattribute__(name)


@dataclass(frozen=True, kw_only=True, eq=False)
class SyntheticRows:
    """Source of synthetic batches in an experience of a stream.

    The facts of a row are a declared output, its id, its experience, and 1 if it is stored. For
    single-label records the output is the label. Targets of other tasks are made from it and the
    id; rows that are changed in a test get extreme ones.

    Args:
        training: stream and strategy.
        model: model that is trained.
        context: function from an experience's index and declared size to its public facts.
        state: state of the strategy.
        seed: seed of the stored tensors.
        device: device of the model.
    """

    training: TrainingPlan
    model: nn.Module
    context: Callable[..., Context]
    state: State
    seed: int
    device: str | torch.device

    def rehearses(self, index: int) -> bool:
        """Return True if the batches of an experience contain rows from memory."""
        plan = self._plans[index]
        rehearsed = plan.memory is not None and plan.memory.rehearsed and plan.pool != "memory"
        return rehearsed and index > 0

    def mixes(self, index: int) -> bool:
        """Return True if a batch of an experience can have rows of several roles or experiences."""
        plan = self._plans[index]
        return self.rehearses(index) or (plan.pool != "experience" and index > 0)

    def facts(
        self, index: int, rows: int, roles: Roles = "new", *, neighbours: bool = False
    ) -> Tensor:
        """Make synthetic facts (rows, 4) of a step's rows: label, id, experience, 1 if from memory.

        Args:
            index: index of the experience.
            rows: number of rows.
            roles: roles of the rows; all rows are new if the experience has no rehearsal.
            neighbours: True for rows of the first classes and with large ids; False for rows with
                all classes in turn.
        """
        number = torch.arange(rows)
        stored = _roles(roles, rows) if self.rehearses(index) else torch.zeros_like(number)
        shift = int(neighbours)
        alone = self._plans[index].pool == "experience"
        tasks = torch.full_like(number, index) if alone else (number + shift) % (index + 1)
        if index:
            tasks = torch.where(stored > 0, (number + shift) % index, tasks)
        labels = torch.zeros_like(number)
        for task in range(index + 1):
            classes = torch.tensor(self.training.stream[task].classes)
            turn = number * (1 - shift) % len(classes)
            labels = torch.where(tasks == task, classes[turn], labels)
        ids = number + shift * NEIGHBOURS
        return torch.stack([labels, ids, tasks, stored], dim=1).to(self.device)

    def beside(self, index: int, pair: Neighbours, mixture: Mixture) -> tuple[Tensor, Tensor]:
        """Make label, id, experience and role (rows, 4) for the rows of two synthetic batches."""
        n = len(pair.one)
        kept = self.facts(index, len(pair.kept), mixture.kept)
        one = self.facts(index, n, mixture.one, neighbours=True)
        other = self.facts(index, n, mixture.other, neighbours=True)
        return one.index_copy(0, pair.kept, kept), other

    def batch(self, index: int, inputs: Tensor, facts: Tensor) -> Batch:
        """Build a batch of these rows, with stored tensors if memory may have stored some."""
        outputs, ids, tasks, stored = facts.unbind(1)
        stream = self.training.stream
        # ids distinguish targets without a class, such as numbers
        numbers = outputs + stream.num_classes * (ids + EXTREME * (ids >= NEIGHBOURS))
        return Batch(
            inputs=inputs,
            labels=stream.task.synthetic(
                stream[0].train.labels.to(outputs.device), range(stream.num_classes), numbers
            ),
            ids=ids,
            tasks=tasks,
            from_memory=stored > 0,
            valid=torch.ones_like(stored, dtype=torch.bool),
            stored=self._beside_rows(ids, stored > 0) if self.rehearses(index) else {},
        )

    def context_of(self, index: int) -> Context:
        """Public facts of an experience, as the steps of a run see them."""
        declared = self.training.stream[index].train.declared_size
        facts = vars(self.context(index, declared_size=declared))
        return ReadContext(**facts, read=self._read)

    @property
    def sizes_read(self) -> bool:
        """Return True if a loss has read a declared size so far."""
        return bool(self._read)

    def remembered(self, batch: Batch) -> Params:
        """Results of the strategy's `remember` for synthetic records, each alone."""
        strategy = self.training.strategy
        with torch.no_grad(), evaluating(self.model):
            return rows_one_by_one(
                lambda forward, rows: strategy.remember(forward, rows, self.state),
                Forward(self.model),
                batch,
            )

    def _beside_rows(self, ids: Tensor, stored: Tensor) -> Params:
        """Stored tensors of rows: from other records for stored rows, zeros for new rows.

        They are large for rows that are changed in a test.
        """
        places = ids % STORED_ROWS
        found = {}
        for name, value in self._values.items():
            beside = value[places]
            shape = (-1, *[1] * (value.dim() - 1))
            if value.is_floating_point():
                beside = torch.where((ids >= NEIGHBOURS).view(shape), LARGE * beside, beside)
            found[name] = torch.where(stored.view(shape), beside, torch.zeros_like(beside))
        return found

    @cached_property
    def _read(self) -> set[str]:
        return set()

    @cached_property
    def _plans(self) -> list[Plan]:
        """Plans of all experiences, computed once because every batch needs one."""
        return [self.training.of(experience) for experience in self.training.stream]

    @cached_property
    def _values(self) -> Params:
        """Results of `remember` for random records of the first experience."""
        strategy = self.training.strategy
        if not strategy.uses("remember"):
            return {}
        first = self.training.stream[0].train
        domain = domain_of(first.inputs, first.domain)
        inputs = domain.random(STORED_ROWS, generator(self.seed, "stored")).to(self.device)
        with explained(f"{strategy.name}.remember()", "one record"):
            return self.remembered(self.batch(0, inputs, self.facts(0, STORED_ROWS)))


def _roles(roles: Roles, rows: int) -> Tensor:
    """Return (rows,) int64, 1 for a row from memory and 0 for a new row."""
    number = torch.arange(rows)
    last = number == rows - 1
    chosen = {
        "new": torch.zeros_like(last),
        "stored": torch.ones_like(last),
        "in turn": number % 2 == 1,
        "one stored": last,
        "one new": ~last,
    }
    return chosen[roles].long()
