"""The training loop: number of steps, arguments of every hook, and the accuracy matrix."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from helpers.learners import SIMULATED, adam, bits, same_bits
from perdure.contract.combine import Combine
from perdure.contract.plan import Plan
from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.errors import ConfigError, StrategyError
from perdure.learner import POINTS
from perdure.metrics import accuracy
from perdure.strategies import EWC, LwF, Naive, Replay

# --------------------------------------------------------------------------- how long


def test_epochs_and_iterations_set_the_number_of_steps(learner_of, toy_stream):
    stream = toy_stream()
    for options, steps in (({"iterations": 7}, 7), ({"iterations": None, "epochs": 3}, 9)):
        learner = learner_of(**options)
        learner.prepare(stream)
        assert [learner.training.steps(index) for index in range(2)] == [steps, steps]
    ragged = learner_of(iterations=None, epochs=3, batch_size=7)
    ragged.prepare(stream)
    assert ragged.training.steps(0) == 11  # 3 * 24 / 7, rounded up


def test_a_private_epoch_has_1_over_rate_steps(learner_of, toy_stream):
    learner = learner_of(iterations=None, epochs=2, privacy=replace(SIMULATED, sampling_rate=0.15))
    learner.prepare(toy_stream())
    assert learner.training.steps(0) == 14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 1}, "exactly one of epochs and iterations"),
        ({"iterations": None}, "exactly one of epochs and iterations"),
        ({"iterations": 0}, "iterations = 0 is not allowed"),
        ({"blocks": 0}, "blocks = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
    ],
)
def test_the_learner_refuses_invalid_options(learner_of, options, message):
    with pytest.raises(ConfigError, match=message):
        learner_of(**options)


def test_blocks_cover_all_steps_of_an_experience(learner_of, toy_stream):
    learner = learner_of(iterations=7, blocks=3)
    learner.prepare(toy_stream())
    assert learner.training.remaining_blocks(0, 0) == [range(0, 2), range(2, 4), range(4, 7)]
    assert learner.training.remaining_blocks(0, 4) == [range(4, 7)]
    many = learner_of(iterations=2, blocks=5)
    many.prepare(toy_stream())
    assert [step for block in many.training.remaining_blocks(0, 0) for step in block] == [0, 1]


@pytest.mark.parametrize("strategy", [Naive(), EWC(strength=9.0), Replay(memory_size=12)])
def test_the_number_of_blocks_does_not_change_the_result(learner_of, toy_stream, strategy):
    ends = []
    for blocks in (1, 4):
        learner = learner_of(strategy, blocks=blocks)
        learner.fit(toy_stream())
        ends.append(bits(learner.model.state_dict()))
    assert same_bits(*ends)


# --------------------------------------------------------------------------- the loop, hook by hook


class Ledger(list):
    """The arguments that the hooks of `Tracing` got."""


HANDED = Ledger()


@dataclass(frozen=True, kw_only=True)
class Tracing(Strategy):
    """A strategy with penalty 3 * sum(theta) and a doubling projection that records its
    arguments.
    """

    def init(self, spec):
        return State().declare("steps", torch.zeros(()), "sum")

    def penalty(self, params, state):
        return 3 * torch.stack([value.sum() for value in params.values()]).sum()

    def references(self, curator, params, state):
        return ({name: torch.full_like(value, 0.5) for name, value in params.items()},)

    def project(self, gradient, references, state):
        HANDED.append(("project", bits(gradient), references))
        return {name: 2 * value for name, value in gradient.items()}

    def after_step(self, before, after, gradient, state, noise_variance=0.0):
        HANDED.append(("after_step", bits(before), bits(after), bits(gradient)))
        return state.replace({"steps": state["steps"] + 1})


@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.SGD, partial(torch.optim.SGD, momentum=0.9, nesterov=True, foreach=True)],
)
def test_hooks_get_the_documented_arguments(learner_of, toy_stream, optimizer):
    HANDED.clear()
    stream = toy_stream()
    losses = []

    def look(point, learner):
        if point == "step.gradient":
            batch = learner.session.held.sample(learner.position.step)
            loss = learner.strategy.losses(
                learner.session.forward, batch, learner.curator.context, learner.state
            ).mean()
            grads = torch.autograd.grad(loss, list(learner.params.values()))
            losses.append(dict(zip(learner.params, grads, strict=True)))

    learner = learner_of(Tracing(), optimizer=partial(optimizer, lr=0.1), callbacks=[look])
    start = bits(dict(learner.model.named_parameters()))
    learner.fit(stream)
    assert (
        float(learner.state["steps"]) == 8
        and [kind for kind, *_ in HANDED] == ["project", "after_step"] * 8
    )
    place = start
    for (_, projected, references), (_, before, after, released), loss in zip(
        HANDED[::2], HANDED[1::2], losses, strict=True
    ):
        assert same_bits(before, place)
        for name, gradient in loss.items():
            torch.testing.assert_close(released[name], gradient)  # before penalty and projection
            torch.testing.assert_close(projected[name], gradient + 3)
            assert references[0][name].unique().tolist() == [0.5]
            if optimizer is torch.optim.SGD:
                torch.testing.assert_close(after[name], before[name] - 0.1 * 2 * (gradient + 3))
        place = after
    assert same_bits(place, bits(dict(learner.model.named_parameters())))


class Tied(Strategy):
    def plan(self, experience):
        return Plan(trainable=("head.",))


class Tying(Tied):
    """A penalty that pulls the head towards parameters that are not trained."""

    def penalty(self, params, state):
        return (params["head.weight"] * params["body.1.weight"].mean()).sum()


def test_a_penalty_gets_all_parameters_and_changes_trained_ones(learner_of, toy_stream):
    ends = []
    for strategy in (Tying(), Tied()):
        learner = learner_of(strategy, iterations=1, optimizer=partial(torch.optim.SGD, lr=0.1))
        learner.prepare(toy_stream())
        learner.begin(0)
        learner.train(range(1))
        ends.append(bits(dict(learner.model.named_parameters())))
    pull = ends[0]["body.1.weight"].mean()
    torch.testing.assert_close(ends[0]["head.weight"], ends[1]["head.weight"] - 0.1 * pull)
    assert (
        torch.equal(ends[0]["body.1.weight"], ends[1]["body.1.weight"]) and float(pull.abs()) > 1e-3
    )
    # its digest calls it too
    assert learner_of(Tying(), privacy=SIMULATED).fit(toy_stream()).isfinite().all()


def test_the_penalty_hook_is_skipped_if_the_plan_has_no_penalty(learner_of, toy_stream):
    asked = []

    class Watched(EWC):
        def penalty(self, params, state):
            asked.append(len(asked))
            return super().penalty(params, state)

    stream = toy_stream()
    quiet = Watched(strength=1.0)
    loud = Combine(Watched(strength=1.0), Tying())
    learner_of(quiet, iterations=3, privacy=None).fit(stream)
    assert len(asked) == 3 * (len(stream) - 1)  # not in the first experience
    # of the part that always pulls
    assert [loud.plan(e).applies_penalty for e in stream] == [True] * len(stream)


@pytest.mark.parametrize(("reset", "steps"), [(False, 8), (True, 4)])
def test_reset_optimizer_gives_each_experience_a_new_optimizer(
    learner_of, toy_stream, reset, steps
):
    learner = learner_of(reset_optimizer=reset)
    learner.fit(toy_stream())
    assert {float(entry["step"]) for entry in learner.current_optimizer.state.values()} == {steps}


@dataclass(frozen=True, kw_only=True)
class HeadOnly(Strategy):
    """A strategy that trains all parameters first, and only the head from the second experience
    on.
    """

    prefix: str = "head"

    def plan(self, experience):
        return Plan(trainable=(self.prefix,) if experience.index else None)


@pytest.mark.parametrize("privacy", [None, SIMULATED])
@pytest.mark.parametrize(
    "optimizer", [adam, partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)]
)
def test_untrained_parameters_do_not_change(learner_of, toy_stream, privacy, optimizer):
    moments = []

    def look(point, learner):
        if point in ("experience.begin", "experience.end"):
            moments.append(bits(dict(learner.model.named_parameters())))

    learner_of(HeadOnly(), optimizer=optimizer, privacy=privacy, callbacks=[look]).fit(toy_stream())
    start, first, begin, end = moments
    assert same_bits(first, begin) and not any(
        torch.equal(start[name], first[name]) for name in start
    )
    for name, value in begin.items():
        assert torch.equal(value, end[name]) == name.startswith("body")


def test_a_trainable_prefix_without_parameters_is_refused(learner_of, toy_stream):
    with pytest.raises(
        StrategyError,
        match=r"begin with \('haed',\), but the model has none; allowed: prefixes of body.1.weight",
    ):
        learner_of(HeadOnly(prefix="haed")).fit(toy_stream())


def test_parameters_that_the_user_froze_do_not_change(learner_of, toy_stream, toy_model):
    for strategy in (EWC(strength=10.0), EWC(strength=10.0, fisher="empirical"), LwF()):
        model = toy_model(toy_stream())
        model.body[1].requires_grad_(False)
        before = bits(model.state_dict())
        learner_of(strategy, model=model).fit(toy_stream())
        assert [torch.equal(before[name], value) for name, value in model.state_dict().items()] == [
            True,
            True,
            False,
            False,
        ]


def test_callbacks_are_called_at_every_point_in_order(learner_of, toy_stream, tmp_path):
    seen = []
    learner_of(
        iterations=2, blocks=2, folder=tmp_path, callbacks=[lambda point, _: seen.append(point)]
    ).fit(toy_stream())
    step = ["step.sampled", "step.gradient", "step.done"]
    block = ["block.begin", *step, "block.end", "checkpoint.begin", "checkpoint.end"]
    end = [
        "experience.consolidated",
        "experience.end",
        "evaluated",
        "checkpoint.begin",
        "checkpoint.end",
    ]
    assert seen == ["experience.begin", *block, *block, *end] * 2
    assert set(POINTS) - set(seen) == {
        point for point in POINTS if point.startswith(("ledger.", "noise."))
    }


def test_private_callbacks_are_called_at_ledger_and_noise_points(learner_of, toy_stream):
    seen = []
    learner_of(privacy=SIMULATED, callbacks=[lambda point, _: seen.append(point)]).fit(toy_stream())
    at = seen.index("block.begin")
    assert seen[at + 1 : at + 6] == [
        "ledger.before-append",
        "ledger.appended",
        "ledger.head-written",
        "step.sampled",
        "noise.drawn",
    ]


# --------------------------------------------------------------------------- measuring


@dataclass(frozen=True, kw_only=True)
class Oracle(Strategy):
    """A strategy that predicts from the first input alone, before the mask of the scenario."""

    def predict(self, forward, x, context, state):
        return torch.where(context.allowed, F.one_hot(x[:, 0].long(), 4).float(), -1.0)


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        ("class", [[100.0, 0.0], [100.0, 100.0]]),  # classes not yet seen are never predicted
        ("task", [[100.0, 100.0], [100.0, 100.0]]),
    ],
)
def test_a_perfect_predictor_has_an_accuracy_of_100_percent(
    learner_of, toy_stream, scenario, expected
):
    stream = toy_stream(scenario)
    telling = tuple(
        replace(e, test=replace(e.test, inputs=e.test.labels[:, None].float().expand(-1, 5)))
        for e in stream
    )
    matrix = learner_of(Oracle(), iterations=1).fit(replace(stream, experiences=telling))
    assert matrix.tolist() == expected


@pytest.mark.parametrize(("scenario", "answers"), [("task", 2), ("class", 4), ("domain", 2)])
def test_predictions_are_limited_to_the_classes_of_the_scenario(
    learner_of, toy_stream, toy_model, scenario, answers
):
    stream = toy_stream(scenario)
    learner = learner_of(stream=stream)
    learner.prepare(stream)
    x = torch.rand(200, 5, generator=torch.Generator().manual_seed(0)) * 40 - 20
    late = learner.predictor(0, after=1)(x)
    assert late.shape == (200, stream.num_classes) and int((late > -1e9).all(0).sum()) == answers
    early = learner.predictor(1, after=0)(x)
    shown = torch.nonzero((early > -1e9).all(0)).flatten().tolist()
    assert shown == {"task": [2, 3], "class": [0, 1], "domain": [0, 1]}[scenario]


def test_accuracy_is_in_percent_and_nan_without_records():
    def predict(x):
        return x

    logits = torch.eye(4)
    labels = torch.tensor([0, 1, 2, 0])
    assert accuracy(predict, logits, labels, 3) == 75.0
    assert torch.tensor(accuracy(predict, logits[:0], labels[:0], 3)).isnan()


def test_training_learns_every_kind_of_stream(learner_of, toy_stream):
    for scenario in ("task", "domain", "class"):
        matrix = learner_of(stream=toy_stream(scenario), iterations=80).fit(toy_stream(scenario))
        assert matrix.diagonal().min() > 80
