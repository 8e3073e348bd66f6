from functools import partial

import pytest
import torch

from perdure.contract.context import Spec
from perdure.contract.plan import Plan
from perdure.errors import ConfigError
from perdure.learner.learner import Learner
from perdure.strategies import SI, Naive
from perdure.strategies.si import add_progress


class Path:
    """A run with every step recorded: parameters before and after, and the released gradient."""

    def __init__(self, strategy, stream, model, **options):
        self.steps = [[], []]
        self.ends = []
        self.states = []
        self.start = {name: value.detach().clone() for name, value in model.named_parameters()}
        options = {
            "optimizer": partial(torch.optim.SGD, lr=0.2),
            "iterations": 6,
            "batch_size": 8,
        } | options
        learner = Learner(model=model, strategy=strategy, callbacks=[self._look], **options)
        learner.prepare(stream)
        ask = learner.curator.gradient

        def spy(*arguments):
            self._released = {name: value.clone() for name, value in ask(*arguments).items()}
            return dict(self._released)

        learner.curator.gradient = spy
        for index in range(len(stream)):
            learner.begin(index)
            self._before = self._now(learner)
            learner.train(range(learner.training.steps(index)))
            learner.finish()

    @staticmethod
    def _now(learner):
        return {name: value.detach().clone() for name, value in learner.model.named_parameters()}

    def _look(self, point, learner):
        if point == "step.done":
            after = self._now(learner)
            self.steps[learner.position.experience].append((self._before, after, self._released))
            self._before = after
        if point == "experience.end":
            self.ends.append(self._now(learner))
            self.states.append(learner.state)

    def importance(self, name, damping, experiences=2):
        """Return the importance by hand, from the recorded steps."""
        total = 0.0
        anchor = self.start[name]
        for steps, end in list(zip(self.steps, self.ends, strict=True))[:experiences]:
            won = sum(
                -gradient[name] * (after[name] - before[name]) for before, after, gradient in steps
            )
            total = total + won / ((end[name] - anchor) ** 2 + damping)
            anchor = end[name]
        return total


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.2),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.02),
}


@pytest.mark.reference
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_si_importance_is_path_integral_over_squared_distance(toy_stream, toy_model, optimizer):
    """This holds for every optimiser, because the path is that of the parameters."""
    stream = toy_stream()
    run = Path(
        SI(strength=0.5, damping=0.01), stream, toy_model(stream), optimizer=OPTIMIZERS[optimizer]
    )
    assert [len(steps) for steps in run.steps] == [6, 6]
    for experiences, state in zip((1, 2), run.states, strict=True):
        for name in run.start:
            expected = run.importance(name, 0.01, experiences)
            torch.testing.assert_close(state[f"importance/{name}"], expected, rtol=1e-4, atol=1e-6)
            assert float(expected.max()) > 0 and not state[f"path/{name}"].any()
            assert torch.equal(state[f"anchor/{name}"], run.ends[experiences - 1][name])


def test_the_si_path_integral_excludes_the_penalty_gradient(toy_stream, toy_model):
    """A very strong penalty moves the parameters, but is not in the path as a gradient."""
    stream = toy_stream()
    run = Path(SI(strength=1e-3), stream, toy_model(stream))
    before, after, gradient = run.steps[1][3]
    strategy = SI(strength=1e3)
    state = run.states[0]
    leaves = {name: value.clone().requires_grad_() for name, value in before.items()}
    pull = torch.autograd.grad(strategy.penalty(leaves, state), list(leaves.values()))
    assert max(float(value.abs().max()) for value in pull) > 1
    moved = strategy.after_step(before, after, gradient, state)
    for name in before:
        torch.testing.assert_close(
            moved[f"path/{name}"], -gradient[name] * (after[name] - before[name])
        )


def test_the_si_penalty_equals_its_formula_and_is_never_below_0():
    spec = Spec(
        params={"w": torch.tensor([1.0, 2.0])},
        num_classes=2,
        num_experiences=2,
        feature_size=1,
        scenario="class",
    )
    strategy = SI(strength=3.0)
    state = strategy.init(spec).replace({"importance/w": torch.tensor([0.5, -4.0])})
    assert strategy.penalty({"w": torch.tensor([2.0, 5.0])}, state).item() == pytest.approx(
        3.0 * 0.5 * 1.0
    )
    assert float(strategy.penalty({"w": torch.tensor([9.0, 9.0])}, strategy.init(spec))) == 0.0
    assert {name.partition("/")[0]: rule for name, rule in state.rules.items()} == {
        "importance": "mean",
        "path": "local",
        "anchor": "local",
    }


def test_averaged_si_clients_use_the_mean_of_the_path_integrals():
    """Two clients of sizes 1 and 3 consolidate at the same global parameters."""
    start = {"w": torch.tensor([0.0, 1.0])}
    end = {"w": torch.tensor([0.5, -1.0])}
    spec = Spec(params=start, num_classes=2, num_experiences=2, feature_size=1, scenario="class")
    strategy = SI(strength=1.0, damping=0.2)
    paths = torch.tensor([[0.3, 2.0], [0.1, -0.4]])
    own = [
        strategy.after_experience(None, end, strategy.init(spec).replace({"path/w": path}))
        for path in paths
    ]
    averaged = 0.25 * own[0]["importance/w"] + 0.75 * own[1]["importance/w"]
    path = 0.25 * paths[0] + 0.75 * paths[1]
    torch.testing.assert_close(averaged, path / ((end["w"] - start["w"]) ** 2 + 0.2))


def test_si_gives_untrained_parameters_no_path_integral(toy_stream, toy_model):
    class HeadOnly(SI):
        def plan(self, experience):
            return Plan(trainable=("head",))

    stream = toy_stream()
    state = Path(HeadOnly(strength=0.5), stream, toy_model(stream)).states[1]
    assert not state["importance/body.1.weight"].any() and state["importance/head.weight"].any()


def test_si_changes_important_parameters_less(toy_stream, toy_model):
    def importance_weighted_move(strategy):
        stream = toy_stream()
        run = Path(strategy, stream, toy_model(stream), iterations=60, optimizer=OPTIMIZERS["adam"])
        weights = {name: run.importance(name, 0.1, 1).clamp(min=0) for name in run.start}
        return float(
            sum((weights[n] * (run.ends[1][n] - run.ends[0][n]) ** 2).sum() for n in weights)
        )

    assert importance_weighted_move(SI(strength=5.0)) < 0.2 * importance_weighted_move(Naive())


# --------------------------------------------------------------------------- noise on the path


def progress(before, after, gradient, noise_variance=0.0):
    path = torch.zeros_like(before)
    add_progress(path, before, after, gradient, noise_variance)
    return path


def noisy_walk(optimizer, variance, told, steps=400):
    """Return the path of a walk on a slope of 0.1 in every second coordinate, with noise of
    `variance` on the gradient.
    """
    place = torch.Generator().manual_seed(5)
    point = torch.zeros(2000, requires_grad=True)
    slope = 0.1 * (torch.arange(2000) % 2)
    total = torch.zeros(2000)
    optimizer = optimizer([point])
    for _ in range(steps):
        before = point.detach().clone()
        gradient = slope + variance**0.5 * torch.randn(2000, generator=place)
        point.grad = gradient.clone()
        optimizer.step()
        total += progress(before, point.detach(), gradient, told)
    return total[::2], total[1::2]


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_private_si_subtracts_known_noise_from_the_path_integral(optimizer):
    """The mean over 1,000 coordinates and 400 steps of r v (chi-squared) has a standard error of
    0.2 %.
    """
    make = OPTIMIZERS[optimizer]
    rate = {"sgd": 0.2, "momentum": 0.1}[optimizer]
    variance = 0.04
    flat, _ = noisy_walk(make, variance, 0.0)
    of_noise = 400 * rate * variance
    # what the bias is when nobody takes it off
    assert float(flat.mean()) == pytest.approx(of_noise, rel=0.03)
    flat, slope = noisy_walk(make, variance, variance)
    assert float(slope.mean()) > 0
    if optimizer == "sgd":
        assert abs(float(flat.mean())) < 0.01 * of_noise
        assert float(slope.mean()) == pytest.approx(400 * rate * 0.01, rel=0.05)
    else:  # what past steps have of the slope moves along today's, so the rate is read as too high
        assert abs(float(flat.mean())) < of_noise


def test_si_without_noise_subtracts_nothing_from_the_integral():
    before, after, gradient = (
        torch.tensor(value) for value in ([1.0, 2.0], [0.5, 3.0], [2.0, 0.5])
    )
    assert progress(before, after, gradient).tolist() == [1.0, -0.5]


def test_si_subtracts_noise_only_for_steps_along_the_gradient():
    before = torch.zeros(2)
    after = torch.ones(2)
    assert progress(before, after, torch.ones(2), 0.5).tolist() == [-1.0, -1.0]
    assert progress(before, after, torch.zeros(2), 0.5).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1.0}, "si.strength = -1.0"),
        ({"strength": float("nan")}, "si.strength = nan"),
        ({"strength": 1.0, "damping": 0.0}, "si.damping = 0.0"),
        ({"strength": 1.0, "damping": float("inf")}, "si.damping = inf"),
    ],
)
def test_si_refuses_invalid_options(options, message):
    with pytest.raises(ConfigError, match=message):
        SI(**options)
