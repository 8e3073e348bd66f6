"""Checks of the order of calls in a session's loop: every call once per batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Literal, NoReturn

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from perdure.data.records import Batch
from perdure.errors import ConfigError, LoopError, PrivacyError
from perdure.types import Params

Stage = Literal["between", "drawn", "filled", "taken"]
"""Stage of the loop: between steps, rows drawn, `.grad` filled, or optimiser step taken."""
ROWS = frozenset(field.name for field in fields(Batch))
CALLS = "session.backward(batch), optimizer.step(), session.after_step()"


@dataclass(frozen=True, kw_only=True)
class HiddenBatch:
    """Batch of a private step, whose records only the session may read.

    Args:
        step: number of the step in its experience.
    """

    step: int

    def __len__(self) -> int:
        return self._refuse("the number of records")

    def __getattr__(self, name: str) -> object:
        if name in ROWS:
            self._refuse(name)
        raise AttributeError(f"a batch of a private step has no attribute {name!r}")

    def _refuse(self, wanted: str) -> NoReturn:
        raise PrivacyError(
            f"{wanted} of a private batch may not be read, because this would have no finite "
            "epsilon; give the batch to session.backward(batch) unchanged"
        )


class StepOrder:
    """Stage of the current step of a loop; calls in a wrong order are refused.

    An error names the expected calls.
    """

    def __init__(self) -> None:
        self.stage: Stage = "between"
        self.step = 0
        self._rows: Batch | None = None
        self._given: Batch | HiddenBatch | None = None
        self._watched = False
        self._moving: bool | None = None
        self._hooks: list[RemovableHandle] = []

    def hand_out(self, rows: Batch, step: int, *, hidden: bool) -> Batch | HiddenBatch:
        """Begin a step, and return the batch for the user's loop."""
        self.stage = "drawn"
        self.step = step
        self._rows = rows
        self._given = HiddenBatch(step=step) if hidden else rows
        return self._given

    def rows_of(self, batch: object) -> Batch:
        """Return the records of the current step, if `session.backward` got the right batch.

        Raises:
            LoopError: if `batch` is not the batch that the loop handed out for this step, if
                `backward` was already called in this step, or if no step is open.
        """
        if self._rows is None or self.stage == "between":
            raise LoopError(
                "session.backward() was called outside a step; call it inside `with "
                "session.experience(experience) as batches:` and `for batch in batches:`"
            )
        if batch is not self._given:
            raise LoopError(
                f"session.backward() got another batch than the batch of step {self.step}; give "
                "the batch of the loop `for batch in batches` unchanged, and use views=... for "
                "augmentation"
            )
        if self.stage != "drawn":
            raise LoopError(
                f"session.backward() was called twice in step {self.step}; for every batch call "
                f"once each: {CALLS}"
            )
        return self._rows

    def filled(self, trained: Params) -> None:
        """Record that `session.backward` has filled the gradients of the step."""
        self.stage = "filled"
        if self._watched and self._moving is None:
            self._moving = _any_number(trained)

    def taking(self, trained: Params) -> None:
        """Refuse a step of the optimiser that comes before `backward`, or twice for one batch.

        Raises:
            LoopError: if the gradients are not filled yet or were set to 0, or if the optimiser
                has already taken this step.
        """
        if self.stage in ("between", "drawn"):
            raise LoopError(
                "optimizer.step() came before session.backward(batch), so .grad has no gradient "
                f"of this batch; for every batch call: {CALLS}"
            )
        if self.stage == "taken":
            raise LoopError(
                f"optimizer.step() was called twice in step {self.step}; for every batch call once "
                f"each: {CALLS}"
            )
        gone = any(param.grad is None for param in trained.values())
        # Zeros need a pass to be found, so only the first step of an experience is checked.
        if gone or (self._moving and not _any_number(trained)):
            raise LoopError(
                "the gradients were zeroed between session.backward(batch) and optimizer.step(); "
                "remove zero_grad(), because session.backward() replaces old gradients"
            )
        self._moving = False

    def taken(self) -> None:
        """Record that the optimiser took its step."""
        self.stage = "taken"

    def end(self) -> None:
        """End the step.

        Raises:
            LoopError: if no step is open, or if one of the earlier calls is missing.
        """
        if self.stage == "between":
            raise LoopError(
                "session.after_step() was called outside a step; call it once for every batch, "
                "after optimizer.step()"
            )
        if self.stage == "drawn" or (self._watched and self.stage == "filled"):
            missing = "session.backward(batch)" if self.stage == "drawn" else "optimizer.step()"
            raise LoopError(
                f"session.after_step() came before {missing} in step {self.step}; for every batch "
                f"call, on the session's own optimizer: {CALLS}"
            )
        self.reset()

    def require_ended(self) -> None:
        """Refuse the next batch if the current step has not ended.

        Raises:
            LoopError: names the missing calls.
        """
        if self.stage != "between":
            raise LoopError(
                f"step {self.step} was not ended by session.after_step(); for every batch call: "
                f"{CALLS}"
            )

    def reset(self) -> None:
        """End the current step without any check."""
        self.stage = "between"
        self._rows = None
        self._given = None

    @contextmanager
    def watching(self, optimizer: Optimizer, trained: Params) -> Iterator[None]:
        """Context manager that checks the steps of an optimiser.

        Args:
            optimizer: optimiser of the user.
            trained: parameters that the experience trains.
        """
        refuse_other_parameters(optimizer, trained)
        handles = [
            optimizer.register_step_pre_hook(lambda *_: self.taking(trained)),
            optimizer.register_step_post_hook(lambda *_: self.taken()),
        ]
        self._watched = True
        self._moving = None
        try:
            yield
        finally:
            self._watched = False
            self.allow_accumulation()
            for handle in handles:
                handle.remove()

    def refuse_accumulation(self, trained: Params) -> None:
        """From now on, refuse code that adds to `.grad` in a checked loop.

        This starts after the guard's tests, because under privacy no hook may run between rows and
        losses during these tests.
        """
        if self._watched:
            self._hooks = [
                value.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    _refuse_accumulated
                )
                for value in trained.values()
            ]

    def allow_accumulation(self) -> None:
        """End the effect of `refuse_accumulation`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def refuse_other_parameters(optimizer: Optimizer, trained: Params) -> None:
    """Refuse an optimiser that does not have all trained parameters.

    Raises:
        ConfigError: names the first missing parameter.
    """
    held = {id(value) for group in optimizer.param_groups for value in group["params"]}
    lacking = [name for name, value in trained.items() if id(value) not in held]
    if lacking:
        raise ConfigError.of(
            "optimizer",
            f"one without {lacking[0]} ({len(lacking)} of {len(trained)} trained parameters)",
            "an optimiser of the session's model, such as torch.optim.SGD(model.parameters(), "
            "lr=0.1)",
        )


def _any_number(trained: Params) -> bool:
    """Return True if a gradient has a value other than 0."""
    return any(param.grad is not None and bool(param.grad.any()) for param in trained.values())


def _refuse_accumulated(_: Tensor) -> None:
    raise LoopError(
        "loss.backward() added to .grad inside the session's loop, without the strategy and the "
        "privacy rules; call only session.backward(batch), and put an additional loss into a "
        "Strategy"
    )
