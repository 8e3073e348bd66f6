"""Recorder of what is measured once after each stage of a stream, on public test records."""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from perdure.adversarial import Attack, robust_accuracy
from perdure.contract.context import contexts
from perdure.doctor.trace import Trace
from perdure.learner.learner import Learner
from perdure.tasks import SingleLabel
from perdure.utils.modules import evaluating
from perdure.utils.seeding import generator

ROWS = 256
"""Number of public rows of an experience that are measured."""


@dataclass(kw_only=True, eq=False)
class StageRecorder:
    """Measurements after the experiences of a stream.

    Args:
        attack: attack that is tried at the end of the stream; None for none.
        under_attack: accuracies without and with it, if they are known; None to measure them.
    """

    attack: Attack | None = None
    under_attack: tuple[float, float] | None = None
    _learnt: dict[int, float] = field(default_factory=dict)
    _bytes: dict[int, int] = field(default_factory=dict)

    def measured(self, trace: Trace, learner: Learner) -> Trace:
        """Return the trace of an experience that has been evaluated, with its measurements."""
        ended = trace.experience
        stream = learner.stream
        stages = stream.stages
        context = learner.session.context
        number = stream.stage_of(ended).number
        self._learnt[number] = _accuracy_among_own(learner, ended)
        self._bytes[ended] = sum(value.nbytes for value in learner.state.values())
        found = replace(
            trace,
            matrix=learner.matrix if stream.task.metric.higher_is_better else (),
            chances=tuple(100 / max(1, int(context(stage.last).allowed.sum())) for stage in stages),
            taken_by_new=_taken_by_new(learner, ended),
            memory_per_class=_memory_per_class(learner, ended),
            learnt=tuple(self._learnt.get(each, math.nan) for each in range(number + 1)),
            guesses=tuple(100 / max(1, int(_own(learner, stage.last).sum())) for stage in stages),
            state_bytes=tuple(self._bytes[each] for each in sorted(self._bytes)),
            model_bytes=sum(value.nbytes for value in learner.model.state_dict().values()),
        )
        if self.attack is None or ended < len(stream) - 1:
            return found
        return self._under_attack(found, learner)

    def _under_attack(self, trace: Trace, learner: Learner) -> Trace:
        """Add the accuracies with and without the attack, over public records of all stages."""
        assert self.attack is not None
        known = self.under_attack or self._measured_attack(learner, self.attack)
        if known is None:
            return trace
        epsilon = self.attack.epsilon
        radius = max(epsilon) if isinstance(epsilon, tuple) else epsilon
        return replace(
            trace,
            clean=known[0],
            attacked=known[1],
            attack_epsilon=float(radius),
            adversary=learner.adversary,
        )

    def _measured_attack(self, learner: Learner, attack: Attack) -> tuple[float, float] | None:
        """Return the accuracies without and with the attack, in percent; None without classes."""
        tests = [stage.test.take(slice(0, ROWS)) for stage in learner.stream.stages]
        last = len(learner.stream) - 1
        numbers = []
        for stage, test in zip(learner.stream.stages, tests, strict=True):
            if not len(test) or not isinstance(learner.stream.task, SingleLabel):
                continue
            predict = learner.predictor(stage.last, after=last)
            inputs, labels = test.inputs.to(learner.device), test.labels.to(learner.device)
            with torch.no_grad(), evaluating(learner.model):
                right = predict(inputs).argmax(-1) == labels
            draws = generator(0, "doctor", "attack", stage.number)
            under = robust_accuracy(predict, inputs, labels, attack, generator=draws)
            numbers.append((100 * float(right.float().mean()), under))
        if not numbers:
            return None
        clean, attacked = (sum(each) / len(numbers) for each in zip(*numbers, strict=True))
        return clean, attacked


def _own(learner: Learner, ended: int) -> Tensor:
    """Return the classes that may be predicted and that the experience trains, (C,) bool."""
    context = learner.session.context(ended)
    return context.allowed & context.current


def _accuracy_among_own(learner: Learner, ended: int) -> float:
    """Accuracy in percent on the newest public records, among their own classes; NaN without any.

    Records of earlier classes, from memory, take outputs away from new ones, but a model that can
    learn still tells the new classes from each other.
    """
    test = learner.stream[ended].test.take(slice(0, ROWS))
    own = _own(learner, ended)
    if not len(test) or not isinstance(learner.stream.task, SingleLabel) or not bool(own.any()):
        return math.nan
    with torch.no_grad(), evaluating(learner.model):
        outputs = learner.predictor(ended, after=ended)(test.inputs.to(learner.device))
    best = outputs.masked_fill(~own, -math.inf).argmax(-1)
    return 100 * float((best == test.labels.to(learner.device)).float().mean())


def _taken_by_new(learner: Learner, ended: int) -> float | None:
    """Share of public rows of earlier classes that are classified as a class of the newest."""
    stream = learner.stream
    stage = stream.stage_of(ended)
    if stream.scenario != "class" or stage.number == 0:
        return None
    context = contexts(stream, learner.device)
    new = context(ended).current & ~context(stage.first - 1).seen
    earlier = [each.test.inputs[:ROWS] for each in stream.stages[: stage.number]]
    inputs = torch.cat(earlier).to(learner.device)
    if not len(inputs) or not bool(new.any()):
        return None
    with torch.no_grad(), evaluating(learner.model):
        predicted = learner.predictor(ended, after=ended)(inputs).argmax(-1)
    return float(new[predicted].float().mean())


def _memory_per_class(learner: Learner, ended: int) -> float | None:
    """Number of records that memory can hold for each class of each stage so far."""
    stream = learner.stream
    plan = learner.training.of(stream[ended]).memory
    if plan is None:
        return None
    if plan.per_class is not None and learner.privacy is None:
        return float(plan.per_class)
    pairs = {(each.stage, label) for each in stream.upto(ended) for label in each.classes}
    return plan.capacity / max(1, len(pairs))
