"""A party: one model, one strategy and one holder of records, with the parts of a training step.

`Session` adds the order of a loop. `Learner`, the Avalanche plugin and a user's own loop are built
on it, so that a strategy always sees the same calls in the same order.
"""

from dataclasses import dataclass
from functools import cached_property, partial

from torch import Tensor, nn

from perdure.contract.context import contexts, spec_of
from perdure.contract.forward import Forward
from perdure.contract.plan import Plan
from perdure.contract.state import State
from perdure.curator.held_records import HeldRecords
from perdure.curator.hook_curator import for_hooks
from perdure.curator.local_curator import LocalCurator, unwatched
from perdure.curator.shared_curator import SharedCurator
from perdure.data.groups import weighted
from perdure.data.record_identity import ComparedRecords
from perdure.data.records import Batch
from perdure.errors import StrategyError
from perdure.learner.averaging import Average, measure_statistics, put_values
from perdure.learner.checkpoint import Position
from perdure.learner.chosen_loss import refuse_unused_weights, task_of_run, tasks_by_experience
from perdure.learner.folder_claims import refuse_other_privacy
from perdure.learner.guarded_party import GuardedParty
from perdure.learner.inspected_path import InspectedPath
from perdure.learner.model_mark import ModelMark
from perdure.learner.runaway import bounded, refuse_runaway, refuse_runaway_step
from perdure.learner.sanity_checks import refuse_misfits, require_state, single_rows_refused
from perdure.learner.step_changes import (
    MovedGradients,
    add_weight_penalties,
    with_gradient_noise,
)
from perdure.learner.step_memory import StepMemory
from perdure.planning.training_plan import TrainingPlan
from perdure.privacy.guard.writes import WriteWatch
from perdure.privacy.private_sum import ChangedSumError, PrivateSum
from perdure.types import Params
from perdure.utils.denormals import flushed
from perdure.utils.folder_lock import FolderLock
from perdure.utils.modules import detached_copies, end_training, trainable_parameters
from perdure.utils.seeding import derive, seed_globally

HOOKS = ("losses", "references", "penalty", "project", "after_step", "after_step_in_place")


@dataclass(kw_only=True, eq=False)
class Party(GuardedParty):
    """A model, a strategy and the records of one party, with the parts of a training step.

    Guarantee: under privacy a record influences the model only through releases, each charged
    before its noise is drawn; `reserve` charges the steps.

    The fields are described in `Session`, which adds the order of a loop.
    """

    def __post_init__(self) -> None:
        self.training = TrainingPlan(
            stream=self.stream,
            strategy=self.strategy,
            batch_size=self.batch_size,
            epochs=self.epochs,
            iterations=self.iterations,
            blocks=self.blocks,
            privacy=self.privacy,
            participation=self.participation,
            lost=self.lost,
        )
        self.lock = FolderLock(self.folder) if self.folder else None
        self._opened: PrivateSum | None = None
        self.received: frozenset[str] = frozenset()
        """Names of values that a server has sent for the experience, so no restart resets them."""
        self.hold()
        try:
            self._lay_out()
        except BaseException:
            self.close()
            raise

    def hold(self) -> None:
        """Take the lock of the folder, and check that nobody else wrote to the ledger.

        Raises:
            LedgerError: if another process or learner wrote to it.
            RunError: if another process or learner holds the folder.
        """
        if self._opened is not None:
            self._opened.ledger.chain.hold()
        elif self.lock is not None:
            self.lock.acquire()

    def close(self) -> None:
        """Unlock the folder until it is used again; charged steps not yet taken are given up."""
        if self.lock is None:
            return
        if self._opened is not None:
            self._opened.open(min(self.position.experience, len(self.stream) - 1))
            self._opened.close()
        self.lock.release()

    def _lay_out(self) -> None:
        model = self.model
        private = self.privacy is not None
        if self.folder:
            refuse_other_privacy(self.folder, private=private)
        self.mark = ModelMark(model, self.folder, warm_start=self.warm_start)
        self.stream = weighted(self.stream.to(self.device), self.group_weights, private=private)
        self.compared = ComparedRecords()
        self._watch: WriteWatch | None = None
        self._compare_values = True
        self._goes_alone = False
        self._inspected: InspectedPath | None = None
        self._path = None
        self.params: Params = dict(trainable_parameters(model))
        self.forward = Forward(model)
        self._initial = self.initial or {n: t.clone() for n, t in model.state_dict().items()}
        self.strategy.refuse_task(self.stream.task)
        self.task = task_of_run(self.training, self.loss)
        refuse_unused_weights(self.training, self.stream)
        tasks = tasks_by_experience(self.stream, self.task)
        self.context = contexts(self.stream, self.device, tasks)
        refuse_misfits(model, self.training, self.stream, self.adversary, self.views)
        if self.mixing:
            self.mixing.refuse_misfits(self.stream, private=private)
        self.refuse_defence()
        spec = spec_of(model, detached_copies(self.params), self.stream, private=private)
        self.state: State = require_state("init", self.strategy, self.strategy.init(spec))
        self.held = HeldRecords(
            seed=self.seed,
            client=self.client,
            batch_size=self.batch_size,
            private_sum=self._open_private_sum() if private else None,
        )
        self._opened = self.held.private_sum
        make = partial(SharedCurator, processes=self.group) if self.group else LocalCurator
        self.curator = make(
            self.held,
            micro_batch_size=self.micro_batch_size,
            alone=self._goes_alone,
            watched=self.private_pass if private else unwatched,
        )
        self.hook_curator = for_hooks(
            self.curator, strategy=self.strategy.name, cost=self.strategy.privacy_cost
        )
        self.uses: dict[str, bool] = {}
        self.trained: Params = {}
        self._filled = 0
        self._memory = StepMemory()
        self.average = Average(self.averaging)
        self.moves = MovedGradients(self.sharpness, self.weight_noise)
        self._stochastic = any(
            isinstance(module, nn.modules.dropout._DropoutNd) for module in model.modules()
        )

    # ------------------------------------------------------------------ an experience

    def open(self, index: int) -> bool:
        """Open experience `index`; return True if it begins now.

        After a resume in its middle, it only opens the records again, and returns False.

        Raises:
            ConfigError: if another learner has trained the model since this one was prepared.
        """
        self.mark_model()
        experience = self.stream[index]
        plan = self.training.of(experience)
        begins = not self.position.begun or self.position.experience != index
        if begins:
            self.position = Position(experience=index, begun=True)
            self.average.clear()
            self.moves.last = {}
            if plan.restart:
                self.model.load_state_dict(
                    {n: t for n, t in self._initial.items() if n not in self.received},
                    strict=not self.received,
                )
        self._steps = self.training.steps(index) if self.averaging or self.defence else 0
        if self.private_sum:
            self._watch = WriteWatch(self.model)
        if self._inspected:
            self._inspected.look_again(self.inspection, index, begins=begins)
        context = self.context(index, declared_size=experience.train.declared_size)
        self.held.open(self.stream.upto(index), plan, context, self.forward)
        self.select(plan)
        return begins

    def select(self, plan: Plan) -> None:
        """Choose the parameters and hooks that an experience uses.

        Raises:
            StrategyError: if the plan trains no parameter.
        """
        prefixes = plan.trainable
        self.trained = {
            name: param
            for name, param in self.params.items()
            if prefixes is None or name.startswith(prefixes)
        }
        if not self.trained:
            known = ", ".join(self.params)
            raise StrategyError(
                f"the plan trains parameters that begin with {prefixes}, but the model has none; "
                f"allowed: prefixes of {known}"
            )
        for param in self.params.values():
            param.grad = None  # the optimiser must not use a gradient of an earlier experience
        self._memory = StepMemory()
        self.uses = dict(self._hooks)
        self.uses["penalty"] &= plan.applies_penalty
        self.uses["observe"] = plan.memory is not None and plan.memory.update == "step"

    def reserve(self, steps: range, digest: str) -> None:
        """Charge a block of steps to every exposed partition, before the block draws any noise.

        Args:
            steps: steps of the open experience.
            digest: digest of everything except the records that determines the steps (see
                `noise_digest`).

        Raises:
            GuardError: if the code from rows to losses is not the code that the guard tested.
        """
        if self._inspected:
            self._inspected.refuse_other(self.model, self.path)
        self._compare_values = True
        self.mark_model(learnt=bool(steps))
        self.held.reserve(steps, digest)

    # ------------------------------------------------------------------ a step

    def sample(self, step: int) -> Batch:
        """Return the rows of one step: by Poisson sampling under privacy, shuffled without."""
        self.position.step = step
        return self.held.sample(step)

    @single_rows_refused
    def fill_gradients(self, batch: Batch) -> None:
        """Fill `.grad` of the trained parameters with gradient and penalty, after the projection.

        The next step may reuse the memory of `.grad`, so copy a gradient to keep it. If the code
        from rows to losses changed after its inspection, a `GuardError` is raised.

        Args:
            batch: rows that `sample` returned for the current step.
        """
        step = self.position.step
        if self._inspected:
            self._inspected.refuse_changed(self.model, self.path)
        if self._stochastic and self.private_sum is None:
            # Dropout uses torch's global generator, so seed it for every step.
            seed_globally(derive(*self._place("layers", step)))
        for param in self.trained.values():
            param.grad = None  # so that the new gradient can use its memory
        with self._drawing(step):
            changed = self._varied(batch, step)
            references = self.references()
            gradient = self._released(changed, step)
        while gradient is None:
            # The step was charged again, so its rows are drawn again.
            batch = self.held.draw(step)
            with self._drawing(step):
                gradient = self._released(self._varied(batch, step), step)
        self.notify("step.gradient")
        self.observe(batch)
        self.set_gradients(gradient, references)
        shown = None if self.private_sum else self.curator.diagnostics
        losses = shown.losses if shown else None
        place = (self.position.experience, step, self._filled)
        refuse_runaway_step(self.trained, losses, self.training, *place)
        self._filled += 1

    def _released(self, batch: Batch, step: int) -> Params | None:
        """Return the gradient of a step; None if the step was charged again."""
        ask = partial(self.curator.gradient, self.losses, self.trained, batch, step)
        try:
            if not (self.sharpness or self.weight_noise):
                return ask()
            return self.moves.gradient(
                ask,
                self.trained,
                self.model,
                seed=derive(*self._place("weight noise", step)),
                private=self.privacy is not None,
            )
        except ChangedSumError:
            return None

    def _varied(self, batch: Batch, step: int) -> Batch:
        """Return the rows of a step after the attack, with their views, mixed in pairs."""
        if not (self.adversary or self.views or self.mixing or self.defence):
            return batch
        return self.path.changed(
            batch,
            self.losses,
            self.model,
            self.params,
            seed_of=lambda purpose: self.seed_of(purpose, step),
            watched=self.private_pass,
            private=self.privacy is not None,
            context=self.held.context,
            progress=step / self._steps if self._steps else 0.0,
        )

    def references(self) -> tuple[Params, ...]:
        """Return the released reference gradients of the current step; () if none is used."""
        if not self.uses["references"]:
            return ()
        return self.strategy.references(self.hook_curator, self.trained, self.state)

    def losses(self, forward: Forward, batch: Batch) -> Tensor:
        """Return (n,) loss of the strategy for every row, averaged over views if there are any."""
        return self.path.losses(forward, batch, self.held.context, self.state)

    def observe(self, batch: Batch) -> None:
        """Offer the rows of a step to a memory that is updated in every step."""
        if self.uses["observe"]:
            self.held.observe(batch, self.remember)

    def remember(self, forward: Forward, batch: Batch) -> Params:
        """Return the tensors that memory stores with each row."""
        with self.private_pass():
            return self.strategy.remember(forward, batch, self.state)

    def penalty(self) -> Tensor | None:
        """Return the strategy's penalty, a scalar, for the current parameters; None without one."""
        return self.strategy.penalty(self.params, self.state) if self.uses["penalty"] else None

    def set_gradients(self, gradient: Params, references: tuple[Params, ...]) -> None:
        """Write the gradient, with penalty and projection, and its bounded norm, to `.grad`."""
        total = gradient
        if self.uses["penalty"] or self.uses["after_step"] or self.l1 or self.l2:
            # A copy, because an optimiser may write into .grad.
            total = self._memory.copy_of(gradient)
        if self.uses["penalty"]:
            self.strategy.add_penalty_gradient(total, self.params, self.state)
        if self.l1 or self.l2:
            add_weight_penalties(total, self.trained, l1=self.l1, l2=self.l2)
        if self.uses["project"]:
            total = self.strategy.project(total, references, self.state)
        if self.max_grad_norm is not None:
            total = bounded(total, self.max_grad_norm)
        if self.gradient_noise:
            step = self.position.step
            seed = derive(*self._place("gradient noise", step))
            total = with_gradient_noise(total, self.gradient_noise, step, seed)
        if self.uses["after_step"]:
            self._memory.begin(self.trained, gradient, again=self.uses["after_step_in_place"])
        for name, param in self.trained.items():
            param.grad = total[name]

    def begin_round(self) -> None:
        """Give the strategy the parameters with which a block of steps starts."""
        if self.strategy.uses("begin_round"):
            new = self.strategy.begin_round(detached_copies(self.params), self.state)
            self.state = require_state("begin_round", self.strategy, new)

    def follow_step(self) -> None:
        """Update the strategy's state after the optimiser's step, and go to the next step."""
        if self.uses["after_step"]:
            after = {name: param.detach() for name, param in self.trained.items()}
            self.state = self._memory.follow(
                self.strategy, after, self.state, self.curator.noise_variance
            )
        self.average.follow(self.trained, self.position.step, self._steps)
        self.position.step += 1

    @single_rows_refused
    def adopt_average(self) -> None:
        """Give the model its averaged parameters, if there are any, and end the average.

        Without privacy, running statistics of BatchNorm are computed again on the pooled records;
        under privacy no model has them.
        """
        if not self.average.count:
            return
        put_values(self.params, self.average.values)
        self.average.clear()
        if self.private_sum is None:
            seed_globally(derive(*self._place("averaged statistics", self.position.step)))
            measure_statistics(self.model, self.held.rows.inputs, self.device)

    def rest(self) -> None:
        """Free the gradients and copies of a step."""
        for param in self.params.values():
            param.grad = None
        self._memory = StepMemory()
        if self.position.begun:
            self.held.pool.rest()

    def release(self) -> None:
        """Let go of the model and the records; the party cannot be used afterwards.

        The class that hooks see refers to itself, so only the garbage collector frees it, which may
        come after thousands of parties. It must not hold the records until then.
        """
        vars(self.held).clear()
        vars(self).clear()

    # ------------------------------------------------------------------ the end of an experience

    @flushed()
    def consolidate(self) -> None:
        """Offer the records to memory, let the strategy consolidate, and end the experience.

        Raises:
            DataError: if parameters are NaN or infinite because an input is.
            RunawayError: at the end of a stage, if training diverged and parameters are NaN or
                infinite.
        """
        ended = self.position.experience
        if self.stream.stage_of(ended).last == ended:
            refuse_runaway(self.params, self.training, ended)
        self.mark_model(learnt=True)
        self.adopt_average()
        end_training(self.model)
        self._compare_values = True
        remembers = self.private_sum is not None or self.strategy.uses("remember")
        self.held.store(self.remember if remembers else None)
        new = self.state
        if self.strategy.uses("after_experience"):
            params = detached_copies(self.params)
            new = self.strategy.after_experience(self.hook_curator, params, self.state)
        self.state = self.strategy.derive(require_state("after_experience", self.strategy, new))
        self.notify("experience.consolidated")
        self.held.close()
        self.position = Position(experience=self.position.experience + 1)

    # ------------------------------------------------------------------ inside

    def mark_model(self, *, learnt: bool = False) -> None:
        """Record on the model the privacy cost of this session, or its training without privacy."""
        without = self.trained_by or self._trained_on
        ledger = self.private_sum.ledger if self.private_sum else None
        self.mark.put(ledger, uncounted=without if learnt else "")

    @cached_property
    def _hooks(self) -> dict[str, bool]:
        return {hook: self.strategy.uses(hook) for hook in HOOKS}

    @cached_property
    def _trained_on(self) -> str:
        return f"trained without privacy on {', '.join(sorted(self.stream.partitions[-1]))}"
