"""Predictions of a party's strategy, and the task's metric of them on test records."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perdure.adversarial.base import Attack
from perdure.adversarial.robust_accuracy import robust_accuracy
from perdure.contract.forward import Forward
from perdure.data.experience import Stream
from perdure.data.record_identity import LearntRows
from perdure.data.records import Records
from perdure.errors import ConfigError, PrivacyError
from perdure.learner.model_history import trainings_of
from perdure.learner.party import Party
from perdure.metrics import evaluate
from perdure.utils.chunking import rows_per_pass
from perdure.utils.finite_outputs import finite_outputs
from perdure.utils.modules import evaluating


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictor:
    """Function from inputs (n, ...) to outputs (n, ..., C), with the module that it runs.

    Args:
        answer: the function.
        model: the module, in which an explainer finds layers.
    """

    answer: Callable[[Tensor], Tensor]
    model: nn.Module

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the outputs (n, ..., C)."""
        return self.answer(inputs)


def predictor(party: Party, index: int, *, after: int) -> Predictor:
    """Return a function from inputs (n, ...) to outputs (n, ..., C); puts the model in eval mode.

    Args:
        party: party with model, strategy and state.
        index: index of the experience that the inputs belong to.
        after: index of the experience that was trained last.
    """
    context = party.context(index if party.stream.scenario == "task" else after)
    party.model.eval()
    averages = party.average.values
    forward = Forward(party.model, averages) if averages else party.forward

    def answer(inputs: Tensor) -> Tensor:
        return party.strategy.predict(forward, inputs, context, party.state)

    return Predictor(answer=answer, model=party.model)


def measurements(party: Party, stream: Stream, batch_size: int | None) -> list[float]:
    """Evaluate a party on the test records of every stage, by the metric of the task.

    The modes of the model do not change. An experience in training counts as trained.

    Args:
        party: party with model, strategy and state.
        stream: stream whose test records are used.
        batch_size: number of rows of one pass; None to choose it by the size of a record.

    Raises:
        PrivacyError: for training records of a model that was trained with privacy.
    """
    refuse_learnt(party, stream)
    after = trained_last(party)
    found = []
    with torch.no_grad(), evaluating(party.model):
        for stage in stream.stages:
            # move only the test records: a stream of pieces has thousands of experiences
            test = stage.test.to(party.device)
            predicted = predictor(party, stage.latest(after), after=after)
            found.append(evaluate(stream.task, predicted, test.inputs, test.labels, batch_size))
    return found


def trained_last(party: Party) -> int:
    """Return the index of the experience that was trained last, or is being trained."""
    position = party.position
    return max(0, position.experience - (not position.begun))


def outputs_for(party: Party, inputs: Tensor, experience: int | None) -> Tensor:
    """Return the strategy's outputs, such as logits, for inputs that the user gives.

    The modes of the model do not change.

    Args:
        party: party with model, strategy and state.
        inputs: (n, ...) inputs of the model.
        experience: index of the experience of the inputs on task-incremental streams; None on all
            other streams.

    Returns:
        (n, ..., C) outputs, on the party's device.

    Raises:
        ConfigError: if the experience is missing or not allowed, if inputs have another shape or
            type than the stream's, or if outputs are NaN or infinite.
        PrivacyError: if rows are training records of a model that was trained with privacy.
    """
    after = trained_last(party)
    index = _asked(party.stream, experience, after)
    _check_inputs(party.stream, inputs)
    refuse_learnt_records(party, inputs, "inputs")
    inputs = inputs.to(party.device)
    with torch.no_grad(), evaluating(party.model):
        answer = predictor(party, index, after=after)
        size = rows_per_pass(inputs)
        # one pass for no rows, to learn the width
        starts = range(0, max(1, len(inputs)), size)
        return torch.cat(
            [finite_outputs(answer(inputs[start : start + size]), first=start) for start in starts]
        )


def score_of(party: Party, records: Records, experience: int | None) -> float:
    """Measure a party on records that the user gives, by the metric of the task.

    Guarantee: none for `records`: the number is computed from them as they are, so they must be
    public. Training records of a model that was trained with privacy are refused.

    Args:
        party: party with model, strategy and state.
        records: public records to measure the party on.
        experience: index of the experience of the records on task-incremental streams; None on all
            other streams.

    Returns:
        The metric, such as accuracy in percent.

    Raises:
        ConfigError: if the records have another task, or for the reasons in `outputs_for`.
        PrivacyError: if the model was trained with privacy, and on some of these records.
    """
    if not isinstance(records, Records):
        raise ConfigError.of("records", type(records).__name__, "Records, such as stream[0].test")
    if records.task != party.stream.task:
        raise ConfigError.of("records", records.task, f"records of {party.stream.task}")
    refuse_learnt_records(party, records, "records")
    outputs = outputs_for(party, records.inputs, experience)
    labels = records.labels.to(outputs.device)
    return evaluate(records.task, lambda rows: outputs, records.inputs, labels, max(1, len(labels)))


def robust_score_of(
    party: Party, records: Records, attack: Attack, draws: torch.Generator
) -> float:
    """Measure the accuracy of a party under attack on records of its open experience, in percent.

    Guarantee: none for `records`, as in `score_of`.

    Args:
        party: party in an open experience, with records of one class each.
        records: public records to measure the party on.
        attack: attack on every record.
        draws: generator of the attack's random numbers.

    Raises:
        ConfigError: if the records are outside the bounds of the attack.
        PrivacyError: if the model was trained with privacy, and on some of these records.
    """
    refuse_learnt_records(party, records, "records")
    now = party.position.experience
    rows = records.to(party.device)
    with evaluating(party.model):
        answer = predictor(party, now, after=now)
        return robust_accuracy(answer, rows.inputs, rows.labels, attack, generator=draws)


def _asked(stream: Stream, experience: int | None, after: int) -> int:
    """Return the index of the experience whose classes may be predicted."""
    if stream.scenario != "task":
        if experience is not None:
            raise ConfigError.of(
                "experience",
                experience,
                f"None, because a {stream.scenario}-incremental stream does not tell the "
                "experience of its inputs",
            )
        return after
    if experience is None or not 0 <= experience < len(stream):
        raise ConfigError.of(
            "experience", experience, f"0 to {len(stream) - 1}, the task of the inputs"
        )
    return experience


def _check_inputs(stream: Stream, inputs: object) -> None:
    if not isinstance(inputs, Tensor):
        given = type(inputs).__name__
        raise ConfigError.of("inputs", given, "a tensor, such as torch.as_tensor(inputs)")
    wanted = stream[0].test.inputs
    if inputs.dtype != wanted.dtype or inputs.shape[1:] != wanted.shape[1:] or not inputs.dim():
        shape = ", ".join(map(str, ["n", *wanted.shape[1:]]))
        raise ConfigError.of(
            "inputs",
            f"{tuple(inputs.shape)} in {inputs.dtype}",
            f"shape ({shape}) in {wanted.dtype}, as in the stream",
        )


def refuse_learnt(party: Party, stream: Stream) -> None:
    """Refuse a stream whose test records a model with privacy was trained on.

    Raises:
        PrivacyError: names the stage.
    """
    if not _is_private(party):
        return
    stages = stream.stages
    found = party.compared.find_learnt(_streams(party), [stage.test for stage in stages])
    if found is not None:
        number = next(stage.number for stage in stages if stage.test is found)
        raise _refusal(f"test records of stage {number}")


def refuse_learnt_records(party: Party, records: Records | Tensor, name: str) -> None:
    """Refuse records that a model with privacy was trained on.

    Args:
        party: party with the model.
        records: records, or inputs (n, ...).
        name: name of the records, for the message.

    Raises:
        PrivacyError: if the model was trained with privacy, and on some of these records.
    """
    if not _is_private(party):
        return
    if isinstance(records, Records):
        learnt = party.compared.find_learnt(_streams(party), [records]) is not None
    else:
        learnt = bool(LearntRows(_streams(party)).among(records).any())
    if learnt:
        raise _refusal(name)


def _streams(party: Party) -> tuple[Stream, ...]:
    """Return the streams whose training records a party has."""
    return party.stream, party.training.stream


def _refusal(name: str) -> PrivacyError:
    return PrivacyError(
        f"{name} are training records of a model with privacy, and numbers of private records "
        "are no release; use public test records, or ids that no training record has"
    )


def _is_private(party: Party) -> bool:
    before = trainings_of(party.model)
    return party.privacy is not None or any(each.private or each.entries for each in before)


def filled_matrix(matrix: list[list[float]], *, width: int) -> Tensor:
    """Return the rows as a float64 tensor; rows measured before the stream grew get NaN.

    Args:
        matrix: rows of at most `width` numbers.
        width: number of stages.
    """
    rows = [row + [math.nan] * (width - len(row)) for row in matrix]
    return torch.tensor(rows, dtype=torch.float64)


def is_measured(stream: Stream, index: int, every: int | None) -> bool:
    """Return True if the model is evaluated after experience `index`.

    Args:
        stream: stream that the model learns.
        index: index of the experience.
        every: also evaluate after this many experiences of a stage; None for its end only.
    """
    stage = stream.stage_of(index)
    inside = index - stage.first + 1
    return index == stage.last or (every is not None and inside % every == 0)


def lacks_late_tests(stream: Stream, matrix: list[list[float]]) -> bool:
    """Return True if a stage has test records that were not evaluated after the last stage."""
    last = matrix[-1] if matrix else []
    return any(
        len(stage.test) and math.isnan(found)
        for stage, found in zip(stream.stages, last, strict=False)
    )
