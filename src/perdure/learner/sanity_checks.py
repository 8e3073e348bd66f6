"""Refusals of a learner.

Outputs that do not fit, a ledger begun anew, no state, numbers that ran away.
"""

import torch
from torch import nn

from perdure.adversarial.base import Attack
from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.data.experience import Stream
from perdure.errors import ConfigError, PrivacyError, RunawayError, StrategyError
from perdure.learner.checkpoint import Position
from perdure.types import Params
from perdure.utils.modules import evaluating


def refuse_outputs(model: nn.Module, stream: Stream) -> None:
    """Refuse a model that fails on a stream's rows, or has not the outputs of its task.

    It is shown two rows of zeros.
    """
    rows = torch.zeros_like(stream[0].train.inputs[:2])
    if not len(rows):
        return
    given = f"{len(rows)} rows of {tuple(rows.shape[1:])} in {str(rows.dtype)[6:]}"
    with torch.no_grad(), evaluating(model):
        try:
            answer: object = model(rows)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"the model fails on {given}, as the stream's records are: {reason}; give it a "
                "first layer that fits them, or convert the records, as inputs.float()"
            ) from error
    if not isinstance(answer, torch.Tensor):
        raise ConfigError.of(
            "output of the model", type(answer).__name__, "one tensor (rows, classes); return that"
        )
    shape = tuple(answer.shape)
    width = stream.task.head_width(stream.num_classes)
    allowed = stream.task.output_shape(stream[0].train.labels[:2], width)
    if shape != allowed:
        fits = len(shape) == len(allowed) and shape[:-1] == allowed[:-1]
        raise ConfigError.of(
            "outputs of the model",
            shape[-1] if fits else f"{shape} for {given}",
            f"{width}: one for every class (num_classes=stream.num_classes)"
            + ("" if fits else f", {allowed}, one row for every record"),
        )


def refuse_attack(adversary: Attack | None, stream: Stream) -> None:
    """Refuse an attack on inputs that cannot be moved by a little, such as tokens."""
    dtype = stream[0].train.inputs.dtype
    if adversary is not None and not dtype.is_floating_point:
        allowed = f"None: inputs are {dtype}, and an attack moves floating-point ones"
        raise ConfigError.of("adversary", adversary, allowed)


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
