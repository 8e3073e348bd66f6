"""Naive: train on, forget on. The lower bound of every comparison.

    loss_i = cross entropy(record i)

State: none. Memory: none. Privacy cost: none beyond the gradient.
"""

from dataclasses import dataclass

from perdure.contract import Strategy


@dataclass(frozen=True, kw_only=True)
class Naive(Strategy):
    """Plain training on one experience after another (fine-tuning)."""
