"""Private sum of a training on several processes: process 0 charges and draws, once for all."""

from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from perdure.privacy.answers import Answers
from perdure.privacy.clipping.clip import Clip
from perdure.privacy.ledger.entries import Stated
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.noise.draw_log import DrawLog
from perdure.privacy.noise.key import NoiseKey
from perdure.privacy.private_sum import ChangedSumError, PrivateSum
from perdure.privacy.releases import ONLY, Clipped, ReleaseKey
from perdure.privacy.reserved_steps import Schedule
from perdure.privacy.settings import Privacy
from perdure.types import Params
from perdure.utils.processes import Message, Processes

CLIP = "clip"
"""Kind of the message that asks all processes for a clipped sum."""


class SharedPrivateSum(PrivateSum):
    """Private sum whose process 0 has the ledger and the key, and tells the answers to all others.

    Guarantee: as `PrivateSum`: every sum is charged once and gets noise once. The other processes
    have no key of the run. The messages between the processes are not encrypted, and contain exact
    sums and secret coins.

    Args:
        processes: group of the processes.
        privacy: privacy settings of the user.
        schedule: calibrated noise of each experience; that of process 0 is used.
        ledger: ledger of process 0; a ledger in memory elsewhere, which is not charged.
        key: key of process 0.
        draws: log of the exact sums; None for a log in memory.
        answers: store of released answers; None to keep them in memory.
        independence: how the gradients of records are known to be independent.
    """

    def __init__(
        self,
        *,
        processes: Processes,
        privacy: Privacy,
        schedule: Schedule,
        ledger: Ledger,
        key: NoiseKey,
        draws: DrawLog | None = None,
        answers: Answers | None = None,
        independence: Stated = "",
    ) -> None:
        self._processes = processes
        super().__init__(
            privacy=privacy,
            schedule=self._schedule_of_first(schedule),
            ledger=ledger,
            key=key,
            draws=draws,
            answers=answers,
            independence=independence,
        )
        self._reserved: set[str] = set()

    def reserve(
        self,
        *,
        scope: Mapping[str, float],
        steps: range,
        start: str,
        data: str,
        expected: float,
        numbers: int,
        slots: int | None = None,
        purpose: str = "gradient",
    ) -> None:
        """Charge a block of steps in process 0, before any noise is drawn."""

        def charge() -> Message:
            super(SharedPrivateSum, self).reserve(
                scope=scope,
                steps=steps,
                start=start,
                data=data,
                expected=expected,
                numbers=numbers,
                slots=slots,
                purpose=purpose,
            )
            return Message()

        self._processes.from_first("reserve", charge)
        self._reserved = {purpose} if purpose == "gradient" else self._reserved | {purpose}

    def reserved(self, purpose: str) -> bool:
        """Return True if `reserve` has charged steps for this purpose in the current block."""
        return purpose in self._reserved

    def coins(self, records: Tensor, step: int, purpose: str = "gradient") -> Tensor:
        """Return process 0's secret uniform numbers that decide which records enter the step."""
        return self._told(
            "coins", lambda: super(SharedPrivateSum, self).coins(records, step, purpose)
        )

    def tags(self, ids: Tensor, purpose: str = "memory") -> Tensor:
        """Return process 0's secret random numbers, one fixed number per record."""
        return self._told("tags", lambda: super(SharedPrivateSum, self).tags(ids, purpose))

    def secret(self, purpose: str, step: int) -> bytes:
        """Return process 0's secret seed for one kind of random numbers inside a step."""

        def drawn() -> Tensor:
            seed = super(SharedPrivateSum, self).secret(purpose, step)
            return torch.frombuffer(bytearray(seed), dtype=torch.uint8)

        return self._told("secret", drawn).numpy().tobytes()

    def gradient(self, clipped: Clipped, params: Params, *, step: int) -> Params:
        """Noisy sum of clipped per-record gradients; the clipped sum is computed by all processes.

        Raises:
            ChangedSumError: if the step is executed again with another sum.
        """
        device = next(iter(params.values())).device

        def released(helped: Clipped) -> Message:
            own = super(SharedPrivateSum, self).gradient(helped, params, step=step)
            return Message(
                tensors=own, facts={"clip_norm": self.clip_norm, "deviation": self.deviation}
            )

        message = self._with_help("gradient", clipped, released)
        if self._processes.first:
            return dict(message.tensors)
        total = {name: message.tensors[name].to(device) for name in params}
        self.clip_norm = message.facts["clip_norm"]
        self.last_gradient = (total, message.facts["deviation"])
        return total

    def reference(self, clipped: Clipped, params: Params, *, step: int, purpose: str) -> Params:
        """Noisy sum of clipped per-record gradients, released in addition to the step's gradient.

        Raises:
            ChangedSumError: if the step is executed again with another sum.
        """
        device = next(iter(params.values())).device

        def released(helped: Clipped) -> Message:
            own = super(SharedPrivateSum, self).reference(
                helped, params, step=step, purpose=purpose
            )
            return Message(tensors=own)

        message = self._with_help("reference", clipped, released)
        return {name: message.tensors[name].to(device) for name in params}

    def release(
        self,
        clipped: Clipped,
        *,
        purpose: str,
        occasion: ReleaseKey,
        shapes: Mapping[str, torch.Size],
        clip_norm: float,
    ) -> Params:
        """Noisy sum of one clipped row per record, computed by process 0 alone."""
        device = next(iter(occasion.data.values())).device
        message = self._processes.from_first(
            "release",
            lambda: Message(
                tensors=super(SharedPrivateSum, self).release(
                    clipped, purpose=purpose, occasion=occasion, shapes=shapes, clip_norm=clip_norm
                )
            ),
        )
        return {name: message.tensors[name].to(device) for name in shapes}

    def count(self, counts: Tensor, *, purpose: str, occasion: ReleaseKey) -> Tensor:
        """Return (bins,) int64 counts plus integer noise, drawn by process 0."""

        def counted() -> Tensor:
            return super(SharedPrivateSum, self).count(counts, purpose=purpose, occasion=occasion)

        return self._told("count", counted).to(counts.device)

    def select(self, scores: Tensor, *, purpose: str, occasion: ReleaseKey) -> Tensor:
        """Return (k,) indices of high scores, chosen by process 0."""

        def selected() -> Tensor:
            return super(SharedPrivateSum, self).select(scores, purpose=purpose, occasion=occasion)

        return self._told("select", selected).to(scores.device)

    # ------------------------------------------------------------------ inside

    def _schedule_of_first(self, schedule: Schedule) -> Schedule:
        """Return the schedule of process 0, which may have kept the noise of an earlier start."""

        def told() -> Message:
            left_out = [sorted(each) for each in schedule.excluded]
            return Message(facts={"noise": list(schedule.noise), "excluded": left_out})

        facts = self._processes.from_first("schedule", told).facts
        return Schedule(
            noise=tuple(facts["noise"]), excluded=tuple(map(frozenset, facts["excluded"]))
        )

    def _told(self, kind: str, answer: Callable[[], Tensor]) -> Tensor:
        """Return process 0's answer, one tensor, in every process."""
        message = self._processes.from_first(kind, lambda: Message(tensors={ONLY: answer()}))
        return message.tensors[ONLY]

    def _with_help(
        self, kind: str, clipped: Clipped, released: Callable[[Clipped], Message]
    ) -> Message:
        """Release a sum in process 0, to which every process adds the sum over its own rows.

        Raises:
            ChangedSumError: in every process, if the step was charged again.
        """

        def helped(clip: Clip) -> Params | None:
            self._processes.tell(CLIP, Message(facts=asdict(clip)))
            return clipped(clip)

        def answer() -> Message:
            try:
                return released(helped)
            except ChangedSumError as error:
                return Message(facts={"changed": str(error)})

        if not self._processes.first:
            clipped(Clip(**self._processes.hear(CLIP).facts))
        message = self._processes.from_first(kind, answer)
        if "changed" in message.facts:
            raise ChangedSumError(message.facts["changed"])
        return message
