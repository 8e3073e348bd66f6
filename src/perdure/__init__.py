"""perdure: continual, federated and private learning in one library.

Start with `Learner` (one model on a stream), a strategy from `perdure.strategies`, and a stream
from `perdure.data.scenarios`. `perdure.federated` runs the same learner in Flower clients;
`Privacy` makes every release private.
"""

from perdure.contract.combine import Combine
from perdure.contract.context import Context, Spec
from perdure.contract.forward import Forward
from perdure.contract.plan import MemoryPlan, Plan, PrivacyCost
from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.data.experience import Experience, Stream
from perdure.data.records import Batch, Records
from perdure.errors import PerdureError
from perdure.learner.learner import Learner
from perdure.privacy.settings import Privacy

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "Combine",
    "Context",
    "Experience",
    "Forward",
    "Learner",
    "MemoryPlan",
    "PerdureError",
    "Plan",
    "Privacy",
    "PrivacyCost",
    "Records",
    "Spec",
    "State",
    "Strategy",
    "Stream",
]
