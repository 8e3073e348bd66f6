"""Privacy: what may leave a curator, at what noise, and what was spent.

It knows nothing of learning.
"""

from perdure.privacy.adaptive_clipping import Adaptive
from perdure.privacy.settings import Privacy

__all__ = ["Adaptive", "Privacy"]
