"""Privacy accounting: from charges to epsilon, and from epsilon to noise.

Import `Charge` for the cost of some steps of one mechanism for one record, `epsilon` to compose
charges, and `calibrate` to find the smallest noise multiplier that keeps a target epsilon.
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
