"""Folds of a stream: parts of the training records, by record id, that test one another."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn

from perdure.data.experience import Stream
from perdure.data.held_out import cut
from perdure.errors import ConfigError, PrivacyError
from perdure.learner.learner import Learner
from perdure.learner.optimizers import first_line

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Splitter(Protocol):
    """Interface of the splitters of `sklearn.model_selection`, such as `KFold(5)`."""

    def split(self, rows: Any, labels: Any = ..., /) -> Iterator[tuple[Any, Any]]:
        """Yield the positions of the training rows and of the test rows of each fold."""


def folds(stream: Stream, splitter: Splitter) -> Iterator[Stream]:
    """Yield one stream for each fold, whose test records are held-out training records.

    The splitter gets one row for each record id, in ascending order, with the label of its first
    record. All copies of a record, in every experience, are on one side.

    Args:
        stream: stream whose training records are split; its test records are not used.
        splitter: splitter of scikit-learn.

    Raises:
        ConfigError: if the splitter does not split these records, or a fold has no training or no
            test record of an experience.
    """
    if not callable(getattr(splitter, "split", None)):
        allowed = "a splitter of sklearn.model_selection, such as KFold(5)"
        raise ConfigError.of("splitter", type(splitter).__name__, allowed)
    ids = torch.cat([experience.train.ids.cpu() for experience in stream]).numpy()
    labels = torch.cat([experience.train.labels.cpu() for experience in stream]).numpy()
    known, first = np.unique(ids, return_index=True)
    for held in _held(splitter, known, labels[first]):
        parts = [cut(experience, torch.from_numpy(known[held])) for experience in stream]
        experiences = [
            replace(experience, train=train, test=test)
            for experience, (train, test) in zip(stream, parts, strict=True)
        ]
        yield replace(stream, experiences=tuple(experiences))


def _held(
    splitter: Splitter, ids: "NDArray[np.int64]", labels: "NDArray[Any]"
) -> "list[NDArray[np.int64]]":
    """Return the positions of the test rows of each fold."""
    try:
        return [test for _, test in splitter.split(ids.reshape(-1, 1), labels)]
    except ValueError as error:
        given = f"{type(splitter).__name__} of {len(ids)} record ids"
        raise ConfigError.of(
            "splitter", given, f"a splitter that fits ({first_line(error)})"
        ) from error


class NewLearners:
    """Learners of a function, each checked to be new, without privacy and in no folder.

    Args:
        make: function that returns a new learner with a new model.
        purpose: verb phrase for the message to private learners.
    """

    def __init__(self, make: Callable[[], Learner], purpose: str) -> None:
        self._make = make
        self._purpose = purpose
        self._models: list[nn.Module] = []

    def __call__(self) -> Learner:
        """Return a new learner.

        Raises:
            ConfigError: for a learner or model of an earlier call, or a learner in a folder.
            PrivacyError: for a private learner.
        """
        learner = self._make()
        if learner.privacy is not None:
            raise PrivacyError(
                f"{self._purpose} reads held-out records without noise, and trains several times, "
                "each of which costs privacy; allowed: public records and a learner with "
                "privacy=None"
            )
        used = learner.position.experience or learner.position.step
        if used or any(model is learner.model for model in self._models):
            raise ConfigError(
                "make returned a learner or a model of an earlier fold; allowed: a new learner and "
                "a new model at each call; build both inside the function"
            )
        if learner.folder is not None:
            allowed = "None, because a fold would resume another one"
            raise ConfigError.of("folder", str(learner.folder), allowed)
        self._models.append(learner.model)
        return learner
