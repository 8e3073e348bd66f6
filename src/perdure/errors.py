"""Every exception perdure raises.

    PerdureError
    ├── ConfigError         a value the caller gave: names the field, the value and what is allowed
    │   └── DataError       a data set that is missing, damaged or of the wrong shape
    ├── PrivacyError        the privacy rules refuse
    │   ├── BudgetError     the next release would spend more than was granted
    │   ├── GuardError      a model, loss or sampler that breaks the sensitivity bound
    │   └── LedgerError     a ledger that was edited, shortened or does not match its head
    ├── StrategyError       a strategy that breaks its contract
    │   ├── RunawayError    training that ended in NaN or infinity
    │   └── ConformanceError  found so by `perdure.testing.check_strategy`, which names the check
    ├── LoopError           a loop over a session that leaves out, repeats or mixes up its calls
    ├── FederationError     a client or server that cannot go on
    └── RunError            a run on disk that cannot be read or resumed

A message is one line: what was given, what is allowed, and the fix.
"""

from collections.abc import Iterable

__all__ = [
    "BudgetError",
    "ConfigError",
    "ConformanceError",
    "DataError",
    "FederationError",
    "GuardError",
    "LedgerError",
    "LoopError",
    "PerdureError",
    "PrivacyError",
    "RunError",
    "RunawayError",
    "StrategyError",
]


class PerdureError(Exception):
    """Base of everything perdure raises on purpose."""


class ConfigError(PerdureError, ValueError):
    """A value that the caller gave is not allowed."""

    @classmethod
    def of(cls, field: str, value: object, allowed: str | Iterable[object]) -> "ConfigError":
        """Build the standard sentence: field, value given, values allowed.

        Args:
            field: name of the setting, as the user writes it.
            value: the value that was given.
            allowed: the values that are allowed, one by one or in words.
        """
        options = (
            allowed if isinstance(allowed, str) else ", ".join(str(option) for option in allowed)
        )
        return cls(f"{field} = {value!r} is not allowed; allowed: {options}")


class DataError(ConfigError):
    """A data set is missing, damaged or of the wrong shape."""


class PrivacyError(PerdureError):
    """The privacy rules refuse a request."""


class BudgetError(PrivacyError):
    """The next release would spend more than was granted."""


class GuardError(PrivacyError):
    """A model, loss or sampler breaks the bound on one record's influence."""


class LedgerError(PrivacyError):
    """A ledger was edited, shortened, or does not match its head."""


class StrategyError(PerdureError):
    """A strategy breaks its contract."""


class RunawayError(StrategyError):
    """Training ran away: parameters are NaN or infinite."""


class ConformanceError(StrategyError):
    """A strategy failed a check of `perdure.testing.check_strategy`."""


class LoopError(PerdureError):
    """A loop over a session leaves out, repeats or mixes up its calls."""


class FederationError(PerdureError):
    """A client or the server cannot go on."""


class RunError(PerdureError):
    """A run on disk cannot be read or resumed."""
