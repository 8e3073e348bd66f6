"""Random transforms of torchvision (v2), run on one record at a time with its own random numbers.

They draw and branch in Python, so `torch.func.vmap` cannot run them on a batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from perdure.utils.checked_fields import CheckedFields
from perdure.utils.hashing import is_plain
from perdure.utils.seeding import Seed, drawing_from, seed_for

TORCHVISION = "torchvision.transforms.v2"


def is_transform(change: object) -> TypeGuard[nn.Module]:
    """Return True for a transform of `torchvision.transforms.v2`, or a subclass of one."""
    return any(base.__module__.startswith(TORCHVISION) for base in type(change).__mro__)


@dataclass(frozen=True, kw_only=True)
class RecordTransform(CheckedFields):
    """A transform of torchvision as the change of `Views`.

    Guarantee: a view depends only on its record and on its own random numbers. The transform gets a
    copy of one record at a time, and torch's generator starts from a seed of this record and view.
    Under privacy the guard tests it as code of the user.

    Args:
        transform: transform of `torchvision.transforms.v2`.
        settings: class and settings of the transform and of those inside it, for the fingerprint
            (set automatically).
    """

    transform: nn.Module
    settings: tuple[tuple[str, dict[str, object]], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        settings = tuple((type(part).__name__, _settings(part)) for part in parts(self.transform))
        object.__setattr__(self, "settings", settings)

    def __call__(self, record: Tensor) -> Tensor:
        """Return one random version of a record, without batch dimension."""
        changed: Tensor = self.transform(record)
        return changed

    def views(self, inputs: Tensor, view: int, seed: Seed) -> Tensor:
        """(n, ...) view number `view` of every record, computed on the processor.

        Args:
            inputs: (n, ...) inputs.
            view: number of the view, from 0.
            seed: seed of the random numbers; secret bytes under privacy.
        """
        made = []
        for row, record in enumerate(inputs.detach().cpu()):
            with drawing_from(seed_for(seed, view, row)):
                made.append(self(record.clone()))  # a transform may write into its input
        return torch.stack(made).to(inputs.device) if made else inputs


def parts(transform: object) -> Iterator[Any]:
    """Yield a transform and all transforms inside it, such as those of a `Compose`."""
    yield transform
    inside = getattr(transform, "transforms", ())
    for each in inside if isinstance(inside, list | tuple | nn.ModuleList) else ():
        yield from parts(each)


def _settings(part: object) -> dict[str, object]:
    """Numbers, text and names of a transform; other values are described by their class."""
    found = {}
    for name, value in getattr(part, "__dict__", {}).items():
        if name.startswith("_") or name in ("training", "transforms"):
            continue
        plain = value.value if isinstance(value, Enum) else value
        found[name] = plain if is_plain(plain) else f"a {type(value).__name__}"
    return found
