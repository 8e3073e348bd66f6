"""Continual and federated learning with differential privacy, in one PyTorch library.

This package exports the most important names: `Learner`, `Privacy`, the classes of strategies,
streams and records, and `load`, which loads a trained model of a run. Other names are in packages:
`perdure.data` for streams, `perdure.models`, `perdure.strategies`, `perdure.federated`,
`perdure.privacy` and others. A name is loaded when it is first used, so `perdure --help` does not
load torch.
"""

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "Combine",
    "Context",
    "Curator",
    "Experience",
    "Forward",
    "Learner",
    "MemoryPlan",
    "Params",
    "PerdureError",
    "Plan",
    "Privacy",
    "PrivacyCost",
    "Records",
    "Session",
    "Spec",
    "State",
    "Strategy",
    "Stream",
    "load",
]

if TYPE_CHECKING:
    from perdure import adversarial as adversarial
    from perdure import auditing as auditing
    from perdure import avalanche as avalanche
    from perdure import data as data
    from perdure import experiment as experiment
    from perdure import explain as explain
    from perdure import export as export
    from perdure import federated as federated
    from perdure import loggers as loggers
    from perdure import metrics as metrics
    from perdure import models as models
    from perdure import privacy as privacy
    from perdure import queries as queries
    from perdure import report as report
    from perdure import strategies as strategies
    from perdure import tasks as tasks
    from perdure import testing as testing
    from perdure.contract.combine import Combine
    from perdure.contract.context import Context, Spec
    from perdure.contract.curator import Curator
    from perdure.contract.forward import Forward
    from perdure.contract.plan import MemoryPlan, Plan, PrivacyCost
    from perdure.contract.state import State
    from perdure.contract.strategy import Strategy
    from perdure.data.experience import Experience, Stream
    from perdure.data.records import Batch, Records
    from perdure.errors import PerdureError
    from perdure.experiment.run import load
    from perdure.learner.learner import Learner
    from perdure.learner.session import Session
    from perdure.privacy.settings import Privacy
    from perdure.types import Params
else:
    _HOMES = {
        "Batch": "perdure.data.records",
        "Combine": "perdure.contract.combine",
        "Context": "perdure.contract.context",
        "Curator": "perdure.contract.curator",
        "Experience": "perdure.data.experience",
        "Forward": "perdure.contract.forward",
        "Learner": "perdure.learner.learner",
        "MemoryPlan": "perdure.contract.plan",
        "Params": "perdure.types",
        "PerdureError": "perdure.errors",
        "Plan": "perdure.contract.plan",
        "Privacy": "perdure.privacy.settings",
        "PrivacyCost": "perdure.contract.plan",
        "Records": "perdure.data.records",
        "Session": "perdure.learner.session",
        "Spec": "perdure.contract.context",
        "State": "perdure.contract.state",
        "Strategy": "perdure.contract.strategy",
        "Stream": "perdure.data.experience",
        "load": "perdure.experiment.run",
    }

    def __getattr__(name: str) -> object:
        """Load a public name, or a package of perdure, when it is first used."""
        if name in _HOMES:
            value = getattr(importlib.import_module(_HOMES[name]), name)
            globals()[name] = value
            return value
        if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return importlib.import_module(f"{__name__}.{name}")

    def __dir__() -> list[str]:
        """Names of the module, including names that are not loaded yet."""
        return sorted({*globals(), *__all__})
