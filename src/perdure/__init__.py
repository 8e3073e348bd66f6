"""perdure: continual, federated and private learning in one library.

Start with `Learner` (one model on a stream), a strategy from `perdure.strategies`, and a stream from
`perdure.streams`. `perdure.federated` runs the same learner in Flower clients; `Privacy` makes every release private.
"""

from perdure.combine import Combine
from perdure.errors import PerdureError
from perdure.learner import Learner
from perdure.memory import MemoryPlan
from perdure.privacy.policy import Privacy
from perdure.records import Batch, Records
from perdure.strategy import Asks, Context, Forward, Plan, Spec, State, Strategy
from perdure.streams import Experience, Stream

__version__ = "0.1.0"
__all__ = [
    "Asks", "Batch", "Combine", "Context", "Experience", "Forward", "Learner", "MemoryPlan", "PerdureError", "Plan",
    "Privacy", "Records", "Spec", "State", "Strategy", "Stream",
]  # fmt: skip
