"""From and to Opacus: its settings, its history, its wrapped models and its per-sample rules.

Import `from_opacus` to go on where a `PrivacyEngine` stopped, `accountant` to hand a history back,
and `unwrapped` for the model inside its wrapper.
"""

from perdure.privacy.opacus.migration import accountant, from_opacus, sampling_rate, unwrapped

__all__ = [
    "accountant",
    "from_opacus",
    "sampling_rate",
    "unwrapped",
]
