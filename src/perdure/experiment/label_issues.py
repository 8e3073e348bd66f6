"""Noisy labels of public records, found by cleanlab from cross-validated probabilities."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perdure.data.experience import Experience, Stream
from perdure.data.records import Records
from perdure.errors import ConfigError
from perdure.experiment.folds import NewLearners, Splitter, folds
from perdure.learner.learner import Learner
from perdure.tasks import SingleLabel
from perdure.utils.extras import imported

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FOLDS = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelIssues:
    """Records whose labels are probably wrong.

    Args:
        ids: (k,) ids of these records, the most suspicious first.
        scores: (k,) probability of their given label, as models say that were not trained on them.
        suggested: (k,) most probable labels.
    """

    ids: Tensor
    scores: Tensor
    suggested: Tensor

    def without(self, records: Records) -> Records:
        """Return the records except those with issues; a private learner refuses the result."""
        keep = ~torch.isin(records.ids.cpu(), self.ids)
        kept = records.take(keep.nonzero().flatten().to(records.inputs.device))
        return replace(kept, coupled_by="find_label_issues(...).without(records)")


def find_label_issues(
    make: Callable[[], Learner],
    records: Records,
    *,
    splitter: Splitter | None = None,
    num_classes: int | None = None,
    seed: int = 0,
) -> LabelIssues:
    """Find public records whose labels are probably wrong, by confident learning.

    The probabilities of a record come from a learner that was not trained on it. Needs the extra
    `cleaning` (cleanlab).

    Guarantee: none; labels are read without noise, so a private learner is refused. The rest of the
    records depends on all of them, so a private learner refuses `LabelIssues.without`, too.

    Args:
        make: function that returns a new learner with a new model of `num_classes` outputs.
        records: public records with one class each, and ids of their own.
        splitter: splitter of `sklearn.model_selection`; None for five folds with equal classes.
        num_classes: number of classes; None for the largest label and one more.
        seed: seed of the folds, where no splitter is given.

    Raises:
        ConfigError: if records have several labels each, or a learner is not a new one.
        PrivacyError: if the learner is private.

    Source: Northcutt, Jiang and Chuang, Confident Learning: Estimating Uncertainty in Dataset
    Labels, JAIR 2021.
    """
    if not isinstance(records.task, SingleLabel):
        refused = f"records of the task {records.task.name}"
        raise ConfigError.of("records", refused, "records with one class each")
    if splitter is None:
        from sklearn.model_selection import StratifiedKFold

        splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    width = int(records.labels.max()) + 1 if num_classes is None else num_classes
    stream = Stream(
        name="records with labels to check",
        scenario="class",
        experiences=(Experience(index=0, train=records, classes=tuple(range(width))),),
        num_classes=width,
        input_shape=tuple(records.inputs.shape[1:]),
    )
    new = NewLearners(make, "a search for label issues")
    labels: list[Tensor] = []
    probabilities: list[Tensor] = []
    ids: list[Tensor] = []
    for fold in folds(stream, splitter):
        learner = new()
        learner.fit(fold)
        held = fold[0].test
        probabilities.append(learner.predict(held.inputs).softmax(1).cpu())
        labels.append(held.labels.cpu())
        ids.append(held.ids.cpu())
    answers = torch.cat(probabilities)
    given = torch.cat(labels)
    rows = _suspicious(given.numpy(), answers.double().numpy())
    scores = answers[rows, given[rows]]
    return LabelIssues(ids=torch.cat(ids)[rows], scores=scores, suggested=answers[rows].argmax(1))


def _suspicious(labels: "NDArray[np.int64]", probabilities: "NDArray[np.float64]") -> Tensor:
    """Return the positions of the labels with issues, in ascending order of their probability.

    Args:
        labels: (n,) given labels.
        probabilities: (n, C) probabilities of a model that was not trained on the row.
    """
    cleanlab = imported("cleanlab.filter", "cleaning", "find_label_issues")
    found = cleanlab.find_label_issues(
        labels, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1
    )
    return torch.from_numpy(found).long()
