"""Fixtures of the checks: a small stream, a small model, and a learner in the middle of a run."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from perdure.contract.context import Context, spec_of
from perdure.contract.forward import Forward
from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.data.datasets.base import Dataset
from perdure.data.experience import Stream
from perdure.data.records import Batch, Records
from perdure.data.scenarios import split
from perdure.errors import ConformanceError
from perdure.learner.learner import Callback, Learner
from perdure.models.classifiers import mlp
from perdure.privacy.settings import Privacy
from perdure.testing.recording_curator import Question, RecordingCurator
from perdure.types import Params, Scenario

EXPERIENCES = 3
CLASSES = 6
PER_CLASS = 6
FEATURES = 4
STEPS = 2
BLOCKS = 2
BATCH = 6
CLIP_NORM = 0.5
NOISE = 0.01
"""Noise variance that the checks pass to the hook `after_step`."""
SIMULATED = Privacy(noise_multiplier=1.0, clip_norm=CLIP_NORM, seed=0)


class NotApplicable(Exception):  # noqa: N818  # it is none of the errors that a user meets
    """Raised by a check that does not apply to a strategy; the message is the reason."""


def require(ok: bool, found: str, *, allowed: str, fix: str) -> None:
    """Raise an error that describes a fault, unless `ok` is True.

    Raises:
        ConformanceError: says what was found, what is allowed and how to fix it.
    """
    if not ok:
        raise ConformanceError(f"{found}; allowed: {allowed}; {fix}")


def small_stream(scenario: Scenario) -> Stream:
    """Build a stream of three experiences with two classes each, which a linear model can separate.

    There are six training records per class.
    """
    rng = torch.Generator().manual_seed(0)
    centres = torch.rand(CLASSES, FEATURES, generator=rng)

    def records(per_class: int, first: int) -> Records:
        labels = torch.arange(CLASSES).repeat(per_class)
        inputs = centres[labels] + 0.1 * torch.randn(len(labels), FEATURES, generator=rng)
        return Records(
            inputs=inputs.clamp(0, 1), labels=labels, ids=first + torch.arange(len(labels))
        )

    data = Dataset(
        name="small",
        train=records(PER_CLASS, 0),
        test=records(2, 1000),
        num_classes=CLASSES,
        input_shape=(FEATURES,),
    )
    return split(data, scenario=scenario, experiences=EXPERIENCES)


def other_records(stream: Stream) -> Stream:
    """Build a stream with the same public facts and other records.

    Inputs differ, labels have another order, and one record is missing.
    """

    def other(records: Records) -> Records:
        return replace(
            records,
            inputs=1 - records.inputs[1:],
            labels=records.labels.flip(0)[1:],
            ids=records.ids[1:],
            declared_size=records.declared_size,
        )

    return replace(stream, experiences=tuple(replace(e, train=other(e.train)) for e in stream))


def run(learner: Learner, stream: Stream) -> None:
    """Train a prepared learner from its position to the end of the stream.

    A row of accuracies is appended to `learner.matrix` at the end of every stage.
    """
    for index in range(learner.position.experience, len(stream)):
        learner.begin(index)
        for block in learner.training.remaining_blocks(
            learner.position.experience, learner.position.step
        ):
            learner.train(block)
        learner.finish()
        if learner.is_measured(index):
            learner.measure()


Builder = Callable[[Stream], nn.Module]
"""Function that makes a model for a stream; every call makes the same one."""


@dataclass(kw_only=True)
class StrategyFixture:
    """Unused copies of a strategy for the checks, and learners for them.

    Args:
        strategy: an instance, which is copied before anything runs.
        scenario: scenario of the stream.
        device: device of models and records.
        model: function from the stream to a model; None for the strategy's own small model, or for
            a small perceptron if it has none.
    """

    strategy: Strategy
    scenario: Scenario
    device: str = "cpu"
    model: Builder | None = None
    stream: Stream = field(init=False)

    def __post_init__(self) -> None:
        self.strategy = copy.deepcopy(self.strategy)
        self.stream = small_stream(self.scenario)

    @property
    def name(self) -> str:
        """Name of the strategy, for messages."""
        return self.strategy.name

    def fresh(self) -> Strategy:
        """Return a copy of the strategy in its initial state."""
        return copy.deepcopy(self.strategy)

    def build(self) -> nn.Module:
        """Build a small model; every call builds the same one."""
        if self.model:
            return self.model(self.stream)
        inputs = self.stream.input_shape
        classes = self.stream.num_classes
        plain = mlp(input_shape=inputs, num_classes=classes, hidden=(5,), seed=1, activation="tanh")
        own = self.fresh().small_model(input_shape=inputs, num_classes=classes)
        return plain if own is None else own

    def learner(
        self, privacy: Privacy | None = None, callbacks: Sequence[Callback] = ()
    ) -> Learner:
        """Make a learner of a small model; every call makes an equal one.

        Args:
            privacy: privacy settings; None for none.
        """
        return Learner(
            model=self.build(),
            strategy=self.fresh(),
            iterations=STEPS,
            blocks=BLOCKS,
            batch_size=BATCH,
            optimizer=partial(torch.optim.SGD, lr=0.2, momentum=0.5),
            device=self.device,
            privacy=privacy,
            callbacks=callbacks,
        )

    def prepared(self, privacy: Privacy | None = None, stream: Stream | None = None) -> Learner:
        """Make a learner that is ready for the first experience."""
        learner = self.learner(privacy)
        learner.prepare(stream or self.stream)
        return learner

    def middle(self, privacy: Privacy | None = None) -> Learner:
        """Make a learner in the middle of its second experience, with filled state and memory."""
        learner = self.prepared(privacy)
        for index, blocks in ((0, BLOCKS), (1, 1)):
            learner.begin(index)
            for number in range(blocks):
                learner.train(learner.training.block(learner.position.experience, number, BLOCKS))
            if index == 0:
                learner.finish()
        return learner


class MidRunFixture:
    """Learner in the middle of its second experience, with arguments for every hook.

    The strategy queries a curator as under privacy, but the results have no noise.

    Attributes:
        batch: all rows that a step may draw, new and stored.
        context: context of the open experience, as in a step with new and stored rows.
        params: copy of the parameters.
        gradient: small random gradient, always the same.
        later: parameters after one step of size 0.1 along the negative gradient.
    """

    def __init__(self, fixture: StrategyFixture) -> None:
        self.fixture = fixture
        self.learner = fixture.middle()
        # evaluation mode: hooks are compared between calls, so dropout must not differ
        self.learner.model.eval()
        self.strategy: Strategy = self.learner.strategy
        self.state: State = self.learner.state
        # copies, because rows of a view refuse writes, and a hook that writes must be reported
        self.batch: Batch = self.learner.session.held.rows.map(torch.clone)
        # as in a step; one half each, so that both kinds of rows have a weight
        share = 0.5 if bool(self.batch.from_memory.any()) else 0.0
        self.context: Context = replace(self.learner.curator.context, memory_share=share)
        self.params: Params = {
            name: value.detach().clone() for name, value in self.learner.params.items()
        }
        rng = torch.Generator().manual_seed(2)
        self.gradient: Params = {
            name: (0.1 * torch.randn(value.shape, generator=rng)).to(value)
            for name, value in self.params.items()
        }
        self.later: Params = {
            name: value - 0.1 * self.gradient[name] for name, value in self.params.items()
        }

    @property
    def forward(self) -> Forward:
        """The model with the parameters `params`."""
        return Forward(self.learner.model, self.params)

    def door(self) -> RecordingCurator:
        """Make a recording curator, which looks private to the strategy and answers exactly."""
        return RecordingCurator(self.learner.curator, clip_norm=CLIP_NORM)

    @cached_property
    def references(self) -> tuple[Params, ...]:
        """Reference gradients that the strategy asks for."""
        return self.strategy.references(self.door().curator, self.learner.params, self.state)

    @cached_property
    def questions(self) -> list[Question]:
        """All queries of the strategy about records, in addition to the gradient of a step."""
        door = self.door()
        self.strategy.references(door.curator, self.learner.params, self.state)
        self.strategy.after_experience(door.curator, self.params, self.state)
        return door.asked

    def calls(self) -> Mapping[str, Callable[[], object]]:
        """Functions that call each hook of the strategy, by the name of the hook."""
        strategy = self.strategy
        state = self.state
        params = self.params
        spec = spec_of(self.learner.model, params, self.fixture.stream)
        return {
            "init": lambda: strategy.init(spec),
            "begin_round": lambda: strategy.begin_round(params, state),
            "losses": lambda: self.losses(self.forward, self.batch),
            "penalty": lambda: strategy.penalty(params, state),
            "references": lambda: strategy.references(
                self.door().curator, self.learner.params, state
            ),
            "project": lambda: strategy.project(self.gradient, self.references, state),
            "after_step": lambda: strategy.after_step(
                params, self.later, self.gradient, state, NOISE
            ),
            "remember": lambda: strategy.remember(self.forward, self.batch, state),
            "after_experience": lambda: strategy.after_experience(
                self.door().curator, params, state
            ),
            "derive": lambda: strategy.derive(state),
            "predict": lambda: strategy.predict(
                self.forward, self.batch.inputs, self.context, state
            ),
        }

    def losses(self, forward: Forward, batch: Batch) -> Tensor:
        """Return (n,) losses of the strategy for a batch."""
        return self.strategy.losses(forward, batch, self.context, self.state)


def tensors_of(answer: object) -> dict[str, Tensor]:
    """Named tensors in the result of a hook, for any type of result."""
    if isinstance(answer, Tensor):
        return {"value": answer.detach()}
    if isinstance(answer, Mapping):
        return {name: value.detach() for name, value in answer.items()}
    if isinstance(answer, tuple):
        return {
            f"{i}.{name}": value
            for i, part in enumerate(answer)
            for name, value in tensors_of(part).items()
        }
    return {}


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """List the names that only one mapping has, or whose tensors differ (see `equal`)."""
    shared = one.keys() & other.keys()
    return sorted(
        (one.keys() ^ other.keys()) | {name for name in shared if not equal(one[name], other[name])}
    )


def equal(one: Tensor, other: Tensor) -> bool:
    """Return True for the same dtype, shape and values; NaN equals NaN."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def copied(tensors: Mapping[str, Tensor]) -> Params:
    """Return detached copies of the tensors."""
    return {name: value.detach().clone() for name, value in tensors.items()}
