"""The contract between strategies and the learner: all that a strategy author reads.

Import `Strategy`, the base class with its hooks, what the hooks are given (`Spec`, `Context`,
`Forward`, `State`), and what a strategy declares (`Plan`, `MemoryPlan`, `Asks`). `Combine` joins
strategies.
"""

from perdure.contract.combine import Combine
from perdure.contract.context import MASKED, Context, Spec
from perdure.contract.forward import Forward, cross_entropy, cross_entropy_of
from perdure.contract.plan import (
    Asks,
    MemoryPlan,
    Plan,
    Pooled,
    Selection,
    Update,
    records_in,
    refuse_size,
)
from perdure.contract.state import Rule, State
from perdure.contract.strategy import Strategy

__all__ = [
    "MASKED",
    "Asks",
    "Combine",
    "Context",
    "Forward",
    "MemoryPlan",
    "Plan",
    "Pooled",
    "Rule",
    "Selection",
    "Spec",
    "State",
    "Strategy",
    "Update",
    "cross_entropy",
    "cross_entropy_of",
    "records_in",
    "refuse_size",
]
