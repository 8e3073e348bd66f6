"""The learner, whose one training loop runs every strategy, client and privacy mode."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from perdure.adversarial.base import Attack
from perdure.adversarial.defences.base import Defence
from perdure.contract.strategy import Strategy
from perdure.data.augmentation import Views
from perdure.data.experience import Stream
from perdure.data.groups import GroupWeights
from perdure.data.mixing import Mixing
from perdure.data.value_checks import check_streams
from perdure.learner.arguments import PLAIN, check_arguments, check_stream, plain_model
from perdure.learner.averaging import EMA, SWA
from perdure.learner.checkpoint import PROGRESS, Snapshot, Store
from perdure.learner.evaluation import filled_matrix, lacks_late_tests
from perdure.learner.fingerprint import Fingerprint, fingerprint_of
from perdure.learner.noise_digest import noise_digest
from perdure.learner.optimizers import MakeOptimizer, made_optimizer, options_of, put_options
from perdure.learner.party_settings import OWNER
from perdure.learner.private_setup import refuse_optimizer
from perdure.learner.progress import watched
from perdure.learner.run_folder import checkpoint_of, restore_checkpoint, write_checkpoint
from perdure.learner.sanity_checks import refuse_second_ledger
from perdure.learner.schedules import (
    MakeSchedule,
    ReplayedRates,
    made_schedule,
    refuse_schedule,
    replayed,
    take_step,
)
from perdure.learner.session import Session
from perdure.learner.session_front import SessionFront
from perdure.learner.several_processes import (
    counted_by,
    joined,
    refuse_different,
    refuse_diverged,
    restore_first,
)
from perdure.learner.snapshots import restore_snapshot, take_snapshot
from perdure.learner.step_changes import SAM
from perdure.learner.trained_parameters import Train, choose_trained
from perdure.learner.validation import Validation, Validator
from perdure.planning.training_plan import LostLedgers, Participation
from perdure.privacy.private_sum import MakePrivateSum, PrivateSum
from perdure.privacy.settings import Privacy
from perdure.tasks.losses import Loss
from perdure.utils.checked_fields import check_fields
from perdure.utils.denormals import flushed
from perdure.utils.modules import same_bits

Callback = Callable[[str, "Learner"], None]
"""Function that is called at every named point of the loop; see `perdure.learner.POINTS`."""


@dataclass(kw_only=True)
class Learner(SessionFront):
    """Learner that trains one model on a stream, one experience after another.

    >>> optimizer = partial(torch.optim.Adam, lr=1e-3)
    >>> learner = Learner(model=model, strategy=EWC(strength=100.0), optimizer=optimizer)
    >>> matrix = learner.fit(stream)       # (T, T) accuracy in percent

    Args:
        model: any module with a full-width head and `features`, as `perdure.models.Classifier`.
        strategy: strategy against forgetting.
        optimizer: function from parameters to a torch optimiser that needs one gradient per step.
        scheduler: called as scheduler(optimizer, steps=number of steps) at the start of an
            experience; it returns a schedule, which is updated after every step. None for a
            constant rate. Every experience starts from the learning rate of `optimizer`.
        epochs: number of passes over the records of an experience; give this or `iterations`.
        iterations: number of steps in an experience.
        blocks: number of blocks in an experience; each is one charge in the ledger, and ends with a
            checkpoint (in a federation: with a round). With one block per experience, in pieces
            (`perdure.data.online`) and without privacy, checkpoints are made at evaluations.
        evaluate_every: in a stage of several experiences, evaluate the model also after every so
            many experiences (`progress`); None to evaluate at the end of each stage only.
        batch_size: number of new records per step.
        micro_batch_size: rows in one pass, to limit memory; results change by rounding only.
        seed: seed of all random numbers except private noise.
        device: device of records and model.
        privacy: None, or record-level differential privacy.
        adversary: an attack applied to every batch before its gradient (adversarial training).
        views: random versions of every record, averaged inside its loss (augmentation).
        precision: precision of the passes in training; norms and sums stay in float32.
        reset_optimizer: start every experience with a new optimiser.
        callbacks: functions, called as callback(point, learner) at every point in `POINTS`; one
            with a method `close` is closed when `fit` ends.
        show_progress: None for a bar in a terminal; True also for lines elsewhere; False for none.
        client: number of the party; 0 if there is only one.
        owner: name of the party in the ledger; a federation uses client-N if there is none.
        folder: folder for checkpoints, ledger and keys; None to write no files. In a federation
            give the folder to `fit_federated` instead.
        warm_start: continue from a model that a learner has trained before. Under privacy its
            earlier cost is charged to the new ledger, too.
        make_private_sum: function that makes the private sum; audits give another one.
        averaging: average of the parameters over the steps of an experience, EMA() or SWA(). The
            model answers by it, and becomes it at the end of an experience, before the strategy
            consolidates; in a federation at the end of each round.
        sharpness: SAM() for gradients at the worst parameters nearby; None for plain ones.
        l1: factor of the sum of absolute values of the trained parameters in the loss.
        l2: factor of half the sum of their squares, added to the loss by its gradient.
        gradient_noise: variance of normal noise on the gradient in step 0, over (1 + t)^0.55 later.
        weight_noise: deviation of normal noise on the parameters while each gradient is computed.
        validation: measurements on validation records in `fit`, which end an experience early or
            choose its best parameters; None for none.
        loss: training loss of every record (see `perdure.tasks.losses`); None for the task's.
        max_grad_norm: largest L2 norm of the gradient after penalty and projection; None: any.
        processes: number of processes that divide every batch, started by `torchrun`; process 0
            alone has callbacks, folder and ledger. 1 for this process only.
        mixing: mixed pairs of records, Mixup() or CutMix(); refused under privacy.
        group_weights: factors of the losses of groups of records, from declared counts.
        fine_tune: parameters to train: "all", "head", or beginnings of names; None: as they are.
        defence: losses of rows and their perturbed versions, as TRADES(); None: perturbed rows.
        compile: compile the model by `torch.compile`; refused under privacy.
    """

    model: nn.Module
    strategy: Strategy
    optimizer: MakeOptimizer
    scheduler: MakeSchedule | None = None
    epochs: int | None = None
    iterations: int | None = None
    blocks: int = 1
    evaluate_every: int | None = None
    batch_size: int = 128
    micro_batch_size: int | None = None
    seed: int = 0
    device: str | torch.device = "cpu"
    privacy: Privacy | None = None
    adversary: Attack | None = None
    views: Views | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    reset_optimizer: bool = False
    callbacks: Sequence[Callback] = ()
    show_progress: bool | None = None
    client: int = 0
    owner: str = OWNER
    folder: Path | None = None
    warm_start: bool = False
    make_private_sum: MakePrivateSum = PrivateSum
    matrix: list[list[float]] = field(default_factory=list)
    progress: list[tuple[int, list[float]]] = field(default_factory=list)
    """Evaluations inside stages: index of the experience that ended, and accuracies by stage."""
    averaging: EMA | SWA | None = None
    sharpness: SAM | None = None
    l1: float = 0.0
    l2: float = 0.0
    gradient_noise: float = 0.0
    weight_noise: float = 0.0
    validation: Validation | None = None
    loss: Loss | None = None
    max_grad_norm: float | None = None
    processes: int = 1
    mixing: Mixing | None = None
    group_weights: GroupWeights | None = None
    fine_tune: Train | None = None
    defence: Defence | None = None
    compile: bool = False
    _session: Session | None = field(default=None, init=False, repr=False)
    _validator: Validator | None = field(default=None, init=False, repr=False)
    _rates: ReplayedRates | None = field(default=None, init=False, repr=False)
    _scheduler: LRScheduler | None = field(default=None, init=False, repr=False)
    fingerprint: Fingerprint = field(default_factory=dict, init=False, repr=False)
    driven_by: Mapping[str, object] = field(default_factory=dict, init=False, repr=False)
    """Settings of the caller of the learner, such as a federation; they are in the fingerprint."""
    participation: Participation | None = field(default=None, init=False, repr=False)
    """Rounds of a client in a federation, set by its app; None for all steps."""
    lost: LostLedgers | None = field(default=None, init=False, repr=False)
    """Ledgers that a client of a federation lost with its disk, set by its app."""

    # ------------------------------------------------------------------ the loop

    @flushed()
    def train(self, steps: range) -> None:
        """Train a block of steps.

        Args:
            steps: a block of the current experience; the ledger is charged once for it.
        """
        session = self.session
        for batch in session.steps(steps, self.noise_digest):
            session.backward(batch)
            take_step(self._optimizer, self._scheduler)
            session.after_step()

    # ------------------------------------------------------------------ a whole stream

    @watched
    def fit(self, stream: Stream) -> Tensor:
        """Train on every experience in turn and return the accuracy matrix (T, T) in percent.

        Row i is evaluated at the end of stage i, on the test records of every stage (an
        experience, or all its pieces, see `perdure.data.online`), by the metric of the task. With a
        `folder`, a stopped run continues bit-identically, with new experiences and late test
        records (`Stream.with_test`).

        Raises:
            DataError: before the run, if test inputs, or under privacy training inputs, are NaN or
                infinite, or if an id is in both parts; `prepare` and `train` do not check this.
            LedgerError: if the folder's ledger is missing, or does not continue its checkpoint's.
            PrivacyError: if one of the folder's run and this one has privacy, and one has none.
            RunError: if the folder is in use, or its checkpoint is of a run with other settings;
                the message names the differences.
        """
        check_stream(stream)
        check_streams([stream], training=bool(self.privacy))
        try:
            self.prepare(stream)
            self.resume()
            for index in range(self.position.experience, len(stream)):
                measured = self.is_measured(index)
                # Under privacy a resume never goes back to an earlier experience.
                kept = measured or self.blocks > 1 or self.privacy is not None
                self.begin(index)
                for block in self.training.remaining_blocks(index, self.position.step):
                    self._train_validated(block)
                    if kept:
                        self.save()
                self.finish()
                if measured:
                    self.measure()
                if kept:
                    self.save()
            if lacks_late_tests(self.stream, self.matrix):
                self.measure()
                self.save()
        finally:
            self.close()
        return filled_matrix(self.matrix, width=len(stream.stages))

    def _train_validated(self, block: range) -> None:
        """Train a block of steps, measured on the validation records, up to an early stop."""
        validator = self._validator
        if validator is None:
            self.train(block)
            return
        steps = self.training.steps(self.position.experience)
        for piece in validator.pieces(block, steps):
            self.train(piece)
            validator.follow(self.session, steps)

    def prepare(self, stream: Stream) -> None:
        """Open the session: create the state and, under privacy, calibrate the noise of the stream.

        The folder is locked for this learner until `close`, or until the learner is deleted.

        Raises:
            ConfigError: if the model does not have one output per class.
            PrivacyError: if the learner trained privately before without a folder for its ledger.
        """
        if self.privacy:
            if not self.folder and not self.warm_start:
                refuse_second_ledger(self.position)
            refuse_optimizer(self.optimizer, self.params)
        self.close()
        self.matrix, self.progress = [], []
        self._rates = None
        self._new_optimizer()
        if self.scheduler:  # refuse a schedule before anything is inspected, charged or written
            refuse_schedule(self.optimizer, self.scheduler, self.iterations)
        self._validator = self._new_validator(stream)
        self._session = Session(
            model=self.model,
            strategy=self.strategy,
            stream=self._validator.stream if self._validator else stream,
            epochs=self.epochs,
            iterations=self.iterations,
            blocks=self.blocks,
            batch_size=self.batch_size,
            privacy=self.privacy,
            seed=self.seed,
            client=self.client,
            owner=self.owner,
            participation=self.participation,
            lost=self.lost,
            folder=self.folder,
            device=self.device,
            micro_batch_size=self.micro_batch_size,
            precision=self.precision,
            adversary=self.adversary,
            views=self.views,
            initial=self._initial,
            notify=self._notify,
            warm_start=self.warm_start,
            make_private_sum=self.make_private_sum,
            averaging=self.averaging,
            sharpness=self.sharpness,
            l1=self.l1,
            l2=self.l2,
            gradient_noise=self.gradient_noise,
            weight_noise=self.weight_noise,
            loss=self.loss,
            max_grad_norm=self.max_grad_norm,
            group=self._group,
            trained_by=counted_by(self._group),
            mixing=self.mixing,
            group_weights=self.group_weights,
            fine_tune=self.fine_tune,
            defence=self.defence,
        )
        if self.folder or self.driven_by or self._group:
            self.fingerprint = fingerprint_of(
                self._session,
                optimizer=self.optimizer,
                scheduler=self.scheduler,
                extra=self._own_settings(),
            )
        if self._group:
            refuse_different(self._group, self.fingerprint, stream)

    def _own_settings(self) -> dict[str, object]:
        """Return settings of the fingerprint that the session does not have."""
        given: dict[str, object] = {"reset_optimizer": self.reset_optimizer}
        if self.compile:
            given["compile"] = True
        if self.validation:
            given["validation"] = self.validation.settings()
        return {**given, **self.driven_by}

    def _new_validator(self, stream: Stream) -> Validator | None:
        """Hold out records of a stream for validation; None without validation."""
        given = self.validation
        private = self.privacy is not None
        return Validator(given, stream, self.seed, private=private) if given else None

    # ------------------------------------------------------------------ one experience

    def begin(self, index: int) -> None:
        """Open experience `index`; after a resume in its middle, only open its records again."""
        begins = self.session.open(index)
        restart = self.training.of(self.stream[index]).restart
        if begins:
            if self._validator:
                self._validator.begin()
            if restart or self.reset_optimizer:
                self._new_optimizer()
            self._new_schedule(index)
        self._notify("experience.begin")

    def finish(self) -> None:
        """Consolidate the experience with the current parameters, and go to the next one.

        Raises:
            RunawayError: if training diverged, so that parameters are NaN or infinite.
        """
        if self._validator:
            self._validator.finish(self.session)
        refuse_diverged(self._group, self.model)
        self.session.consolidate()
        self._scheduler = None
        self._notify("experience.end")

    # ------------------------------------------------------------------ evaluation

    def measure(self) -> None:
        """Evaluate the model after the experience that ended last.

        The accuracies are added to `matrix` at the end of a stage, and to `progress` inside one.
        """
        ended = self.position.experience - 1
        stage = self.stream.stage_of(ended)
        accuracies = self.evaluate(self.stream)
        if ended == stage.last:
            self.matrix[stage.number :] = [accuracies]
        else:
            self.progress.append((ended, accuracies))
        self._notify("evaluated")

    # ------------------------------------------------------------------ stopping and resuming

    def snapshot(self) -> Snapshot:
        """Copy everything that is needed to continue the run; private memory rows are separate."""
        now = take_snapshot(self.session, self._optimizer, self._scheduler, self.matrix)
        tensors, facts = self._validator.snapshot() if self._validator else ({}, {})
        return replace(
            now,
            tensors={**now.tensors, **tensors},
            facts={**now.facts, PROGRESS: list(self.progress), **facts},
        )

    def checkpoint(self) -> Snapshot:
        """Return a snapshot to write to disk, with the run's fingerprint and the ledger's head.

        With these two, a folder of another run, or one whose private ledger is missing, is refused.
        """
        return checkpoint_of(self.snapshot(), self.session, self.fingerprint)

    def restore_checkpoint(self, snapshot: Snapshot, *, where: object = None) -> None:
        """Restore a checkpoint of this run; call `prepare` first.

        Args:
            snapshot: snapshot from the disk, made by `checkpoint`.
            where: folder of the checkpoint, for messages; None for the learner's own folder.

        Raises:
            LedgerError: if the ledger does not continue from the head in the checkpoint.
            RunError: if the checkpoint is of a run with other settings; the message names them.
        """
        self._rewind(snapshot)
        self.matrix = restore_checkpoint(
            snapshot,
            self.session,
            self._optimizer,
            self._scheduler,
            fingerprint=self.fingerprint,
            where=where or self.folder,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Restore the state of the run at the time of `snapshot`; call `prepare` first."""
        self._rewind(snapshot)
        self.matrix = restore_snapshot(snapshot, self.session, self._optimizer, self._scheduler)

    def save(self) -> None:
        """Write a checkpoint, if there is a folder."""
        if self.folder:
            self.session.hold()
            self._notify("checkpoint.begin")
            write_checkpoint(self.session, self.checkpoint())
            self._notify("checkpoint.end")

    def resume(self) -> bool:
        """Continue from the last checkpoint in the folder, if there is one."""
        snapshot = Store(self.folder).load() if self.folder else None
        if snapshot:
            self.restore_checkpoint(snapshot)
        snapshot = restore_first(self, self._group, snapshot) if self._group else snapshot
        return snapshot is not None

    # ------------------------------------------------------------------ what it stands on

    def __post_init__(self) -> None:
        check_arguments(vars(self))
        check_fields(self, prefix="", only=PLAIN)
        if self.validation and self.privacy:
            self.validation.refuse_private()
        self.model = plain_model(self.model, self.privacy, self.device, compiled=self.compile)
        choose_trained(self.model, self.fine_tune)
        self._group = joined(self) if self.processes > 1 else None
        self._initial = {name: value.clone() for name, value in self.model.state_dict().items()}

    def share_initial(self, other: "Learner") -> None:
        """Use the other learner's tensors for equal initial values, to save memory."""
        for name, value in other._initial.items():
            own = self._initial.get(name)
            if own is not None and same_bits(own, value):
                self._initial[name] = value  # the session has the same dictionary

    def _new_optimizer(self) -> None:
        self._optimizer = made_optimizer(self.optimizer, self.params)
        self._made_options = options_of(self._optimizer)
        self._scheduler = None

    def _new_schedule(self, index: int) -> None:
        """Begin the schedule of an experience, with the initial options of the optimiser."""
        self._scheduler = None
        steps = self.training.steps(index) if self.scheduler else 0
        if self.scheduler and steps:
            put_options(self._optimizer, self._made_options)
            self._scheduler = made_schedule(self.scheduler, self._optimizer, steps)

    def _rewind(self, snapshot: Snapshot) -> None:
        """Restore the progress from a snapshot, and the schedule as it was at its first step."""
        self.progress = [(index, list(row)) for index, row in snapshot.facts.get(PROGRESS, ())]
        if self._validator:
            self._validator.restore(snapshot.tensors, snapshot.facts, self.device)
        self._rates = self._scheduler = None
        if snapshot.facts["scheduler"]:
            self._new_schedule(snapshot.facts["position"]["experience"])

    def noise_digest(self) -> str:
        """Return the digest that identifies the next steps; "" without privacy.

        It changes with all that decides the steps except records, so other steps get other noise.
        """
        if self.private_sum is None:
            return ""
        optimizer, scheduler = self._optimizer, self._scheduler
        steps = self.training.steps(self.position.experience)
        self._rates = replayed(self._rates, self.optimizer, self.scheduler, steps)
        rates = self._rates.text if self._rates else "[]"
        live = take_snapshot(self.session, optimizer, scheduler, self.matrix, copy=False)
        return noise_digest(self.session, live, optimizer, scheduler, rates)

    def _notify(self, point: str) -> None:
        for callback in self.callbacks:
            callback(point, self)
