"""Cross-validation: a learner trained and measured on every fold of public records."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from perdure.data.experience import Stream
from perdure.experiment.folds import NewLearners, Splitter, folds
from perdure.learner.learner import Learner
from perdure.metrics import average_accuracy


@dataclass(frozen=True, kw_only=True)
class CrossValidated:
    """Scores of a cross-validation.

    Args:
        scores: average accuracy after the last experience in percent, or average of the task's
            metric, of each fold.
    """

    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of the scores."""
        return statistics.fmean(self.scores)

    @property
    def standard_error(self) -> float:
        """Standard deviation of the scores divided by the root of their number; NaN for one.

        Folds share training records, so the true error of the mean is larger (Bengio and
        Grandvalet, 2004).
        """
        if len(self.scores) < 2:
            return math.nan
        return statistics.stdev(self.scores) / math.sqrt(len(self.scores))


def cross_validate(
    make: Callable[[], Learner], stream: Stream, *, splitter: Splitter
) -> CrossValidated:
    """Train a new learner on every fold of a stream, and measure it on the records held out.

    Records are split by id: all copies of a record, in every experience, are on one side. The test
    records of the stream are not used.

    >>> from sklearn.model_selection import KFold
    >>> found = cross_validate(make, stream, splitter=KFold(5, shuffle=True, random_state=0))
    >>> print(found.mean, found.standard_error)

    Guarantee: none; records that are held out are read without noise, so a private learner is
    refused: its k runs would compose, and the scores would be outputs without noise.

    Args:
        make: function that returns a new learner with a new model, in no folder.
        stream: stream of public records.
        splitter: splitter of `sklearn.model_selection`, such as `KFold(5)`, `StratifiedKFold(5)` or
            `ShuffleSplit(3)`.

    Raises:
        ConfigError: if the splitter does not fit, or a learner is not a new one.
        PrivacyError: if the learner is private.
        RunawayError: if the training of a fold diverges.
    """
    new = NewLearners(make, "cross-validation")
    metric = stream.task.metric
    scores = []
    for fold in folds(stream, splitter):
        scores.append(average_accuracy(new().fit(fold), metric=metric))
    return CrossValidated(scores=tuple(scores))
