"""The learner: trains one model on a stream of experiences.

Import `Learner`, or `Session` for your own training loop. `Callback` is the type of a function that
the learner calls at the points named in `POINTS`. `evaluate_with` measures a learner with metrics
of another library, `group_measures` measures groups of records. `select_records` and
`pseudo_labels` help where labels are few.
"""

from perdure.learner.averaging import EMA, SWA
from perdure.learner.group_measures import GroupMeasures, group_measures
from perdure.learner.labelling import pseudo_labels, select_records
from perdure.learner.learner import Callback, Learner
from perdure.learner.outside_metrics import OutsideMetric, evaluate_with
from perdure.learner.points import POINTS
from perdure.learner.schedules import WarmUp
from perdure.learner.session import Session
from perdure.learner.step_changes import SAM
from perdure.learner.validation import Validation

__all__ = [
    "EMA",
    "POINTS",
    "SAM",
    "SWA",
    "Callback",
    "GroupMeasures",
    "Learner",
    "OutsideMetric",
    "Session",
    "Validation",
    "WarmUp",
    "evaluate_with",
    "group_measures",
    "pseudo_labels",
    "select_records",
]
