"""Data sets as tensors; each file has one data set, in a function with the name of the file.

Import `load`, `names` and `find` to get them by name; the functions themselves are exported by
`perdure.data`. To add a data set, add a file whose function builds a `Dataset` with
`from_published_split` or `from_stratified_split`.
"""

from perdure.data.datasets.base import (
    Dataset,
    bytes_to_unit,
    cache_folder,
    data_root,
    file_bytes,
    from_published_split,
    from_stratified_split,
)
from perdure.data.datasets.registry import find, load, names

__all__ = [
    "Dataset",
    "bytes_to_unit",
    "cache_folder",
    "data_root",
    "file_bytes",
    "find",
    "from_published_split",
    "from_stratified_split",
    "load",
    "names",
]
