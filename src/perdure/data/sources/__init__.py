"""Functions that make a `Dataset` of a user's own data: one kind of source a file.

Each converts by rules that are stated, checks what it is given before anything is trained, and
names the row and the column of the first bad value. `perdure.data` exports them too.
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
