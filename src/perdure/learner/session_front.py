"""A learner's session with its parts and its end, and predictions and measurements of its model."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.optim import Optimizer

from perdure.contract.state import State
from perdure.curator.local_curator import LocalCurator
from perdure.data.experience import Stream
from perdure.data.records import Records
from perdure.errors import ConfigError
from perdure.learner.checkpoint import Position
from perdure.learner.evaluation import (
    is_measured,
    measurements,
    outputs_for,
    predictor,
    score_of,
)
from perdure.learner.session import Session
from perdure.learner.validation import Validator
from perdure.planning.training_plan import TrainingPlan
from perdure.privacy.private_sum import PrivateSum
from perdure.types import Params
from perdure.utils.modules import trainable_parameters


class SessionFront:
    """Base of `Learner`: the session, its parts and its end, and evaluation of its model."""

    model: nn.Module
    _session: Session | None
    _validator: Validator | None
    _optimizer: Optimizer
    evaluate_every: int | None

    # ------------------------------------------------------------------ evaluation

    def predict(self, inputs: Tensor, *, experience: int | None = None) -> Tensor:
        """Return the strategy's outputs (n, ..., C) for inputs, in evaluation mode.

        `evaluate` measures these outputs; `stream.task.predictions` turns them into classes.

        Args:
            inputs: (n, ...) inputs of the model.
            experience: index of their experience in a task-incremental stream; None in others.
        """
        return outputs_for(self.session, inputs, experience)

    def score(self, records: Records, *, experience: int | None = None) -> float:
        """Measure the model on records by the metric of the task, such as accuracy in percent.

        Guarantee: none for `records`, which must be public; private training records are refused.

        Args:
            records: public records to measure the model on.
            experience: index of their experience in a task-incremental stream; None in others.
        """
        return score_of(self.session, records, experience)

    def predictor(self, index: int, *, after: int) -> Callable[[Tensor], Tensor]:
        """Return a function from inputs (n, ...) to logits (n, C).

        Args:
            index: index of the experience that the inputs belong to.
            after: index of the experience that was trained last.
        """
        return predictor(self.session, index, after=after)

    def evaluate(self, stream: Stream, batch_size: int | None = None) -> list[float]:
        """Evaluate the model on the test records of every stage, by the metric of the task.

        Returns:
            One number per stage: accuracy in percent for single-label records; NaN if a stage has
            no test records.
        """
        return measurements(self.session, stream, batch_size)

    def is_measured(self, index: int) -> bool:
        """Return True if the model is evaluated after experience `index`."""
        return is_measured(self.stream, index, self.evaluate_every)

    @property
    def validated(self) -> list[tuple[int, int, float]]:
        """Measurements on validation records: experience, number of steps done, and metric."""
        return list(self._validator.history) if self._validator else []

    # ------------------------------------------------------------------ parts of the session

    @property
    def params(self) -> Params:
        """Parameters that require gradients, by name."""
        return dict(trainable_parameters(self.model))

    @property
    def session(self) -> Session:
        """Session with model, records and state.

        Raises:
            ConfigError: if `prepare` was not called.
        """
        if self._session is None:
            raise ConfigError("the learner has no stream yet; call fit(stream) or prepare(stream)")
        return self._session

    @property
    def training(self) -> TrainingPlan:
        """Plan of training: number of steps and exposure of every experience."""
        return self.session.training

    @property
    def stream(self) -> Stream:
        """The stream, on the learner's device."""
        return self.session.stream

    @property
    def curator(self) -> LocalCurator:
        """Curator that holds the records and answers the queries of the strategy."""
        return self.session.curator

    @property
    def private_sum(self) -> PrivateSum | None:
        """Private sum, with ledger and noise; None without privacy."""
        return self.session.private_sum

    @property
    def state(self) -> State:
        """Tensors that the strategy keeps between steps and experiences."""
        return self.session.state

    @property
    def position(self) -> Position:
        """Position of the run; the start of the stream before `prepare`."""
        return self._session.position if self._session else Position()

    @property
    def current_optimizer(self) -> Optimizer:
        """Optimiser that takes the steps; it is replaced when training starts again.

        Raises:
            ConfigError: if `prepare` was not called.
        """
        _ = self.session  # refuse if there is no session yet
        return self._optimizer

    # ------------------------------------------------------------------ the end of a session

    def close(self) -> None:
        """Release the lock of the folder; a later use of the learner takes it again."""
        if self._session is not None:
            self._session.close()

    def release(self) -> None:
        """Free the memory of the session at once; `prepare` begins another one."""
        if self._session is not None:
            self._session.release()
        self._session = None
