"""Doctor of training: rules that detect known challenges, and remedies for them.

`examine` looks for mistakes before training; `Monitor` is a callback that watches a training. A
finding has its evidence and a remedy; rules are files of `perdure.doctor.rules`.
"""

from perdure.doctor.case import Case
from perdure.doctor.curvature import Curvature, hessian_extremes
from perdure.doctor.examination import examine
from perdure.doctor.finding import Finding, Level, Remedy, in_order
from perdure.doctor.monitor import Monitor
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace

__all__ = [
    "Case",
    "Curvature",
    "Finding",
    "Level",
    "Monitor",
    "Remedy",
    "Rule",
    "Trace",
    "examine",
    "hessian_extremes",
    "in_order",
]
