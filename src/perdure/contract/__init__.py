"""The contract between strategies and the learner; an author of strategies needs only this package.

Import `Strategy`, the base class with its hooks, and the types of their arguments: `Spec`,
`Context`, `Forward`, `State`, and the `Curator` of private records. `Plan`, `MemoryPlan` and
`PrivacyCost` are the declarations of a strategy. `Combine` joins strategies; `QuadraticPenalty` is
the base class of strategies that pull parameters towards an anchor.
"""

from perdure.contract.combine import Combine
from perdure.contract.context import Context, Spec
from perdure.contract.curator import Curator, Losses, Of, Query, Utility
from perdure.contract.exposure import Exposure
from perdure.contract.forward import Forward, cross_entropy_of, task_losses
from perdure.contract.plan import (
    MemoryPlan,
    Plan,
    Pooled,
    PrivacyCost,
    Selection,
    Update,
    records_in,
    refuse_single_class,
    refuse_size,
)
from perdure.contract.quadratic_penalty import QuadraticPenalty
from perdure.contract.state import Rule, State
from perdure.contract.strategy import Strategy

__all__ = [
    "Combine",
    "Context",
    "Curator",
    "Exposure",
    "Forward",
    "Losses",
    "MemoryPlan",
    "Of",
    "Plan",
    "Pooled",
    "PrivacyCost",
    "QuadraticPenalty",
    "Query",
    "Rule",
    "Selection",
    "Spec",
    "State",
    "Strategy",
    "Update",
    "Utility",
    "cross_entropy_of",
    "records_in",
    "refuse_single_class",
    "refuse_size",
    "task_losses",
]
