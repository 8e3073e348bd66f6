"""Backdoors: a client of a federation stamps a trigger on records to control the model's answers.

    streams[3] = Backdoor(target=7).poisoned(streams[3], seed=0)     # client 3 is malicious
    ... train the federation ...
    Backdoor(target=7).success_rate(predict, test.inputs, test.labels)

The success rate beside the clean accuracy shows if an aggregator, or clipping and noise, keep the
client out.

Source: Gu, Dolan-Gavitt, Garg 2017, "BadNets", section 3; Bagdasaryan, Veit, Hua, Estrin, Shmatikov
2020, "How to backdoor federated learning".
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perdure.adversarial.base import Attack, Logits
from perdure.adversarial.robust_accuracy import (
    MOST_ROWS,
    ThreatModelCard,
    fixed,
    measure_robustness,
)
from perdure.data.experience import Stream
from perdure.data.records import Records
from perdure.errors import ConfigError
from perdure.tasks import SingleLabel, refuse_other_tasks
from perdure.utils.checked_fields import CheckedFields
from perdure.utils.seeding import generator as seeded


@dataclass(frozen=True, kw_only=True)
class Backdoor(CheckedFields):
    """Trigger that a malicious client stamps on its records, with the class that it wants for them.

    Args:
        target: class that records with the trigger shall get.
        size: side of the trigger in the last corner of an image (n, channels, height, width), or
            number of last features of other inputs.
        value: value of the trigger's entries, in units of the inputs.
        share: share of the client's records that get trigger and target.
    """

    target: int
    size: int = 3
    value: float = 1.0
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.target < 0:
            raise ConfigError.of("target", self.target, "a class, 0 or more")
        if self.size < 1:
            raise ConfigError.of("size", self.size, "1 or more")
        if not 0 < self.share <= 1:
            raise ConfigError.of("share", self.share, "a share above 0, at most 1")

    def stamped(self, inputs: Tensor) -> Tensor:
        """Return a copy of inputs (n, ...) with the trigger."""
        marked = inputs.clone()
        if inputs.ndim == 4:
            marked[..., -self.size :, -self.size :] = self.value
        else:
            marked.flatten(1)[:, -self.size :] = self.value
        return marked

    def poisoned(self, stream: Stream, *, seed: int) -> Stream:
        """Return a client's stream with trigger and target on a share of its training records.

        Only experiences that declare the target change, because another label would be refused.

        Args:
            stream: stream of the client.
            seed: seed of the choice of records.

        Raises:
            ConfigError: if records do not have one class each, or no experience has the target.
        """
        refuse_other_tasks(stream.task, (SingleLabel,), "backdoor", "it asks for a class")
        if not any(self.target in each.classes for each in stream):
            raise ConfigError.of("target", self.target, "a class of an experience of the stream")
        changed = tuple(
            replace(each, train=self._poisoned(each.train, seed, each.index))
            if self.target in each.classes
            else each
            for each in stream
        )
        return replace(stream, experiences=changed)

    def _poisoned(self, records: Records, seed: int, index: int) -> Records:
        draw = torch.rand(len(records), generator=seeded(seed, "backdoor", index))
        chosen = (draw < self.share).to(records.inputs.device)
        inputs = records.inputs.clone()
        inputs[chosen] = self.stamped(inputs[chosen])
        labels = torch.where(chosen, self.target, records.labels)
        return replace(records, inputs=inputs, labels=labels)

    def success_rate(self, predict: Logits, inputs: Tensor, labels: Tensor) -> float:
        """Percentage of records of other classes that get the target's class with the trigger.

        A module is evaluated in evaluation mode. Compare with the same rate of a model of honest
        clients, which is not 0.

        Guarantee: none. The result is an exact statistic of `inputs`, so they must be public.

        Args:
            predict: module, or another function (k, ...) -> (k, classes) logits.
            inputs: (n, ...) inputs.
            labels: (n,) int64 labels.

        Raises:
            ConfigError: if all records are of the target's class.
        """
        rows = inputs[labels != self.target]
        if not len(rows):
            raise ConfigError.of("labels", f"all {self.target}", "records of other classes, too")
        hits = 0
        with fixed(predict), torch.no_grad():
            for start in range(0, len(rows), MOST_ROWS):
                marked = self.stamped(rows[start : start + MOST_ROWS])
                hits += int((predict(marked).argmax(1) == self.target).sum())
        return 100.0 * hits / len(rows)


def robustness_by_client(
    predict: Logits,
    tests: Sequence[Records],
    attack: Attack,
    *,
    generator: torch.Generator | None,
) -> tuple[ThreatModelCard, ...]:
    """Return the card of a global model on the public test records of each client, in order.

    A mean over clients hides that some of them have a model that is not robust on their records.

    Args:
        predict: module, or another differentiable function (k, ...) -> (k, classes) logits.
        tests: public test records of each client.
        attack: attack on every record.
        generator: CPU generator for the random numbers of the attack.
    """
    return tuple(
        measure_robustness(predict, each.inputs, each.labels, attack, generator=generator)
        for each in tests
    )
