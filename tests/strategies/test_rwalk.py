from functools import partial

import pytest
import torch

from perdure.contract.context import Spec
from perdure.contract.state import State
from perdure.errors import ConfigError
from perdure.learner.learner import Learner
from perdure.strategies import RWalk
from perdure.strategies.rwalk import scale

DECAY = 0.3
DAMPING = 1e-3
WINDOW = 4


def copied(tensors):
    return {name: value.detach().clone() for name, value in tensors.items()}


class Walk:
    """A run of two experiences of ten steps, with every step and both Fisher matrices recorded."""

    def __init__(self, stream, model):
        self.steps = [[], []]
        self.fishers = []
        self.states = []
        self.ends = []
        self.learner = Learner(
            model=model,
            strategy=RWalk(strength=0.5, window=WINDOW, decay=DECAY, damping=DAMPING),
            optimizer=partial(torch.optim.Adam, lr=0.02),
            iterations=10,
            batch_size=8,
            callbacks=[self._look],
        )
        self.learner.prepare(stream)
        gradient = self.learner.curator.gradient
        release = self.learner.curator.release

        def step(*arguments):
            self._released = copied(gradient(*arguments))
            return dict(self._released)

        def fisher(*arguments, **facts):
            self.fishers.append(
                {name: value / 24 for name, value in release(*arguments, **facts).items()}
            )
            return {name: value * 24 for name, value in self.fishers[-1].items()}

        self.learner.curator.gradient = step
        self.learner.curator.release = fisher
        for index in range(2):
            self.learner.begin(index)
            self._before = copied(self.learner.params)
            self.learner.train(range(10))
            self.learner.finish()

    def _look(self, point, learner):
        if point == "step.done":
            after = copied(learner.params)
            self.steps[learner.position.experience].append((self._before, after, self._released))
            self._before = after
        if point == "experience.end":
            self.states.append(learner.state)
            self.ends.append(copied(learner.params))

    def walked(self, name, experience):
        """Return the sum of the scores of the windows of 4, 4 and 2 steps, by hand."""
        metric = torch.zeros_like(self.ends[0][name])
        metrics = []
        for _, _, gradient in [step for steps in self.steps[: experience + 1] for step in steps]:
            metric = (1 - DECAY) * metric + DECAY * gradient[name] ** 2
            metrics.append(metric)
        total = 0.0
        steps = self.steps[experience]
        for start in range(0, 10, WINDOW):
            window = steps[start : start + WINDOW]
            won = sum(
                -gradient[name] * (after[name] - before[name]) for before, after, gradient in window
            )
            moved = window[-1][1][name] - window[0][0][name]
            at = metrics[10 * experience + min(start + WINDOW, 10) - 1]
            total = total + (won / (0.5 * at * moved**2 + DAMPING)).clamp(min=0)
        return total


@pytest.fixture
def walk(toy_stream, toy_model):
    stream = toy_stream()
    return Walk(stream, toy_model(stream))


@pytest.mark.reference
def test_rwalk_averages_path_scores_with_earlier_scores(walk):
    for name in walk.ends[0]:
        first = walk.walked(name, 0)
        second = walk.walked(name, 1)
        torch.testing.assert_close(walk.states[0][f"score/{name}"], first, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            walk.states[1][f"score/{name}"], (first + second) / 2, rtol=1e-4, atol=1e-5
        )
        assert float(first.max()) > 0 and float(second.max()) > 0


def test_rwalk_scores_change_only_at_the_end_of_a_window():
    params = {"w": torch.tensor([1.0, 2.0])}
    spec = Spec(params=params, num_classes=2, num_experiences=2, feature_size=1, scenario="class")
    strategy = RWalk(strength=1.0, window=2)
    first = strategy.init(spec)
    after = {"w": torch.tensor([0.5, 2.5])}
    gradient = {"w": torch.tensor([1.0, 1.0])}
    within = strategy.after_step(params, after, gradient, first)
    assert within["walked/w"] is first["walked/w"]
    assert within["won/w"].tolist() == [0.5, -0.5] == (-within["moved/w"]).tolist()
    ended = strategy.after_step(after, params, gradient, within)
    assert not ended["won/w"].any() and not ended["moved/w"].any()
    states = {n: torch.stack([within[n], first[n]]) for n in within}

    def step(tensors):
        return dict(strategy.after_step(after, params, gradient, State(tensors, within.rules)))

    both = torch.func.vmap(step)(states)  # one replica ends its window, the other does not
    for name, value in both.items():
        torch.testing.assert_close(value[0], ended[name])
    assert not torch.equal(both["won/w"][1], both["won/w"][0])


@pytest.mark.reference
def test_rwalk_averages_per_record_fisher_with_earlier_fisher(walk, toy_stream):
    for name in walk.ends[0]:
        first, second = (fisher[name] for fisher in walk.fishers)
        torch.testing.assert_close(walk.states[0][f"fisher/{name}"], first)
        torch.testing.assert_close(walk.states[1][f"fisher/{name}"], (first + second) / 2)
    model = walk.learner.model
    records = toy_stream()[1].train
    sums = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for x, y in zip(records.inputs, records.labels, strict=True):
        loss = torch.nn.functional.cross_entropy(model(x[None]), y[None])
        for name, gradient in zip(
            sums, torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            sums[name] += gradient**2 / len(records)
    for name, value in sums.items():
        torch.testing.assert_close(walk.fishers[1][name], value, rtol=1e-4, atol=1e-7)


def test_the_rwalk_penalty_scales_fisher_and_scores_to_at_most_1(walk):
    state = walk.states[1]
    anchor = walk.ends[1]
    at = {name: value + 0.1 for name, value in anchor.items()}
    parts = [
        torch.cat([value.flatten() for value in state.group(group).values()])
        for group in ("fisher", "score")
    ]
    expected = 0.5 * 0.01 * sum((part / part.max()).sum() for part in parts)
    torch.testing.assert_close(
        walk.learner.strategy.penalty(at, state), expected, rtol=1e-4, atol=0
    )


def test_rwalk_resets_the_path_integral_in_every_experience(walk):
    for name in walk.ends[0]:
        assert not any(
            walk.states[1][f"{group}/{name}"].any() for group in ("walked", "won", "moved")
        )
    assert float(walk.states[1]["steps"]) == 0.0 and float(walk.states[1]["past"]) == 1.0


def test_rwalk_recomputes_its_scales_after_averaging(walk):
    strategy = walk.learner.strategy
    state = walk.states[1]
    doubled = state.replace_group(
        "fisher", {n: 2 * value for n, value in state.group("fisher").items()}
    )
    derived = strategy.derive(doubled)
    torch.testing.assert_close(derived["fisher_scale"], state["fisher_scale"] / 2)
    assert torch.equal(derived["score_scale"], state["score_scale"])
    written = [name for name in state if not torch.equal(derived[name], doubled[name])]
    assert written == ["fisher_scale"] and state.rules["fisher_scale"] == "local"
    assert float(scale({"w": torch.zeros(3)})) == 0.0


def test_rwalk_has_no_penalty_in_the_first_experience():
    spec = Spec(
        params={"w": torch.ones(2)},
        num_classes=2,
        num_experiences=2,
        feature_size=1,
        scenario="class",
    )
    strategy = RWalk(strength=3.0)
    state = strategy.derive(strategy.init(spec))
    assert float(strategy.penalty({"w": torch.full((2,), 9.0)}, state)) == 0.0
    assert {name for name, rule in state.rules.items() if rule == "mean"} == {"fisher/w", "score/w"}
    assert "sum" not in state.rules.values()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1.0}, "rwalk.strength = -1.0"),
        ({"strength": float("inf")}, "rwalk.strength = inf"),
        ({"strength": 1.0, "window": 0}, "rwalk.window = 0"),
        ({"strength": 1.0, "decay": 0.0}, "rwalk.decay = 0.0"),
        ({"strength": 1.0, "decay": 1.5}, "rwalk.decay = 1.5"),
        ({"strength": 1.0, "damping": 0.0}, "rwalk.damping = 0.0"),
    ],
)
def test_rwalk_refuses_invalid_options(options, message):
    with pytest.raises(ConfigError, match=message):
        RWalk(**options)
