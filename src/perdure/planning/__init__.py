"""From declared sizes to steps, sampling rates and noise, for a whole stream in advance.

Nothing here sees a record. A `Learner` plans by itself; import `exposure` to see what one
experience exposes its records to.
"""

from perdure.planning.exposure import Exposure, exposure

__all__ = [
    "Exposure",
    "exposure",
]
