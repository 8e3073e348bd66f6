"""Exceptions of perdure.

PerdureError
    ├── ConfigError         a value the caller gave: names the field, the value and what is allowed
    │   ├── DataError       a data set that is missing, damaged or of the wrong shape
    │   └── NonFiniteError  outputs of a model that are NaN or infinite
    ├── PrivacyError        the privacy rules refuse
    │   ├── BudgetError     the next release would spend more than was granted
    │   ├── GuardError      a model, loss or sampler that breaks the sensitivity bound
    │   └── LedgerError     a ledger that was edited, shortened or does not match its head
    ├── StrategyError       a strategy that breaks its contract
    │   ├── RunawayError    training that ended in NaN or infinity
    │   └── ConformanceError  a strategy that failed a check of `perdure.testing.check_strategy`
    ├── LoopError           a loop over a session that leaves out, repeats or mixes up its calls
    ├── FederationError     a client or server that cannot continue
    ├── ExportError         a model that a format cannot store, or files with other outputs
    └── RunError            a run on disk that cannot be read or resumed
        └── StorageError    a file that cannot be written: a full disk, a folder of somebody else

A message is one line: what was given, what is allowed, and the fix.
"""

import errno
from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "BudgetError",
    "ConfigError",
    "ConformanceError",
    "DataError",
    "ExportError",
    "FederationError",
    "GuardError",
    "LedgerError",
    "LoopError",
    "NonFiniteError",
    "PerdureError",
    "PrivacyError",
    "RunError",
    "RunawayError",
    "StorageError",
    "StrategyError",
]


class PerdureError(Exception):
    """Base class of all errors that perdure raises."""


class ConfigError(PerdureError, ValueError):
    """A value that the caller gave is not allowed."""

    @classmethod
    def of(cls, field: str, value: object, allowed: str | Iterable[object]) -> "ConfigError":
        """Build the standard message: field, given value, allowed values.

        Args:
            field: name of the setting, as the user writes it.
            value: value that the user gave.
            allowed: allowed values, as a list or in words.
        """
        options = (
            allowed if isinstance(allowed, str) else ", ".join(str(option) for option in allowed)
        )
        return cls(f"{field} = {value!r} is not allowed; allowed: {options}")


class DataError(ConfigError):
    """A data set is missing, damaged or of the wrong shape."""


class NonFiniteError(ConfigError):
    """Outputs of a model are NaN or infinite."""


class PrivacyError(PerdureError):
    """The privacy rules do not allow a request."""


class BudgetError(PrivacyError):
    """The next release would exceed the granted privacy budget."""


class GuardError(PrivacyError):
    """A model, loss or sampler breaks the bound on one record's influence."""


class LedgerError(PrivacyError):
    """A ledger was edited, shortened, or does not match its head."""


class StrategyError(PerdureError):
    """A strategy breaks its contract."""


class RunawayError(StrategyError):
    """Training diverged: parameters are NaN or infinite."""


class ConformanceError(StrategyError):
    """A strategy failed a check of `perdure.testing.check_strategy`."""


class LoopError(PerdureError):
    """A loop over a session leaves out, repeats or mixes up its calls."""


class FederationError(PerdureError):
    """A client or the server of a federation cannot continue."""


class ExportError(PerdureError):
    """A file format cannot store a model, or exported files give other outputs than the model."""


class RunError(PerdureError):
    """A run on disk cannot be read or resumed."""


class StorageError(RunError, OSError):
    """A file cannot be written; files that existed before are unchanged.

    Attributes:
        reason: reason given by the operating system, such as "No space left on device".
    """

    reason: str = ""

    @classmethod
    def of(cls, path: Path, error: OSError) -> "StorageError":
        """Build the standard message: file, reason, what is still stored, and the fix.

        Args:
            path: path of the file that could not be written.
            error: error of the operating system.
        """
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "free some space"
        elif error.errno == errno.EFBIG:
            fix = "raise the limit on the size of files (ulimit -f)"
        else:
            fix = "make its folder writable, or give another one"
        made = cls(
            f"{path} cannot be written: {reason}; nothing that was stored is lost; {fix} and start "
            "again, and a run continues from its last checkpoint"
        )
        made.reason = reason
        return made
