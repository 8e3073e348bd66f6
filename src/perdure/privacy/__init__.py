"""Differential privacy: releases of a curator, their noise, and the spent epsilon.

Import `Privacy` for the settings of a learner, and `Adaptive` for clip norms that follow the
gradients. `ReleasedScaling` buys constants to scale inputs with. `Ledger`, `Entry` and `Statement`
record and state the privacy cost. Private sums are exact on a `Grid`. `check_model` refuses a model
that cannot be trained privately; `fixes` and `fix` repair it. `from_opacus` continues a training of
Opacus.
"""

from perdure.privacy.adaptive_clipping import Adaptive
from perdure.privacy.grid import SENSITIVITY, Grid
from perdure.privacy.guard.model_checks import check_model, fix, fixes
from perdure.privacy.ledger.account import Account, Statement
from perdure.privacy.ledger.entries import Entry
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.opacus.migration import from_opacus
from perdure.privacy.private_sum import PrivateSum
from perdure.privacy.released_scaling import ReleasedScaling
from perdure.privacy.settings import Privacy

__all__ = [
    "SENSITIVITY",
    "Account",
    "Adaptive",
    "Entry",
    "Grid",
    "Ledger",
    "Privacy",
    "PrivateSum",
    "ReleasedScaling",
    "Statement",
    "check_model",
    "fix",
    "fixes",
    "from_opacus",
]
