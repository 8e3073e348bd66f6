"""Parts of a party that privacy needs: the private sum, the guard, and secret seeds."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

from perdure.contract.context import Context
from perdure.contract.state import State
from perdure.curator.held_records import HeldRecords
from perdure.learner.inspected_path import InspectedPath
from perdure.learner.inspection import Inspection
from perdure.learner.loss_path import LossPath
from perdure.learner.model_history import history_of
from perdure.learner.model_mark import ModelMark
from perdure.learner.party_settings import PartySettings
from perdure.learner.private_setup import inspect, lasting_rule_of, open_private_sum, refuse_no_size
from perdure.learner.several_processes import shared_sum
from perdure.learner.synthetic_rows import SyntheticRows
from perdure.planning.training_plan import TrainingPlan
from perdure.privacy.guard.writes import WriteWatch
from perdure.privacy.private_sum import PrivateSum
from perdure.tasks import Task
from perdure.utils.folder_lock import FolderLock
from perdure.utils.seeding import Seed, derive, drawing_from


class GuardedParty(PartySettings):
    """Base of `Party`: its private sum, the guard's inspection, and the seeds of its steps."""

    training: TrainingPlan
    task: Task
    context: Callable[..., Context]
    state: State
    held: HeldRecords
    lock: FolderLock | None
    mark: ModelMark
    _watch: WriteWatch | None
    _compare_values: bool
    _goes_alone: bool
    _inspected: InspectedPath | None
    _path: LossPath | None

    @property
    def private_sum(self) -> PrivateSum | None:
        """Private sum, with ledger and noise; None without privacy."""
        return self.held.private_sum

    @property
    def path(self) -> LossPath:
        """Computation from rows to losses, with the current settings.

        Raises:
            PrivacyError: for mixed pairs under privacy.
        """
        known = self._path
        # asked for several times in a step; the settings hardly ever change
        if not (
            known is not None
            and known.strategy is self.strategy
            and known.adversary is self.adversary
            and known.views is self.views
            and known.mixing is self.mixing
            and known.defence is self.defence
            and known.precision is self.precision
            and known.task is self.task
        ):
            if self.mixing and self.privacy is not None:
                # a callback or a user's own loop may have set it, after the first check
                raise self.mixing.refusal()
            self.refuse_defence()
            known = self._path = LossPath(
                strategy=self.strategy,
                adversary=self.adversary,
                views=self.views,
                mixing=self.mixing,
                defence=self.defence,
                precision=self.precision,
                task=self.task,
            )
        return known

    def refuse_defence(self) -> None:
        """Refuse a defence that does not fit task, attack or privacy."""
        if self.defence is not None:
            private = self.privacy is not None
            self.defence.refuse_misfits(self.stream.task, self.adversary, private=private)

    def inspection(self) -> Inspection:
        """Inspection of the current model, losses and state by the guard."""
        return Inspection(
            training=self.training,
            model=self.model,
            path=self.path,
            rows=SyntheticRows(
                training=self.training,
                model=self.model,
                context=self.context,
                state=self.state,
                seed=self.seed,
                device=self.device,
            ),
            expected=self.training.most_expected,
            at_once=self.micro_batch_size or math.inf,
            seed=self.seed,
            device=self.device,
        )

    def _open_private_sum(self) -> PrivateSum:
        refuse_no_size(self.stream)
        inspection = self.inspection()
        verdict = inspect(inspection)
        self._goes_alone = verdict.alone
        self._inspected = InspectedPath(inspection, verdict)
        simulated = self.privacy is not None and self.privacy.seed is not None
        history = history_of(
            self.mark.before,
            {each.train.partition: lasting_rule_of(each.train) for each in self.stream},
            simulated=simulated,
        )
        private_sum = open_private_sum(
            self.training,
            folder=self.folder,
            client=self.client,
            owner=self.owner,
            trace=self.notify,
            independence=verdict.independence,
            lock=self.lock,
            history=history,
            make=shared_sum(self.group, self.make_private_sum),
            helps=self.group is not None and not self.group.first,
        )
        self.training = replace(self.training, schedule=private_sum.schedule)
        return private_sum

    @contextmanager
    def private_pass(self, values: bool = False) -> Iterator[None]:
        """Context manager that refuses writes to a parameter, a buffer or the state.

        Args:
            values: also compare values, because version counters may miss writes.

        Raises:
            GuardError: names the tensor.
        """
        if self._watch is None:
            yield
            return
        values = values or self._compare_values
        self._compare_values = False
        with self._watch.unwritten(self.state, "a private pass", values=values):
            yield

    def seed_of(self, purpose: str, step: int) -> Seed:
        """Return the seed of random numbers inside a step; it is secret under privacy."""
        if self.private_sum:
            return self.private_sum.secret(purpose, step)
        return derive(*self._place(purpose, step))

    def _place(self, purpose: str, step: int) -> tuple[int, str, int, int, int]:
        return self.seed, purpose, self.client, self.position.experience, step

    def _drawing(self, step: int) -> AbstractContextManager[None]:
        """Context manager that gives torch's random numbers in a private step a secret seed.

        This covers dropout inside attention or a recurrent layer and `F.dropout` in a forward pass,
        which cannot be seen from outside. Without privacy, `fill_gradients` seeds dropout layers.
        """
        if self.private_sum is None:
            return nullcontext()
        return drawing_from(self.seed_of("layers", step), self.device)
