"""Training records that are held out to measure a model, chosen by their ids."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from perdure.data.experience import Experience
from perdure.data.records import Records
from perdure.errors import ConfigError
from perdure.utils.seeding import generator


def hold_out(
    experiences: Sequence[Experience], share: float, seed: int, purpose: str
) -> Iterator[tuple[Records, Records]]:
    """Yield the training records of each experience in two parts: for training, and held out.

    All records of one id are in the same part, in every experience.

    Args:
        experiences: experiences in order.
        share: share of the ids of each experience that is held out, among those that no earlier
            experience has.
        seed: seed of the choice.
        purpose: name of the choice; another purpose holds out other records.

    Raises:
        ConfigError: if an experience would have no record in one of the parts.
    """
    none = torch.empty(0, dtype=torch.int64)
    known = none
    measured = none
    for experience in experiences:
        ids: Tensor = torch.unique(experience.train.ids.cpu())
        new = ids[~torch.isin(ids, known)]
        order = torch.randperm(len(new), generator=generator(seed, purpose, experience.index))
        count = round(share * len(new))
        if not torch.isin(ids, measured).any():
            count = max(1, count)
        known = torch.cat([known, new])
        measured = torch.cat([measured, new[order[:count]]])
        # later experiences add new ids only, so this cut is final
        yield cut(experience, measured)


def cut(experience: Experience, measured: Tensor) -> tuple[Records, Records]:
    """Return the training records without the given ids, and those with them.

    Args:
        experience: experience whose training records are cut.
        measured: int64 ids to hold out.

    Raises:
        ConfigError: if one of the parts would have no record.
    """
    train = experience.train
    held = torch.isin(train.ids.cpu(), measured)
    if held.all() or not held.any():
        raise ConfigError(
            f"experience {experience.index} has {len(train)} training records of "
            f"{len(set(train.ids.tolist()))} ids, too few to hold some out and learn from others; "
            "allowed: two ids or more"
        )
    return _rows(train, ~held), _rows(train, held)


def _rows(records: Records, chosen: Tensor) -> Records:
    return records.take(chosen.nonzero().flatten().to(records.inputs.device))
