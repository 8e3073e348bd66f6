"""Functions that make a `Dataset` from your own data; each file has one kind of source.

Each function converts by documented rules, checks the data before training, and names the row and
column of the first invalid value. `perdure.data` exports them too.
"""

from perdure.data.sources.arrays import from_arrays
from perdure.data.sources.folders import from_folder
from perdure.data.sources.hugging_face import from_huggingface
from perdure.data.sources.tables import from_pandas
from perdure.data.sources.token_sequences import from_tokens
from perdure.data.sources.torch_datasets import from_torch

__all__ = [
    "from_arrays",
    "from_folder",
    "from_huggingface",
    "from_pandas",
    "from_tokens",
    "from_torch",
]
