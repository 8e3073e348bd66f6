"""Records, experiences and streams: the data of a learner.

Import a data set (`digits`, `mnist`, ..., or `load` for one by name), a scenario that makes a
stream of it (`split`, `by_time`, `by_domain`, `repetition`, `permuted`, `rotated`, `blurry`,
`joint`; `online` cuts one into pieces), a split over clients (`dirichlet`, `iid`, `by_attribute`),
several random versions of each record (`Views`), and mixed pairs of records (`Mixup`, `CutMix`).
`resampled` balances the classes of public records; `column_scaling`, `best_columns` and
`principal_components` change inputs by constants of public records. `plot_stream` draws a stream.
`perdure.data.datasets` describes how to add a data set.
"""

from perdure.data.augmentation import Change, Views, shift_and_flip
from perdure.data.client_splits import dirichlet, iid
from perdure.data.clients_by_attribute import by_attribute
from perdure.data.column_transforms import (
    ColumnTransform,
    best_columns,
    column_scaling,
    principal_components,
)
from perdure.data.datasets.adult import adult
from perdure.data.datasets.base import Dataset
from perdure.data.datasets.breast_cancer import breast_cancer
from perdure.data.datasets.cifar10 import cifar10
from perdure.data.datasets.cifar100 import cifar100
from perdure.data.datasets.digits import digits
from perdure.data.datasets.mnist import mnist
from perdure.data.datasets.registry import load
from perdure.data.datasets.shakespeare import shakespeare
from perdure.data.domain import InputDomain
from perdure.data.experience import Experience, Stream
from perdure.data.groups import Groups, GroupWeights
from perdure.data.mixing import CutMix, Mixup
from perdure.data.plots import plot_stream
from perdure.data.records import Batch, Records, Spent
from perdure.data.resampling import resampled
from perdure.data.scenarios import (
    blurry,
    by_domain,
    by_time,
    joint,
    online,
    permuted,
    repetition,
    rotated,
    split,
)
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
    "ColumnTransform",
    "CutMix",
    "Dataset",
    "Experience",
    "GroupWeights",
    "Groups",
    "InputDomain",
    "Mixup",
    "Records",
    "Spent",
    "Stream",
    "Views",
    "adult",
    "best_columns",
    "blurry",
    "breast_cancer",
    "by_attribute",
    "by_domain",
    "by_time",
    "check_finite",
    "cifar10",
    "cifar100",
    "column_scaling",
    "digits",
    "dirichlet",
    "from_arrays",
    "from_folder",
    "from_huggingface",
    "from_pandas",
    "from_tokens",
    "from_torch",
    "iid",
    "joint",
    "load",
    "mnist",
    "online",
    "permuted",
    "plot_stream",
    "principal_components",
    "repetition",
    "resampled",
    "rotated",
    "shakespeare",
    "shift_and_flip",
    "split",
]
