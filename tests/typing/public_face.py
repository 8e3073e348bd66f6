"""Mistakes of users with the classes of `perdure` that a type checker must report."""

from functools import partial
from typing import reveal_type

import torch

from perdure import Learner, Privacy, Session, State, Strategy
from perdure.strategies import Naive

model = torch.nn.Linear(2, 2)
sgd = partial(torch.optim.SGD, lr=0.1)
learner = Learner(model=model, strategy=Naive(), optimizer=sgd, epochs=1)
Learner(model=model, strategy=Naive(), optimizer=sgd, epoch=1)  # E[call-arg]: "epoch"
Learner(model=model, strategy="naive", optimizer=sgd, epochs=1)  # E[arg-type]: "strategy"
learner.fitt(1)  # E[attr-defined]: "fitt"
reveal_type(learner.strategy)  # N: perdure.contract.strategy.Strategy
sgd_of_it = torch.optim.SGD(model.parameters(), lr=0.1)
Session(model=model, strategy=Naive(), stream=1, optimizer=sgd_of_it)  # E[arg-type]: "stream"
Privacy(epsilon="8")  # E[arg-type]: "epsilon"


class Mine(Strategy):
    """A user's strategy, whose hooks are checked too."""

    def init(self, spec: str) -> State:  # E[override]: as "Spec"
        """Lay out nothing."""
        return State()
