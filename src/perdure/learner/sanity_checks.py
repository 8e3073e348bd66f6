"""Checks of a learner before and after training.

They refuse outputs that do not fit, a second ledger, a missing state, and values that are NaN.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from perdure.adversarial.base import Attack
from perdure.adversarial.robust_accuracy import refuse_outside
from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.data.augmentation import Views
from perdure.data.experience import Stream
from perdure.data.records import Batch
from perdure.errors import ConfigError, PerdureError, PrivacyError, StrategyError
from perdure.learner.checkpoint import Position
from perdure.models.wrapped import outputs_in
from perdure.planning.training_plan import TrainingPlan
from perdure.tasks import SingleLabel
from perdure.utils.modules import evaluating

Given = ParamSpec("Given")
Answer = TypeVar("Answer")

ONE_ROW = "Expected more than 1 value per channel"
"""Beginning of the message of torch if BatchNorm gets one value for each channel."""


def refuse_misfits(
    model: nn.Module,
    training: TrainingPlan,
    stream: Stream,
    adversary: Attack | None,
    views: Views | None,
) -> None:
    """Refuse a model, stream, strategy, attack or views that do not fit each other, before a run.

    Args:
        model: model, which runs on two rows of zeros.
        training: plan of the run; the strategy is asked for its plan of experiences with one class.
        stream: stream of `training`, on the model's device.
        adversary: attack on every batch, or None.
        views: views of every record, or None.

    Raises:
        ConfigError: if the model fails on rows or views, or does not have one output per class, or
            if an experience has nothing to learn.
        StrategyError: if the strategy refuses an experience.
    """
    refuse_attack(adversary, stream, private=training.privacy is not None)
    refuse_trivial(training)
    refuse_outputs(model, stream, trained=training.of(stream[0]).train)
    if views is not None:
        _refuse_views(views, model, stream)


def refuse_outputs(model: nn.Module, stream: Stream, *, trained: bool) -> None:
    """Refuse a model that fails on a stream's rows, or does not have the outputs of the task.

    The model runs on two rows of zeros.

    Args:
        model: model in any mode.
        stream: stream whose rows have the right shape.
        trained: True if the parameters of the model are trained by gradients.
    """
    rows = torch.zeros_like(stream[0].train.inputs[:2])
    if not len(rows):
        return
    given = f"{len(rows)} rows of {tuple(rows.shape[1:])} in {str(rows.dtype)[6:]}"
    with torch.enable_grad(), evaluating(model):
        try:
            answer: object = model(rows)
        except PerdureError:
            raise
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"the model fails on {given}, as the stream's records are: {reason}; use a first "
                "layer that fits these inputs, or convert the records, as inputs.float(), images "
                "of bytes by inputs.float() / 255; perdure.data.from_arrays does so"
            ) from error
    if not isinstance(answer, torch.Tensor):
        found = outputs_in(answer)
        part = "logits" if "logits" in found or not found else found[0]
        raise ConfigError.of(
            "output of the model",
            type(answer).__name__,
            "one tensor (rows, classes); return that, or give "
            f"perdure.models.wrap(model, output={part!r})",
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
    learns = any(value.requires_grad for value in model.parameters())
    if trained and learns and not answer.requires_grad:
        raise ConfigError(
            "outputs of the model do not depend on its parameters, so that nothing would be "
            "learnt; allowed: a forward pass without torch.no_grad(), inference_mode() and detach()"
        )


def _refuse_views(views: Views, model: nn.Module, stream: Stream) -> None:
    """Refuse views that do not run on each record alone, or on which the model fails."""
    records = stream[0].train
    inputs = torch.zeros_like(records.inputs[:2])
    if not len(inputs):
        return
    zeros = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
    batch = Batch(
        inputs=inputs,
        labels=torch.zeros_like(records.labels[:2]),
        ids=zeros,
        tasks=zeros,
        from_memory=zeros > 0,
        valid=zeros == 0,
    )
    changed = views.attach(batch, 0).stored.values()
    with torch.no_grad(), evaluating(model):
        for view in changed:
            try:
                model(view)
            except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise ConfigError(
                    f"the model fails on a view of shape {tuple(view.shape[1:])} in "
                    f"{str(view.dtype)[6:]} of a record of shape {tuple(inputs.shape[1:])}: "
                    f"{reason}; write views.change so that it keeps shape and dtype"
                ) from error


def refuse_trivial(training: TrainingPlan) -> None:
    """Refuse a stream that has nothing to learn, before training.

    The strategy may refuse an experience of one class too, when it makes its plan.

    Raises:
        ConfigError: if an experience has only one class, so that every prediction is right.
    """
    stream = training.stream
    alone = "and the loss is always 0; give every experience 2 classes or more"
    for experience in stream if isinstance(stream.task, SingleLabel) else ():
        if len(set(experience.classes)) != 1:
            continue
        trains = training.of(experience).train
        if trains and (stream.scenario == "task" or stream.num_classes == 1):
            raise ConfigError(
                f"experience {experience.index} of {stream.name} has one class, "
                f"{experience.classes[0]}, so every prediction is right, {alone}"
                + (', or scenario="class"' if stream.num_classes > 1 else "")
            )


def refuse_attack(adversary: Attack | None, stream: Stream, *, private: bool) -> None:
    """Refuse an attack that does not fit the inputs, before training.

    The declared domain decides, or else training records, which under privacy are not looked at:
    there the public test records do.

    Args:
        adversary: attack on every batch, or None.
        stream: stream of the training.
        private: True if training records are private.

    Raises:
        ConfigError: if inputs cannot change by a small amount, as tokens, if a list of epsilons or
            bounds does not have one number per feature, or if inputs are outside the bounds of the
            attack, which would then hardly change them.
    """
    if adversary is None:
        return
    dtype = stream[0].train.inputs.dtype
    if not dtype.is_floating_point:
        allowed = f"None: inputs are {dtype}, but an attack needs floating-point inputs"
        raise ConfigError.of("adversary", adversary, allowed)
    adversary.refuse_shape(stream[0].test.inputs)
    for experience in stream:
        domain = experience.train.domain
        if domain is not None and domain.range is not None:
            corners = torch.tensor(domain.range, dtype=dtype).view(2, *[1] * len(domain.shape))
            refuse_outside(corners.expand(2, *domain.shape), adversary, "adversary.bounds")
        else:
            rows = experience.test if private else experience.train
            refuse_outside(rows.inputs, adversary, "adversary.bounds")


def refuse_second_ledger(position: Position) -> None:
    """Refuse to begin a second ledger for a model that private records have trained already."""
    if position != Position():
        raise PrivacyError(
            "this Learner has already trained this model with privacy, and a new ledger would "
            "forget that cost; make a new Learner and a new model, give the Learner a folder, or "
            "use warm_start=True, which keeps the earlier cost"
        )


def single_rows_refused(call: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """Decorate a function to name the cause if BatchNorm gets one row, for example a last batch.

    Raises:
        ConfigError: instead of the `ValueError` of torch.
    """

    @wraps(call)
    def explained(*args: Given.args, **named: Given.kwargs) -> Answer:
        try:
            return call(*args, **named)
        except ValueError as error:
            if ONE_ROW not in str(error):
                raise
            raise ConfigError(
                "a step has one record, of which BatchNorm cannot compute a variance; allowed: two "
                "records or more; give a batch_size that does not leave one record over, or use "
                "another normalisation, such as GroupNorm or LayerNorm"
            ) from error

    return explained


def require_state(hook: str, strategy: Strategy, answer: object) -> State:
    """Return the result of a hook if it is a `State`; refuse any other result."""
    if not isinstance(answer, State):
        given = f"{hook}() of {strategy.name} returned {answer!r}"
        raise StrategyError(
            f"{given}; allowed: a State; end the hook with return state.replace(...)"
        )
    return answer
