"""Strategies against forgetting, one method per file.

    from perdure.strategies import EWC
    from perdure.strategies import find     # find("ewc") is EWC

To add a strategy, add a file `my_method.py` with one class `MyMethod(Strategy)`. It works at once.
Type checkers and editors find it only if it is also listed below; `make lint` names strategies that
are not listed.
"""

from typing import TYPE_CHECKING, TypeGuard

if __name__ != "perdure.strategies":
    raise ImportError(f"import this package as perdure.strategies, not as {__name__}")

from perdure.contract import Combine, Strategy
from perdure.utils import Extensions, is_proper_subclass

if TYPE_CHECKING:
    from perdure.strategies.agem import AGEM
    from perdure.strategies.attribution_distillation import AttributionDistillation
    from perdure.strategies.bic import BiC
    from perdure.strategies.coda_prompt import CODAPrompt
    from perdure.strategies.coral import Coral
    from perdure.strategies.cwr_star import CWRStar
    from perdure.strategies.der import DER
    from perdure.strategies.er_ace import ERACE
    from perdure.strategies.ewc import EWC
    from perdure.strategies.feature_distillation import FeatureDistillation
    from perdure.strategies.fed_prox import FedProx
    from perdure.strategies.gdumb import GDumb
    from perdure.strategies.gem import GEM
    from perdure.strategies.generative_replay import GenerativeReplay
    from perdure.strategies.icarl import ICaRL
    from perdure.strategies.joint import Joint
    from perdure.strategies.l2 import L2
    from perdure.strategies.l2p import L2P
    from perdure.strategies.lora import LoRA
    from perdure.strategies.lucir import LUCIR
    from perdure.strategies.lwf import LwF
    from perdure.strategies.mas import MAS
    from perdure.strategies.mir import MIR
    from perdure.strategies.naive import Naive
    from perdure.strategies.ncm import NCM
    from perdure.strategies.ogd import OGD
    from perdure.strategies.packnet import PackNet
    from perdure.strategies.ranpac import RanPAC
    from perdure.strategies.replay import Replay
    from perdure.strategies.rwalk import RWalk
    from perdure.strategies.scaffold import Scaffold
    from perdure.strategies.si import SI
    from perdure.strategies.slda import SLDA

__all__ = [
    "AGEM",
    "DER",
    "ERACE",
    "EWC",
    "GEM",
    "L2",
    "L2P",
    "LUCIR",
    "MAS",
    "MIR",
    "NCM",
    "OGD",
    "SI",
    "SLDA",
    "AttributionDistillation",
    "BiC",
    "CODAPrompt",
    "CWRStar",
    "Combine",
    "Coral",
    "FeatureDistillation",
    "FedProx",
    "GDumb",
    "GenerativeReplay",
    "ICaRL",
    "Joint",
    "LoRA",
    "LwF",
    "Naive",
    "PackNet",
    "RWalk",
    "RanPAC",
    "Replay",
    "Scaffold",
    "find",
    "names",
]


def _is_strategy(value: object) -> TypeGuard[type[Strategy]]:
    return is_proper_subclass(value, Strategy)


_EXTENSIONS = Extensions(
    kind="strategy",
    package=__name__,
    group="perdure.strategies",
    fits=_is_strategy,
    wanted="a subclass of perdure.Strategy",
)


def names() -> tuple[str, ...]:
    """Return the sorted names of all strategies: files here, and entry points elsewhere."""
    return _EXTENSIONS.names()


def find(name: str, *, field: str = "strategy") -> type[Strategy]:
    """Return the class of the strategy with a name.

    Args:
        name: one of `names()`, or "my_package.my_module:MyMethod".
        field: name of the setting or argument with this value, for the error message.

    Raises:
        ConfigError: if there is no such strategy, or it cannot be imported.
    """
    return _EXTENSIONS.find(name, field=field)


# Hidden from type checkers: they would take every name for one that exists.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> type[Strategy]:
        return _EXTENSIONS.attribute(name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(find(file).__name__ for file in _EXTENSIONS.files())})
