"""What a learner refuses.

Outputs that do not fit, a ledger begun anew, no state, numbers that ran away.
"""

import torch
from torch import nn

from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.data.experience import Stream
from perdure.errors import ConfigError, PrivacyError, RunawayError, StrategyError
from perdure.learner.checkpoint import Position
from perdure.types import Params
from perdure.utils.modules import evaluating


def refuse_outputs(model: nn.Module, stream: Stream) -> None:
    """Refuse a model whose outputs are not one for every class; it is shown one row of zeros."""
    row = torch.zeros_like(stream[0].train.inputs[:1])
    with torch.no_grad(), evaluating(model):
        shape = tuple(model(row).shape) if len(row) else (1, stream.num_classes)
    if shape != (1, stream.num_classes):
        given = shape[1] if len(shape) == 2 else shape
        raise ConfigError.of(
            "outputs of the model", given, f"{stream.num_classes}: one for every class"
        )


def refuse_second_ledger(position: Position) -> None:
    """Refuse to begin a ledger anew for a model that private records have trained already."""
    if position != Position():
        raise PrivacyError(
            "this Learner has spent on this model; make a new one of both, give it a folder, or go "
            "on with warm_start=True, which carries over what was spent"
        )


def require_state(hook: str, strategy: Strategy, answer: object) -> State:
    """The answer of a hook that has to return a state."""
    if not isinstance(answer, State):
        given = f"{hook}() of {strategy.name} returned {answer!r}"
        raise StrategyError(f"{given}; allowed: a State; end it with return state.replace(...)")
    return answer


def refuse_runaway(params: Params, strategy: Strategy, experience: int) -> None:
    """Refuse to go on where training ran away.

    NaN predicts class 0, which looks like an accuracy.
    """
    lost = [name for name, value in params.items() if not bool(value.isfinite().all())]
    if lost:
        raise RunawayError(
            f"{strategy.name}: {', '.join(lost[:2])} is NaN or infinite at the end of "
            f"experience {experience}; "
            "lower the learning rate or the strength of the strategy"
        )
