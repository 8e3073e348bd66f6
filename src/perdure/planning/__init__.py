"""From declared sizes to steps, sampling rates and noise, for a whole stream in advance.

Nothing here sees a record. Import `TrainingPlan`, which a `Learner` makes by itself and a `Session`
is given.
"""

from perdure.planning.training_plan import TrainingPlan

__all__ = [
    "TrainingPlan",
]
