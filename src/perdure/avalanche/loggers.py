"""Metrics of perdure in the loggers of Avalanche."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.metrics import summarise

if TYPE_CHECKING:
    from perdure.learner.learner import Callback, Learner


def log_to(evaluator: Any) -> "Callback":
    """Build a `Learner` callback that sends accuracies and metrics to the loggers of Avalanche.

    >>> loggers = [InteractiveLogger(), CSVLogger("logs")]  # doctest: +SKIP
    >>> evaluator = EvaluationPlugin(loggers=loggers)  # doctest: +SKIP
    >>> Learner(..., callbacks=[log_to(evaluator)]).fit(stream)  # doctest: +SKIP

    After every experience the loggers get the same values as from an Avalanche strategy that was
    trained on it and evaluated on the test stream:

    - `Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp001` for every experience, under Avalanche's
      name;
    - `ExperienceForgetting/...` for every earlier one, as Avalanche defines it: accuracy when
      learnt minus now;
    - `average_accuracy/eval_phase/test_stream` and the other fields of `perdure.metrics.Summary`,
      at the end of the stream. `forgetting` is measured from the best earlier accuracy, so it may
      exceed Avalanche's.

    All values are fractions, as in Avalanche. The x position is the number of optimiser steps since
    the start. `get_last_metrics()` and `get_all_metrics()` of the evaluator work as usual. There
    are no training metrics, because under privacy they would be releases without noise.

    Args:
        evaluator: an `EvaluationPlugin` with loggers and without metrics.

    Raises:
        ConfigError: if `evaluator` is not an `EvaluationPlugin`, or has metrics; these need the
            training loop of Avalanche.
    """
    publisher = _MetricPublisher(evaluator)

    def listen(point: str, learner: "Learner") -> None:
        position = learner.position
        if point == "experience.begin" and not position.step:
            stage = learner.stream.stage_of(position.experience)
            if position.experience == stage.first:
                publisher.task_incremental = learner.stream.scenario == "task"
                publisher.training(stage.number)
        elif point == "evaluated":
            ended = position.experience - 1
            if ended == learner.stream.stage_of(ended).last:
                steps = learner.training.steps_before(ended + 1)
                rows = torch.tensor(learner.matrix, dtype=torch.float64)
                publisher.evaluation(rows, steps)

    return listen


def log(matrix: Tensor, evaluator: Any) -> dict[str, Any]:
    """Send a finished accuracy matrix to Avalanche's loggers.

    The rows are sent one after another; the last value of each name is returned.

    Names are as in `log_to`, without task labels other than 0; the x position is the row.

    Args:
        matrix: (T, E) accuracy in percent; NaN is left out.
        evaluator: an `EvaluationPlugin` with loggers and without metrics.

    Raises:
        ConfigError: if the matrix has no accuracies, or `evaluator` is not allowed.
    """
    summarise(matrix)
    publisher = _MetricPublisher(evaluator)
    for row in range(len(matrix)):
        publisher.training(row)
        publisher.evaluation(matrix[: row + 1], row)
    last: dict[str, Any] = evaluator.get_last_metrics()
    return last


class _MetricPublisher:
    """Publisher that calls an evaluator as an Avalanche strategy would, with perdure's values."""

    def __init__(self, evaluator: Any) -> None:
        if not hasattr(evaluator, "publish_metric_value"):
            raise ConfigError.of(
                "evaluator", type(evaluator).__name__, "an EvaluationPlugin(loggers=[...])"
            )
        if evaluator.metrics:
            raise ConfigError.of(
                "evaluator", evaluator.metrics, "no metrics, because perdure computes the metrics"
            )
        self._evaluator = evaluator
        self.task_incremental = False

    def training(self, index: int) -> None:
        """Tell the loggers that an experience was trained."""
        moment = self._moment(index, "train")
        for point in (
            "before_training",
            "before_training_exp",
            "after_training_exp",
            "after_training",
        ):
            getattr(self._evaluator, point)(moment)

    def evaluation(self, rows: Tensor, position: int) -> None:
        """Publish the accuracies of the last row, and the forgetting.

        Args:
            rows: (t, E) accuracies in percent after each experience so far.
            position: position on the x axis.
        """
        evaluator = self._evaluator
        last = len(rows) - 1
        evaluator.before_eval(self._moment(0, "test"))
        for index in [e for e in range(rows.shape[1]) if not rows[-1, e].isnan()]:
            moment = self._moment(index, "test")
            now = rows[-1, index]
            evaluator.before_eval_exp(moment)
            self._publish(_name("Top1_Acc_Exp", moment), now, position)
            if index < last and not rows[index, index].isnan():
                self._publish(
                    _name("ExperienceForgetting", moment), rows[index, index] - now, position
                )
            evaluator.after_eval_exp(moment)
        for name, value in vars(summarise(rows)).items():
            if value is not None:
                self._publish(f"{name}/eval_phase/test_stream", value, position)
        evaluator.after_eval(self._moment(last, "test"))

    def _publish(self, name: str, percent: Tensor | float, position: int) -> None:
        """Publish one value as a fraction, at a position of the x axis."""
        from avalanche.evaluation.metric_results import MetricValue

        self._evaluator.publish_metric_value(
            MetricValue(self, name, float(percent) / 100, position)
        )

    def _moment(self, index: int, stream: str) -> Any:
        """Build a substitute for an Avalanche strategy, with the attributes that loggers read."""
        training = stream == "train"
        experience = SimpleNamespace(
            current_experience=index,
            origin_stream=SimpleNamespace(name=stream),
            task_labels=[index if self.task_incremental else 0],
        )
        experience.logging = lambda: experience
        return SimpleNamespace(
            experience=experience, is_training=training, is_eval=not training, dataloader=()
        )


def _name(metric: str, moment: Any) -> str:
    """Avalanche's name of a metric, with stream, task label and experience."""
    from avalanche.evaluation.metric_utils import get_metric_name

    return str(get_metric_name(metric, moment, add_experience=True))
