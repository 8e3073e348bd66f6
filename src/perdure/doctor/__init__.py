"""Doctor of training: rules that detect known challenges, and remedies for them.

`examine` looks for mistakes before training. A finding has its evidence and a remedy; rules are
files of `perdure.doctor.rules`.
"""

from perdure.doctor.case import Case
from perdure.doctor.examination import examine
from perdure.doctor.finding import Finding, Level, Remedy
from perdure.doctor.rules.base import Rule

__all__ = ["Case", "Finding", "Level", "Remedy", "Rule", "examine"]
