"""Over- and undersampling of classes by imbalanced-learn, for public records."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from perdure.data.records import Records
from perdure.errors import ConfigError
from perdure.tasks import SingleLabel
from perdure.utils.checked_arguments import checked_arguments
from perdure.utils.extras import imported
from perdure.utils.hashing import hashed
from perdure.utils.seeding import derive

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Method = Literal["oversample", "undersample", "smote", "borderline_smote", "adasyn"]
"""Names of the ways to balance classes."""
COPYING: tuple[Method, ...] = ("oversample", "undersample")
"""Methods that repeat or drop records, but make no new ones."""
NEIGHBOURS = 5
"""Most neighbours between which a record is made, as in imbalanced-learn."""


@checked_arguments
def resampled(records: Records, *, method: Method = "smote", seed: int = 0) -> Records:
    """Balance the classes of public records, so that all have equally many or nearly so.

    Needs the extra `cleaning` (imbalanced-learn).

    Guarantee: none, and the result is refused under privacy: a repeated record enters several rows,
    a dropped or synthetic one depends on others, and the numbers of rows are counts of classes.

    Args:
        records: public records with one class each.
        method: "oversample" repeats records of rare classes, with their ids; "undersample" drops
            records of frequent ones; "smote", "borderline_smote" and "adasyn" add records between
            neighbours of a rare class, with ids of their own (numbers from a hash).
        seed: seed of the choice.

    Raises:
        ConfigError: if records have several labels each, or a class has too few records.
    """
    if not isinstance(records.task, SingleLabel):
        given = f"records of the task {records.task.name}"
        raise ConfigError.of("records", given, "records with one class each")
    labels = records.labels.cpu().numpy()
    counts = torch.bincount(records.labels.cpu())
    present = counts[counts > 0]
    if len(present) < 2:
        raise ConfigError.of("records", f"{len(present)} classes", "two classes or more")
    if method in COPYING:
        sampler = _sampler(method, seed, 0)
        rows = torch.arange(len(records)).reshape(-1, 1)
        kept, _ = sampler.fit_resample(rows.numpy(), labels)
        chosen = records.take(torch.from_numpy(kept).flatten())
        return replace(chosen, coupled_by=f"resampled(method={method!r})")
    _refuse_synthesis(records, method, int(present.min()))
    sampler = _sampler(method, seed, min(NEIGHBOURS, int(present.min()) - 1))
    flat = records.inputs.reshape(len(records), -1).cpu().numpy()
    try:
        inputs, classes = sampler.fit_resample(flat, labels)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError.of("method", method, f"a method that fits ({reason})") from error
    return _with_synthetic(records, inputs[len(records) :], classes[len(records) :], method, seed)


def _refuse_synthesis(records: Records, method: str, fewest: int) -> None:
    if not records.inputs.is_floating_point():
        given = f"{method} of inputs in {records.inputs.dtype}"
        raise ConfigError.of("method", given, "float inputs, or oversample or undersample")
    if records.attributes:
        given = f"{method} of records with attributes {', '.join(records.attributes)}"
        allowed = "oversample or undersample, because a synthetic record has no attributes"
        raise ConfigError.of("method", given, allowed)
    if fewest < 2:
        given = f"{method} of a class with {fewest} record"
        raise ConfigError.of("method", given, "2 records or more of every class, or oversample")


def _sampler(method: Method, seed: int, neighbours: int) -> Any:
    """Make the sampler of imbalanced-learn."""
    over_sampling = imported("imblearn.over_sampling", "cleaning", "resampled")
    under_sampling = imported("imblearn.under_sampling", "cleaning", "resampled")
    if method == "oversample":
        return over_sampling.RandomOverSampler(random_state=seed)
    if method == "undersample":
        return under_sampling.RandomUnderSampler(random_state=seed)
    if method == "adasyn":
        return over_sampling.ADASYN(random_state=seed, n_neighbors=neighbours)
    kind = over_sampling.SMOTE if method == "smote" else over_sampling.BorderlineSMOTE
    return kind(random_state=seed, k_neighbors=neighbours)


def _with_synthetic(
    records: Records,
    inputs: "NDArray[np.float32]",
    classes: "NDArray[np.int64]",
    method: str,
    seed: int,
) -> Records:
    """Return the records followed by synthetic ones.

    Args:
        records: real records.
        inputs: (k, features) synthetic inputs.
        classes: (k,) their classes.
        method: name of the method.
        seed: seed from which the synthetic ids follow.
    """
    place = records.inputs.device
    new = torch.from_numpy(inputs).to(records.inputs).reshape(-1, *records.inputs.shape[1:])
    ids = hashed(torch.arange(len(new)), derive(seed, "synthetic records")).to(place)

    def both(real: Tensor, more: Tensor) -> Tensor:
        return torch.cat([real, more.to(real)])

    return replace(
        records,
        inputs=both(records.inputs, new),
        labels=both(records.labels, torch.from_numpy(classes)),
        ids=both(records.ids, ids),
        declared_size=0,
        coupled_by=f"resampled(method={method!r})",
    )
