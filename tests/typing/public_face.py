"""Users' mistakes with the classes of `perdure` that a type checker must see."""

from functools import partial
from typing import reveal_type

import torch

from perdure import Learner, Privacy, State, Strategy
from perdure.strategies import Naive

model = torch.nn.Linear(2, 2)
sgd = partial(torch.optim.SGD, lr=0.1)
learner = Learner(model=model, strategy=Naive(), optimizer=sgd, epochs=1)
Learner(model=model, strategy=Naive(), optimizer=sgd, epoch=1)  # E[call-arg]: "epoch"
Learner(model=model, strategy="naive", optimizer=sgd, epochs=1)  # E[arg-type]: "strategy"
learner.fitt(1)  # E[attr-defined]: "fitt"
reveal_type(learner.strategy)  # N: perdure.contract.strategy.Strategy
Privacy(epsilon="8")  # E[arg-type]: "epsilon"


class Mine(Strategy):
    """A strategy of one's own: its hooks are checked too."""

    def init(self, spec: str) -> State:  # E[override]: as "Spec"
        """Lay out nothing."""
        return State()
