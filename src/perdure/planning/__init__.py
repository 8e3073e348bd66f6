"""Plans of training: steps, sampling rates and noise for a whole stream, from declared sizes.

No code of this package reads a record. Import `TrainingPlan`. A `Learner` makes its own plan; a
`Session` gets a plan as argument.
"""

from perdure.planning.training_plan import TrainingPlan

__all__ = [
    "TrainingPlan",
]
