"""Naive: train on each experience without any method against forgetting, as a lower bound.

    loss_i = cross entropy(record i)

State: none. Memory: none. Privacy cost: only the gradient.
"""

from dataclasses import dataclass
from typing import ClassVar

from perdure.contract import Strategy
from perdure.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Naive(Strategy):
    """Train on one experience after another (fine-tuning)."""

    tasks: ClassVar[tuple[type[Task], ...]] = (Task,)
