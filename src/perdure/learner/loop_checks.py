"""Order of the calls in a loop over a session: each step is drawn, filled, taken and ended once."""

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
"""Stage of a step: none is open, its rows are drawn, `.grad` is filled, the optimiser took it."""
ROWS = frozenset(field.name for field in fields(Batch))
CALLS = "session.backward(batch), optimizer.step(), session.after_step()"


@dataclass(frozen=True, kw_only=True)
class HiddenBatch:
    """Batch of a private step, whose records only the session may use.

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
    """Stage of the present step of a loop; a call out of order is refused by name."""

    def __init__(self) -> None:
        self.stage: Stage = "between"
        self.step = 0
        self._rows: Batch | None = None
        self._given: Batch | HiddenBatch | None = None
        self._watched = False
        self._moving: bool | None = None
        self._hooks: list[RemovableHandle] = []

    def hand_out(self, rows: Batch, step: int, *, hidden: bool) -> Batch | HiddenBatch:
        """Begin a step; return the batch that the loop is given."""
        self.stage = "drawn"
        self.step = step
        self._rows = rows
        self._given = HiddenBatch(step=step) if hidden else rows
        return self._given

    def rows_of(self, batch: object) -> Batch:
        """Return the rows of the step that `session.backward` is called for.

        Raises:
            LoopError: for another batch, a second call, or a call outside a step.
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
        """Go on: the gradients are in place."""
        self.stage = "filled"
        if self._watched and self._moving is None:
            self._moving = _any_number(trained)

    def taking(self, trained: Params) -> None:
        """Check that the optimiser may take its step now.

        Raises:
            LoopError: before the gradients are filled, after they were zeroed, or for a second
                step.
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
        # Zeros in place cost a pass to see, so the first step of an experience is looked at.
        if gone or (self._moving and not _any_number(trained)):
            raise LoopError(
                "the gradients were zeroed between session.backward(batch) and optimizer.step(); "
                "remove zero_grad(), because session.backward() replaces old gradients"
            )
        self._moving = False

    def taken(self) -> None:
        """Go on: the optimiser took its step."""
        self.stage = "taken"

    def end(self) -> None:
        """End the step.

        Raises:
            LoopError: outside a step, or where one of the calls before was left out.
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
        """Refuse the next batch while the present step is open.

        Raises:
            LoopError: naming the calls.
        """
        if self.stage != "between":
            raise LoopError(
                f"step {self.step} was not ended by session.after_step(); for every batch call: "
                f"{CALLS}"
            )

    def reset(self) -> None:
        """Leave the present step."""
        self.stage = "between"
        self._rows = None
        self._given = None

    @contextmanager
    def watching(self, optimizer: Optimizer, trained: Params) -> Iterator[None]:
        """See the steps of an optimiser while this is open.

        Args:
            optimizer: of the user.
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
        """Refuse whatever adds to `.grad` in a watched loop from now on.

        Not while the guard looks: under privacy no hook may stand on the path of rows to losses.
        """
        if self._watched:
            self._hooks = [
                value.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    _refuse_accumulated
                )
                for value in trained.values()
            ]

    def allow_accumulation(self) -> None:
        """Undo `refuse_accumulation`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def refuse_other_parameters(optimizer: Optimizer, trained: Params) -> None:
    """Refuse an optimiser that lacks a trained parameter.

    Raises:
        ConfigError: naming the first.
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
    """Tell if a gradient has a number other than 0."""
    return any(param.grad is not None and bool(param.grad.any()) for param in trained.values())


def _refuse_accumulated(_: Tensor) -> None:
    raise LoopError(
        "loss.backward() added to .grad inside the session's loop, without the strategy and the "
        "privacy rules; call only session.backward(batch), and put an additional loss into a "
        "Strategy"
    )
