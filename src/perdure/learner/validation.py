"""Validation during training: early stopping, and the best parameters of an experience."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from perdure.adversarial.base import Attack
from perdure.data.experience import Stream
from perdure.data.held_out import hold_out
from perdure.data.records import Records
from perdure.errors import ConfigError, PrivacyError
from perdure.learner.evaluation import robust_score_of, score_of
from perdure.learner.party import Party
from perdure.learner.share_of_steps import STEPS_OR_SHARE, are_steps, steps_of
from perdure.tasks import SingleLabel, refuse_other_tasks
from perdure.utils.checked_fields import CheckedFields
from perdure.utils.hashing import digest
from perdure.utils.seeding import generator

FACTS = "validation"
"""Key, in the facts of a checkpoint, of the measurements on validation records."""
BEST = "best."
"""Beginning of the names, in a checkpoint, of the best parameters so far."""


@dataclass(frozen=True, kw_only=True)
class Validation(CheckedFields):
    """Measurement on validation records during an experience, early stopping, and the best model.

    Validation records are held out of training by their ids, so that all copies of a record are on
    one side, or given as `records`. The model is measured by the metric of the task on the
    validation records of the open experience, with its averaged parameters if there are any. Steps
    after an early stop are not done.

    Guarantee: none for held-out records, so they are refused under privacy. Public `records` cost
    no privacy; they may choose the best parameters under privacy, but not the number of steps,
    because the epsilon of a number of steps that depends on releases is not known.

    With an `attack`, the model is measured by its accuracy under the attack. Fast adversarial
    training may collapse within an epoch to models that only its own attack cannot fool
    (catastrophic overfitting, Wong et al. 2020, section 5.4); the measurement sees it, `patience`
    stops the training, and `keep_best` goes back to the parameters before.

    Args:
        share: share of the records of an experience that is held out, between 0 and 1; not used
            with `records`.
        every: steps between two measurements, a number or a share of the steps of an experience as
            a fraction; under privacy, measurements are at the ends of blocks.
        patience: number of measurements in a row without an improvement that ends the experience;
            None to take all steps.
        keep_best: end the experience with the parameters of the best measurement.
        records: public validation records of each experience, in order; () to hold records out.
        attack: attack under which the accuracy is measured, such as PGD(epsilon=0.1, steps=5); None
            for the metric of the task.
    """

    share: float = 0.1
    every: int | float = 0.1
    patience: int | None = 3
    keep_best: bool = True
    records: Sequence[Records] = ()
    attack: Attack | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError.of("share", self.share, "a share between 0 and 1")
        if not are_steps(self.every):
            raise ConfigError.of("every", self.every, STEPS_OR_SHARE)
        if self.patience is not None and self.patience < 1:
            raise ConfigError.of("patience", self.patience, "a whole number, 1 or more, or None")

    def settings(self) -> dict[str, object]:
        """Settings for the fingerprint of a run; given records by number and digest."""
        own = {name: getattr(self, name) for name in ("share", "every", "patience", "keep_best")}
        seen = [
            f"{len(each)} records, {digest({'inputs': each.inputs, 'labels': each.labels}).hex()}"
            for each in self.records
        ]
        attacked = {} if self.attack is None else {"attack": self.attack}
        return {**own, "records": seen, **attacked}

    def refuse_private(self) -> None:
        """Refuse settings that break the privacy of training records.

        Raises:
            PrivacyError: for held-out records, and for an early stop.
        """
        if not self.records:
            raise PrivacyError(
                "validation would choose the model by private records without noise; give public "
                "records, Validation(records=..., patience=None), or no validation"
            )
        if self.patience is not None:
            raise PrivacyError(
                f"patience = {self.patience} is not allowed under privacy, because a number of "
                "steps that depends on releases has no known epsilon; give patience=None"
            )


class Validator:
    """Measurements of one run on its validation records.

    Args:
        validation: settings.
        stream: stream of the run.
        seed: seed of the choice of held-out records.
        private: True if the training records are private.
    """

    def __init__(self, validation: Validation, stream: Stream, seed: int, *, private: bool) -> None:
        self._settings = validation
        self._private = private
        self._seed = seed
        if validation.attack is not None:
            refuse_other_tasks(stream.task, (SingleLabel,), "validation.attack", "it needs classes")
        self.stream = stream
        """Stream without the held-out records."""
        self.records = list(validation.records)
        if private:
            validation.refuse_private()
        if not self.records:
            parts = list(hold_out(stream.experiences, validation.share, seed, "validation"))
            self.records = [held for _, held in parts]
            cut = zip(stream.experiences, parts, strict=True)
            self.stream = replace(
                stream, experiences=tuple(replace(each, train=train) for each, (train, _) in cut)
            )
        elif len(self.records) != len(stream):
            given = f"{len(self.records)} sets of records"
            raise ConfigError.of("validation.records", given, f"one for each of {len(stream)}")
        self.history: list[tuple[int, int, float]] = []
        self.begin()

    def begin(self) -> None:
        """Begin an experience."""
        self.stopped = False
        self._best: float | None = None
        self._misses = 0
        self._state: dict[str, Tensor] = {}

    def pieces(self, block: range, steps: int) -> Iterator[range]:
        """Yield the parts of a block of steps, each up to a measurement, until training stops.

        Args:
            block: steps of an experience.
            steps: number of all steps of the experience.
        """
        every = steps_of(self._settings.every, steps)
        start = block.start
        while start < block.stop and not self.stopped:
            stop = block.stop if self._private else min(block.stop, (start // every + 1) * every)
            yield range(start, stop)
            start = stop

    def follow(self, party: Party, steps: int) -> None:
        """Measure the model, if a measurement is due after the steps that are done.

        Args:
            party: party in an open experience.
            steps: number of all steps of the experience.
        """
        step = party.position.step
        if self._private or step == steps or step % steps_of(self._settings.every, steps) == 0:
            self._measure(party, step)

    def _measure(self, party: Party, step: int) -> None:
        index = party.position.experience
        by_task = party.stream.scenario == "task"
        attack = self._settings.attack
        if attack is None:
            score = score_of(party, self.records[index], index if by_task else None)
        else:
            draws = generator(self._seed, "validation attack", index, step)
            score = robust_score_of(party, self.records[index], attack, draws)
        self.history.append((index, step, score))
        sign = 1 if attack or party.stream.task.metric.higher_is_better else -1
        if self._best is None or sign * score > sign * self._best:
            self._best = score
            self._misses = 0
            if self._settings.keep_best:
                now = {**party.model.state_dict(), **party.average.values}
                self._state = {name: value.detach().clone() for name, value in now.items()}
        else:
            self._misses += 1
        patience = self._settings.patience
        self.stopped = patience is not None and self._misses >= patience

    def finish(self, party: Party) -> None:
        """Give the model the parameters of the best measurement, if they are kept."""
        if self._state:
            party.model.load_state_dict(self._state)
            party.average.clear()

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and JSON values of the measurements, for a checkpoint."""
        facts = {
            "history": list(self.history),
            "best": self._best,
            "misses": self._misses,
            "stopped": self.stopped,
        }
        return {f"{BEST}{name}": value for name, value in self._state.items()}, {FACTS: facts}

    def restore(
        self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], device: str | torch.device
    ) -> None:
        """Restore the measurements from a checkpoint."""
        own = facts.get(FACTS)
        if own is None:
            return  # a checkpoint of a run without validation, which the fingerprint refuses
        self.history = [(int(index), int(step), score) for index, step, score in own["history"]]
        self._best = own["best"]
        self._misses = own["misses"]
        self.stopped = own["stopped"]
        self._state = {
            name.removeprefix(BEST): value.to(device)
            for name, value in tensors.items()
            if name.startswith(BEST)
        }
