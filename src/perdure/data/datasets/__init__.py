"""Data sets as tensors on one device: one data set a file, in a function of the file's name.

Import `load`, `names` and `find` to reach them by name; the functions themselves are in
`perdure.data`. Adding a data set is adding a file that builds a `Dataset` with
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
