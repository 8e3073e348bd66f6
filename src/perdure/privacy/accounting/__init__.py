"""Privacy accounting: from charges to epsilon, and from epsilon to noise.

Import `Charge`, some steps of one mechanism as seen by one record; `epsilon` of a history of
charges; and `calibrate`, the least noise that stays within a target.
"""

from perdure.privacy.accounting.accountants import pld_epsilon, rdp_epsilon
from perdure.privacy.accounting.calibration import calibrate, epsilon
from perdure.privacy.accounting.charges import Charge

__all__ = [
    "Charge",
    "calibrate",
    "epsilon",
    "pld_epsilon",
    "rdp_epsilon",
]
