"""Records, experiences and streams: the data of a learner.

Import a data set (`digits`, `mnist`, ..., or `load` for one by name), a scenario that makes a
stream of it (`split`, `permuted`, `rotated`, `online`, `blurry`), a split over clients
(`dirichlet`, `iid`), and augmentation inside a record (`Views`). Data sets of your own are
described in `perdure.data.datasets`.
"""

from perdure.data.augmentation import Change, Views, shift_and_flip
from perdure.data.client_splits import dirichlet, iid
from perdure.data.datasets.adult import adult
from perdure.data.datasets.base import Dataset
from perdure.data.datasets.breast_cancer import breast_cancer
from perdure.data.datasets.cifar10 import cifar10
from perdure.data.datasets.digits import digits
from perdure.data.datasets.mnist import mnist
from perdure.data.datasets.registry import load
from perdure.data.datasets.shakespeare import shakespeare
from perdure.data.domain import InputDomain
from perdure.data.experience import Experience, Stream
from perdure.data.records import Batch, Records
from perdure.data.scenarios import blurry, online, permuted, rotated, split
from perdure.data.sources import (
    from_arrays,
    from_folder,
    from_huggingface,
    from_pandas,
    from_tokens,
    from_torch,
)
from perdure.data.value_checks import check_finite

__all__ = [
    "Batch",
    "Change",
    "Dataset",
    "Experience",
    "InputDomain",
    "Records",
    "Stream",
    "Views",
    "adult",
    "blurry",
    "breast_cancer",
    "check_finite",
    "cifar10",
    "digits",
    "dirichlet",
    "from_arrays",
    "from_folder",
    "from_huggingface",
    "from_pandas",
    "from_tokens",
    "from_torch",
    "iid",
    "load",
    "mnist",
    "online",
    "permuted",
    "rotated",
    "shakespeare",
    "shift_and_flip",
    "split",
]
