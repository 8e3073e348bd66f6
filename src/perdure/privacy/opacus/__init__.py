"""Conversion from and to Opacus: settings, privacy history, models and per-sample gradients.

Import `from_opacus` to continue the training of a `PrivacyEngine`, `accountant` to give a history
to Opacus, and `unwrapped` to get the model without its wrapper.
"""

from perdure.privacy.opacus.migration import accountant, from_opacus, sampling_rate, unwrapped

__all__ = [
    "accountant",
    "from_opacus",
    "sampling_rate",
    "unwrapped",
]
