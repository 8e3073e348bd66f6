"""Naive: train on, forget on. The lower bound of every comparison.

    loss_i = cross entropy(record i)

State: none. Memory: none. Privacy cost: none beyond the gradient.
"""

from dataclasses import dataclass
from typing import ClassVar

from perdure.contract import Strategy
from perdure.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Naive(Strategy):
    """Plain training on one experience after another (fine-tuning)."""

    tasks: ClassVar[tuple[type[Task], ...]] = (Task,)
