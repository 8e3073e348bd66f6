"""The ledger: every release is written and synced to disk before its noise is drawn.

Import `Ledger` for the append-only account of one curator, `merge` and `read` for accounts of
several curators, and `Statement` for an epsilon with its delta, unit, relation, accountant,
sampling and trust model.
"""

from perdure.privacy.ledger.account import Account, Statement
from perdure.privacy.ledger.entries import Entry
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.ledger.merged import Merged, merge, read
from perdure.privacy.ledger.public_account import PublicAccount
from perdure.privacy.ledger.storage import SealedHead, head_path, load

__all__ = [
    "Account",
    "Entry",
    "Ledger",
    "Merged",
    "PublicAccount",
    "SealedHead",
    "Statement",
    "head_path",
    "load",
    "merge",
    "read",
]
