"""A session: a party for the user's own training loop, with a fixed order of calls.

The loop of `Learner` uses a session, too.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.optim import Optimizer

from perdure.data.experience import Experience, Stream
from perdure.data.records import Batch
from perdure.data.value_checks import check_finite
from perdure.errors import ConfigError, LoopError
from perdure.learner.arguments import PLAIN, check_arguments, check_stream, plain_model
from perdure.learner.checkpoint import Store
from perdure.learner.evaluation import measurements
from perdure.learner.fingerprint import Fingerprint, fingerprint_of
from perdure.learner.loop_checks import HiddenBatch, StepOrder
from perdure.learner.noise_digest import noise_digest
from perdure.learner.optimizers import refuse_unusable
from perdure.learner.party import Party
from perdure.learner.run_folder import checkpoint_of, restore_checkpoint, write_checkpoint
from perdure.learner.snapshots import take_snapshot
from perdure.learner.trained_parameters import choose_trained, keep_frozen_statistics
from perdure.privacy.guard.model_checks import check_optimizer
from perdure.utils.checked_fields import check_fields
from perdure.utils.denormals import flushed
from perdure.utils.modules import begin_training


@dataclass(kw_only=True, eq=False)
class Session(Party):
    """Model, strategy and stream for your own training loop.

    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> session = Session(model=model, strategy=strategy, stream=stream, optimizer=optimizer,
    ...                   epochs=1)
    >>> for experience in stream:
    ...     with session.experience(experience) as batches:
    ...         for batch in batches:            # all epochs
    ...             session.backward(batch)      # fills .grad
    ...             optimizer.step()
    ...             session.after_step()
    ...     print(session.evaluate())

    A `Learner` with the same settings gives bit-identical parameters.

    Guarantee: under privacy a record influences the model only through releases, each charged
    before its noise is drawn. The batches of the loop do not show their records.

    Args:
        model: any module with a full-width head.
        strategy: strategy against forgetting.
        stream: experiences in the order of training.
        optimizer: optimiser of `model.parameters()` that needs one gradient per step. Another
            optimiser may be set between two experiences. None only for a program that calls the
            parts of the session itself, as `Learner` does.
        epochs: number of passes over the records of an experience; give this or `iterations`.
        iterations: number of steps in an experience.
        blocks: number of blocks in an experience; each block is one charge in the ledger.
        batch_size: number of new records per step.
        privacy: None, or record-level differential privacy.
        seed: seed of all random numbers except private noise.
        client: number of the party; 0 if there is only one.
        owner: name of the party in the ledger.
        folder: folder for checkpoints, ledger and keys, which the session locks; None for no files.
            A session with the folder of an earlier run continues after its last completed
            experience.
        device: device of records and model.
        micro_batch_size: number of rows in one pass through the model; None for a whole batch.
        precision: precision of the passes through the model in training.
        adversary: attack applied to every batch before its gradient.
        views: random versions of every record, averaged inside its loss.
        mixing: mixed pairs of rows, Mixup() or CutMix(); not under privacy.
        defence: losses of rows and their perturbed versions, such as TRADES().
        loss: loss of every record (see `perdure.tasks.losses`); None for the loss of the task.
        max_grad_norm: largest L2 norm of the whole gradient, after penalty and projection; None for
            no bound.
        group: group of processes that divide every batch; `Learner` joins it. None for one.
        initial: initial values of the model, for strategies that train from the start again; None
            for the present values.
        notify: function that is called with the name of every point of the loop.
        warm_start: continue from a model that was trained before, and charge its earlier cost, too.
        trained_by: reason why the ledger of this session does not count the training, such as a
            federation whose clients count it; "" if it does.
        make_private_sum: function that makes the private sum; for audits.
        averaging: average of the parameters over the steps of an experience, EMA() or SWA(); the
            model answers by it, and becomes it at the end of an experience, before the strategy
            consolidates.
        sharpness: SAM() for gradients at the worst parameters nearby; None for plain ones.
        l1: factor of the sum of absolute values of the trained parameters, added to the loss by its
            subgradient.
        l2: factor of half the sum of their squares, added to the loss by its gradient.
        gradient_noise: variance of normal noise on the gradient in the first step of an experience;
            in step t it is divided by (1 + t)^0.55.
        weight_noise: standard deviation of normal noise on the trained parameters while the
            gradient of a step is computed.
        group_weights: factors of the losses of groups of records, from declared counts.
        fine_tune: parameters to train: "all", "head", or beginnings of names; None to leave the
            model as it is.

    Raises:
        ConfigError: if an argument is not allowed, if the outputs of the model do not fit the task,
            if the model was trained before without `warm_start`, or if the strategy does not
            support the task of the records.
        GuardError: under privacy, if a model, strategy or optimiser breaks the sensitivity bound.
        BudgetError: if the training plan does not fit the budget.
        LedgerError: if the ledger of the folder is missing, or does not contain its recorded heads.
        PrivacyError: if the run of the folder has privacy and this one has none, or the reverse.
        RunError: if the folder is in use, or has another run.
    """

    optimizer: Optimizer | None = None

    def __post_init__(self) -> None:
        check_stream(self.stream)
        # check the given optimiser itself, because no function makes one
        check_arguments({**vars(self), "optimizer": refuse_unusable})
        check_fields(self, prefix="", only=PLAIN)
        self.model = plain_model(self.model, self.privacy, self.device)
        choose_trained(self.model, self.fine_tune)
        self._order = StepOrder()
        self._open = False
        self._training_mode = True
        self._known: Optimizer | None = None
        self._start: dict[str, Any] = {}
        self._finite = self.privacy is None
        self.fingerprint: Fingerprint = {}
        if self.optimizer is not None:
            self._loop_optimizer()
        super().__post_init__()
        if self.folder and self.optimizer is not None:
            self._resume(self.folder, self.optimizer)

    # ------------------------------------------------------------------ a loop of your own

    @property
    def remaining(self) -> tuple[Experience, ...]:
        """Experiences that are not yet completed, in order."""
        return self.stream.experiences[self.position.experience :]

    def experience(self, experience: Experience | int) -> "Batches":
        """Open an experience in a `with`; at the end, consolidate it and save a checkpoint.

        If the strategy trains from the start again (`Plan.restart`), the model gets its initial
        parameters again, and the optimiser its initial state and settings.

        An experience that ends before its last step, by an exception or a `break`, is not
        consolidated. Open it again to continue with its next step; under privacy the remaining
        steps are charged again. A step that stopped between `backward` and the optimiser's step is
        drawn again, so a memory that is updated in every step gets its rows twice.

        Args:
            experience: experience of the session's stream, or its index; each once, in order.

        Returns:
            The batches of the experience, for use in the `with`.

        Raises:
            ConfigError: if the argument is no experience of the stream, or the optimiser lacks a
                trained parameter.
            DataError: before the first private experience, if training inputs are NaN or infinite.
            LoopError: if the experience is out of order, inside another one, or left by a `break`.
            RunawayError: if training diverged, so that parameters are NaN or infinite.
        """
        return Batches(self, self._opened_experience(experience))

    @contextmanager
    def _opened_experience(self, experience: Experience | int) -> Iterator[list[range]]:
        """Open an experience, and yield its remaining blocks of steps."""
        optimizer = self._loop_optimizer()
        index = self._in_turn(experience)
        self.hold()
        if self.open(index) and self.training.of(self.stream[index]).restart:
            self._restart(optimizer)
        self.notify("experience.begin")
        with flushed(), self._order.watching(optimizer, self.trained):
            self._open = True
            try:
                yield [
                    range(max(block.start, self.position.step), block.stop)
                    for block in self.training.remaining_blocks(index, self.position.step)
                ]
            except BaseException as error:
                self._leave()
                error.add_note(self._left())
                raise
            self._leave()
        if self.position.step < self.training.steps(index):
            raise LoopError(self._left())
        self.consolidate()
        self.notify("experience.end")
        # under privacy a resume never goes back to an earlier experience
        if self.privacy or self.stream.stage_of(index).last == index:
            self.save()

    def backward(self, batch: "Batch | HiddenBatch") -> None:
        """Fill `.grad` of the trained parameters: mean gradient and penalty, after the projection.

        Under privacy every record's gradient is clipped, and noise is added. The gradients replace
        those of the last step, so `zero_grad()` is not needed.

        Args:
            batch: batch of the loop, unchanged.

        Raises:
            LoopError: if `batch` is not the loop's batch of this step, `backward` was already
                called in this step, no step is open, the model is in evaluation mode, or gradients
                are switched off.
        """
        rows = self._order.rows_of(batch)
        if not torch.is_grad_enabled():
            raise LoopError(
                "gradients are switched off, by torch.no_grad() or inference_mode() around the "
                "loop; train outside that block"
            )
        if self._training_mode and not self.model.training:
            raise LoopError(
                "the model is in evaluation mode inside the loop; call model.train() after "
                "model.eval(), or use session.evaluate() to evaluate"
            )
        self.fill_gradients(rows)
        self._order.filled(self.trained)

    def after_step(self) -> None:
        """Update the strategy after the optimiser's step, and end the step of the loop.

        Raises:
            LoopError: if `backward` or the optimiser's step is missing, or no step is open.
        """
        self._order.end()
        self.follow_step()

    def evaluate(self, stream: Stream | None = None, batch_size: int | None = None) -> list[float]:
        """Evaluate the accuracy in percent on the test records of every stage.

        Args:
            stream: stream whose test records are used; None for the session's stream.
            batch_size: number of rows of one pass; None to choose it by the size of a record.
        """
        return measurements(self, self.stream if stream is None else stream, batch_size)

    def save(self) -> None:
        """Write a checkpoint, if there is a folder; this also happens at the end of every stage."""
        if self.folder and self.optimizer is not None:
            self.hold()
            snapshot = take_snapshot(self, self.optimizer, None, [])
            self.notify("checkpoint.begin")
            write_checkpoint(self, checkpoint_of(snapshot, self, self.fingerprint))
            self.notify("checkpoint.end")

    # ------------------------------------------------------------------ the loop itself

    def steps(
        self, block: range, digest: Callable[[], str], *, resumed: bool = False
    ) -> Iterator[Batch | HiddenBatch]:
        """Charge a block of steps of the open experience, and yield the batch of each step.

        Args:
            block: numbers of the steps.
            digest: function that computes the noise digest of the block (see `reserve`).
            resumed: True if the block is the rest of a block that was begun before.

        Raises:
            LoopError: if the previous step was not ended.
        """
        self.notify("block.begin")
        self._order.allow_accumulation()
        if not resumed:
            self.begin_round()
        self.reserve(block, digest())
        self._order.refuse_accumulation(self.trained)
        begin_training(self.model)
        if self.fine_tune is not None:
            keep_frozen_statistics(self.model)
        self._training_mode = self.model.training
        for step in block:
            rows = self.sample(step)
            self.notify("step.sampled")
            yield self._order.hand_out(rows, step, hidden=self.privacy is not None)
            self._order.require_ended()
            self.notify("step.done")
        self.notify("block.end")

    def noise_digest(self) -> str:
        """Return the digest that identifies the next steps; "" without privacy.

        It changes with all that decides the steps except records, so other steps get other noise.
        """
        if self.private_sum is None:
            return ""
        optimizer = self._loop_optimizer()
        live = take_snapshot(self, optimizer, None, [], copy=False)
        return noise_digest(self, live, optimizer, None, "[]")

    def _loop_optimizer(self) -> Optimizer:
        if not isinstance(self.optimizer, Optimizer):
            raise ConfigError.of(
                "optimizer",
                self.optimizer,
                "an optimiser of the session's model; give it to Session(optimizer=...)",
            )
        if self.optimizer is not self._known:
            refuse_unusable(self.optimizer)
            self._known = self.optimizer
            if self.privacy:
                check_optimizer(self.optimizer)
            self._start = deepcopy(self.optimizer.state_dict())
        return self.optimizer

    def _in_turn(self, experience: object) -> int:
        """Return the index of the experience to open, which must be the next one."""
        index = experience.index if isinstance(experience, Experience) else experience
        if type(index) is not int or not 0 <= index < len(self.stream):
            raise ConfigError.of(
                "experience",
                index if isinstance(index, int) else type(index).__name__,
                "an experience of the session's stream, or its index; perdure.data.split(dataset, "
                "experiences=5) makes a stream of a data set",
            )
        own = (self.stream[index], self.training.stream[index])
        if isinstance(experience, Experience) and not any(experience is each for each in own):
            raise ConfigError.of(
                "experience", f"experience {index} of another stream", "one of session.stream"
            )
        expected = self.position.experience
        if self._open or index != expected:
            following = f"experience {expected}" if expected < len(self.stream) else "none"
            raise LoopError(
                f"experience {index} was opened "
                + (f"inside experience {expected}" if self._open else f"but {following} is next")
                + "; open each once, in order, as `for experience in session.remaining`"
            )
        if not self._finite:
            check_finite([self.training.stream])
            self._finite = True
        return index

    def _leave(self) -> None:
        """Close the experience; a step that the optimiser has already taken is completed."""
        if self._order.stage == "taken":
            self.follow_step()
        self._order.reset()
        self._open = False

    def _left(self) -> str:
        index = self.position.experience
        return (
            f"experience {index} was left at step {self.position.step} of "
            f"{self.training.steps(index)} and not consolidated; open session.experience({index}) "
            "again to go on, or give fewer epochs"
        )

    def _restart(self, optimizer: Optimizer) -> None:
        """Restore the initial state and settings of the optimiser."""
        start = deepcopy(self._start)
        # a schedule stores settings of its own among those of the optimiser
        start["param_groups"] = [
            {**own, **first}
            for own, first in zip(
                optimizer.state_dict()["param_groups"], start["param_groups"], strict=True
            )
        ]
        optimizer.load_state_dict(start)

    def _resume(self, folder: Path, optimizer: Optimizer) -> None:
        """Continue from the last checkpoint in the folder, if there is one."""
        try:
            self.fingerprint = fingerprint_of(
                self, optimizer=lambda _: optimizer, scheduler=None, extra={"loop": "own"}
            )
            checkpoint = Store(folder).load()
            if checkpoint is not None:
                restore_checkpoint(
                    checkpoint,
                    self,
                    optimizer,
                    None,
                    fingerprint=self.fingerprint,
                    where=folder,
                )
        except BaseException:
            self.close()
            raise


class Batches:
    """All batches of an experience, over all epochs, in order; its length is the remaining steps.

    Args:
        session: session that charges and draws the batches.
        opened: context manager that opens the experience and returns its remaining steps.
    """

    def __init__(self, session: Session, opened: AbstractContextManager[list[range]]) -> None:
        self._session = session
        self._opened = opened
        self._blocks: list[range] | None = None
        self._looped = False

    def __enter__(self) -> "Batches":
        self._blocks = self._opened.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        self._blocks = None
        return self._opened.__exit__(kind, error, trace)

    def __len__(self) -> int:
        return sum(map(len, self._open_blocks()))

    def __iter__(self) -> Iterator[Batch | HiddenBatch]:
        blocks = self._open_blocks()
        if self._looped:
            raise LoopError(
                "batches was looped over twice; it gives every step of the experience once, all "
                "epochs of it: write one loop, and give epochs=... to Session"
            )
        self._looped = True
        session = self._session
        whole = session.training.remaining_blocks(session.position.experience, 0)
        for block in blocks:
            yield from session.steps(block, session.noise_digest, resumed=block not in whole)

    def _open_blocks(self) -> list[range]:
        if self._blocks is None:
            raise LoopError(
                "session.experience(...) was used outside a `with`; write `with "
                "session.experience(experience) as batches:` and loop over batches inside it"
            )
        return self._blocks
