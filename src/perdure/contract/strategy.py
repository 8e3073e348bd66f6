"""The strategy contract: hyper-parameters in a frozen dataclass, memory in an explicit state.

Read `Strategy` for the hooks, `strategies/ewc.py` for a complete example, and the README for how to
add one.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from perdure.contract.context import MASKED, Context, Spec
from perdure.contract.forward import Forward, cross_entropy
from perdure.contract.plan import Plan, PrivacyCost
from perdure.contract.state import State
from perdure.data.records import Batch
from perdure.types import Params

if TYPE_CHECKING:
    from perdure.contract.curator import Curator
    from perdure.data.experience import Experience


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How forgetting is fought. Subclass it as a frozen dataclass and override the hooks you need.

    A strategy holds hyper-parameters only. What it remembers is the `State` handed in and out;
    records are reached only through the curator, in `references` and `after_experience`.

    Class attributes:
        privacy_cost: what it asks of private data beyond the gradient (see `PrivacyCost`).
        couples_records: True where the loss of one row depends on other rows; refused under
            differential privacy.
        not_vmappable_because: reason why the hooks cannot run under `torch.func.vmap`; None where
            they can.
    """

    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost()
    couples_records: ClassVar[bool] = False
    not_vmappable_because: ClassVar[str | None] = None

    @property
    def name(self) -> str:
        """The strategy's name in tables."""
        return type(self).__name__

    def small_model(self, *, input_shape: tuple[int, ...], num_classes: int) -> nn.Module | None:
        """A small model that it can work on, the same every time.

        None where any classifier will do.

        Checks and lists use it. A strategy that needs more of a model refuses others in `init`.
        """
        return None

    def init(self, spec: Spec) -> State:
        """Lay out the state; called once, before the first experience."""
        return State()

    def plan(self, experience: "Experience") -> Plan:
        """Say what the experience is trained on, from public facts only."""
        return Plan()

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """(n,) one loss per row; row i depends on row i, parameters, state and context only."""
        return cross_entropy(forward, batch, context)

    def penalty(self, params: Params, state: State) -> Tensor | None:
        """Scalar added to the mean loss; touches no data.

        Args:
            params: all of the model's; its gradient is taken by those that the experience trains.
        """
        return None

    def references(self, curator: "Curator", params: Params, state: State) -> tuple[Params, ...]:
        """Released reference gradients for `project` (A-GEM, GEM)."""
        return ()

    def project(self, gradient: Params, references: tuple[Params, ...], state: State) -> Params:
        """Change the released gradient; touches no data."""
        return gradient

    def after_step(
        self,
        before: Params,
        after: Params,
        gradient: Params,
        state: State,
        noise_variance: float = 0.0,
    ) -> State:
        """Follow the training path.

        Args:
            gradient: the released one, before penalty and projection.
            noise_variance: of the noise in every coordinate of it; public, 0 without privacy.
        """
        return state

    def remember(self, forward: Forward, batch: Batch, state: State) -> dict[str, Tensor]:
        """What memory stores beside each row, name to (n, ...).

        Goes to the curator, never to the state.

        Row i depends on row i, parameters and state only. Stored rows come back with it in
        `batch.stored`; in rows that were not stored, and where nothing was stored yet, it is zero
        or missing.
        """
        return {}

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Consolidate at the final (in a federation: global) parameters; may ask for releases."""
        return state

    def derive(self, state: State) -> State:
        """What follows from the state alone, such as a solved head; free.

        Called after `after_experience`, and again where the states of clients were combined. Write
        to names that are declared `local` only.
        """
        return state

    def predict(self, forward: Forward, x: Tensor, context: Context, state: State) -> Tensor:
        """(n, C) logits, masked to the classes that may be predicted."""
        return torch.where(context.allowed, forward(x), MASKED)

    @classmethod
    def overrides(cls, hook: str) -> bool:
        """Whether the class changes `hook`; the loop skips what nobody overrides."""
        return getattr(cls, hook) is not getattr(Strategy, hook)

    def uses(self, hook: str) -> bool:
        """Whether this strategy changes `hook`."""
        return self.overrides(hook)
