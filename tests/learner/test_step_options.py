"""Options of the steps: averages, penalties on weights, noise, sharpness-aware gradients.

Each gives the formula of its paper or of torch, enters the fingerprint, and resumes to equal bits.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from helpers.learners import SIMULATED, bits, same_bits
from perdure.errors import ConfigError, RunError
from perdure.learner import EMA, SAM, SWA, Session
from perdure.learner.step_changes import normal_like, scaled, with_gradient_noise
from perdure.models.classifiers import mlp
from perdure.privacy.ledger.merged import read
from perdure.strategies import EWC, Replay

OPTIONS = {
    "averaging": EMA(decay=0.8),
    "averaging from a share on": SWA(start=0.3),
    "sharpness": SAM(rho=0.1),
    "l1": 0.01,
    "l2": 0.1,
    "gradient_noise": 0.01,
    "weight_noise": 0.05,
}
ALL = {"averaging": EMA(decay=0.8), **{name: OPTIONS[name] for name in [*OPTIONS][2:]}}
sgd = partial(torch.optim.SGD, lr=0.1)


class Stop(Exception):  # noqa: N818
    """An exception in place of a power failure."""


def stop_at(number):
    """Return a callback that raises at the beginning of a block, counted from 1."""
    left = [number]

    def callback(point, learner):
        left[0] -= point == "block.begin"
        if left[0] == 0:
            raise Stop

    return callback


def end_of(learner, stream):
    matrix = learner.fit(stream)
    return matrix.tolist(), bits(learner.snapshot().tensors)


# --------------------------------------------------------------------------- all options


@pytest.fixture(scope="module")
def plain_ends():
    """Parameters of a run without options, once without and once with privacy."""
    return {}


@pytest.mark.parametrize(
    ("name", "privacy"), [*((name, None) for name in OPTIONS), ("sharpness", SIMULATED)]
)
def test_each_option_changes_the_training(learner_of, toy_stream, plain_ends, name, privacy):
    def end(**given):
        learner = learner_of(privacy=privacy, **given)
        learner.fit(toy_stream())
        return bits(learner.model.state_dict())

    if privacy not in plain_ends:
        plain_ends[privacy] = end()
    assert not same_bits(plain_ends[privacy], end(**{name.split()[0]: OPTIONS[name]}))


@pytest.mark.parametrize("privacy", [None, SIMULATED])
def test_options_resume_bit_identically(learner_of, toy_stream, tmp_path, privacy):
    run = partial(learner_of, Replay(memory_size=12), blocks=2, privacy=privacy, **ALL)
    whole = end_of(run(), toy_stream())
    for number in (2, 4) if privacy is None else (2,):
        folder = tmp_path / str(number)
        with pytest.raises(Stop):
            run(folder=folder, callbacks=[stop_at(number)]).fit(toy_stream())
        matrix, tensors = end_of(run(folder=folder), toy_stream())
        assert matrix == whole[0] and same_bits(tensors, whole[1])


def test_another_option_is_refused_on_resume(learner_of, toy_stream, tmp_path):
    learner_of(folder=tmp_path, iterations=1, **ALL).fit(toy_stream())
    for name in ALL:
        rest = {each: value for each, value in ALL.items() if each != name}
        with pytest.raises(RunError, match=f"differs in {name}"):
            learner_of(folder=tmp_path, iterations=1, **rest).fit(toy_stream())


def test_options_change_the_digest_of_private_noise(learner_of, toy_stream):
    digests = set()
    for given in ({}, *({name.split()[0]: OPTIONS[name]} for name in OPTIONS)):
        learner = learner_of(privacy=SIMULATED, **given)
        learner.prepare(toy_stream())
        learner.begin(0)
        digests.add(learner.noise_digest())
    assert len(digests) == 1 + len(OPTIONS)


def test_options_cost_no_privacy(learner_of, toy_stream, tmp_path):
    counts = []
    for name, given in (("plain", {}), ("all", ALL)):
        learner_of(privacy=SIMULATED, folder=tmp_path / name, iterations=1, **given).fit(
            toy_stream()
        )
        (part,) = read(tmp_path / name / "ledger.jsonl").parts
        counts.append([(each.steps, each.noise_multiplier) for each in part.account.entries])
    assert counts[0] == counts[1]


def test_a_loop_of_ones_own_gives_the_learners_bits(learner_of, toy_stream, toy_model):
    learner = learner_of(optimizer=sgd, **ALL)
    learner.fit(toy_stream())
    model = toy_model(toy_stream())
    optimizer = sgd(model.parameters())
    session = Session(
        model=model,
        strategy=learner.strategy,
        stream=toy_stream(),
        optimizer=optimizer,
        iterations=4,
        batch_size=8,
        seed=5,
        **ALL,
    )
    for experience in session.stream:
        with session.experience(experience) as batches:
            for batch in batches:
                session.backward(batch)
                optimizer.step()
                session.after_step()
    assert same_bits(bits(model.state_dict()), bits(learner.model.state_dict()))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("l1", -1.0),
        ("l2", math.inf),
        ("gradient_noise", "much"),
        ("weight_noise", -0.1),
        ("averaging", "ema"),
        ("sharpness", 0.05),
    ],
)
def test_wrong_options_are_refused_by_name(learner_of, name, wrong):
    with pytest.raises(ConfigError, match=f"^{name} = .* is not allowed; allowed: "):
        learner_of(**{name: wrong})


@pytest.mark.parametrize(
    ("kind", "name", "wrong"), [(EMA, "decay", 1.0), (SWA, "start", -0.1), (SAM, "rho", 0.0)]
)
def test_wrong_fields_of_options_are_refused(kind, name, wrong):
    with pytest.raises(ConfigError, match=f"{name} = .* is not allowed"):
        kind(**{name: wrong})


# --------------------------------------------------------------------------- averages


@pytest.mark.parametrize(
    ("averaging", "update", "first"),
    [
        (EMA(decay=0.8), get_ema_multi_avg_fn(0.8), 0),
        (SWA(start=0.5), get_swa_multi_avg_fn(), 4),
    ],
)
def test_an_average_equals_that_of_swa_utils(learner_of, toy_stream, averaging, update, first):
    stream = toy_stream()
    averages = []

    def follow(point, learner):
        if point == "experience.begin":
            averages.append(AveragedModel(learner.model, multi_avg_fn=update))
        elif point == "step.done" and learner.position.step > first:
            averages[-1].update_parameters(learner.model)
        elif point == "experience.consolidated":
            ends.append(bits(learner.model.state_dict()))

    ends = []
    learner_of(averaging=averaging, iterations=8, callbacks=[follow]).fit(stream)
    for average, end in zip(averages, ends, strict=True):
        assert same_bits(bits(average.module.state_dict()), end)


def test_a_model_in_training_answers_by_its_average(learner_of, toy_stream):
    stream = toy_stream()
    learner = learner_of(averaging=SWA(start=0.0))
    learner.prepare(stream)
    learner.begin(0)
    learner.train(range(3))
    answer = learner.predict(stream[0].test.inputs)
    trained = learner.model.eval()(stream[0].test.inputs)
    assert not torch.allclose(answer, trained)
    learner.finish()
    assert torch.allclose(answer, learner.predict(stream[0].test.inputs))


def test_strategies_consolidate_at_the_average(learner_of, toy_stream):
    learner = learner_of(EWC(strength=20.0, mode="online"), averaging=EMA(decay=0.9))
    learner.fit(toy_stream())
    anchors = learner.state.group("anchor")
    for name, value in learner.params.items():
        assert torch.allclose(value, anchors[name], atol=1e-6)


def test_running_statistics_are_computed_again_for_an_average(learner_of, toy_stream):
    stream = toy_stream()
    model = mlp(input_shape=(5,), num_classes=4, hidden=(6,), seed=3)
    model.body.insert(2, nn.BatchNorm1d(6))
    learner = learner_of(model=model, averaging=SWA(start=0.5), stream=stream)
    learner.prepare(stream)
    learner.begin(0)
    learner.train(range(4))
    learner.finish()
    entering = learner.model.body[:2](stream[0].train.inputs)
    norm = learner.model.body[2]
    assert torch.allclose(norm.running_mean, entering.mean(0), atol=1e-6)


# --------------------------------------------------------------------------- gradients


def step_of(learner, stream):
    """Return the parameters after one step of plain SGD, and the batch of the step."""
    seen = []
    learner.prepare(stream)
    learner.begin(0)
    for batch in learner.session.steps(range(1), learner.noise_digest):
        learner.session.backward(batch)
        seen.append(batch)
        learner.current_optimizer.step()
        learner.session.after_step()
    return learner.params, seen[0]


def gradient_of(model, params, batch):
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    logits = torch.func.functional_call(model, leaves, batch.inputs)[:, :2]
    found = torch.autograd.grad(F.cross_entropy(logits, batch.labels), [*leaves.values()])
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("name", ["sharpness", "l1", "l2"])
def test_a_step_follows_the_formula_of_its_option(learner_of, toy_stream, name):
    stream = toy_stream()
    learner = learner_of(optimizer=sgd, **{name: OPTIONS[name]})
    start = bits(learner.params)
    ended, batch = step_of(learner, stream)
    gradient = gradient_of(learner.model, start, batch)
    if name == "sharpness":
        norm = torch.cat([value.flatten() for value in gradient.values()]).norm()
        worst = {each: start[each] + 0.1 * gradient[each] / norm for each in start}
        gradient = gradient_of(learner.model, worst, batch)
    added = {"l1": lambda w: 0.01 * w.sign(), "l2": lambda w: 0.1 * w}.get(name, lambda w: 0.0)
    for each, value in start.items():
        expected = value - 0.1 * (gradient[each] + added(value))
        assert torch.allclose(ended[each], expected, atol=1e-6)


def test_l2_equals_weight_decay_of_sgd(learner_of, toy_stream):
    ends = []
    for given in (
        {"l2": 0.1, "optimizer": sgd},
        {"optimizer": partial(sgd, weight_decay=0.1)},
    ):
        learner = learner_of(**given)
        learner.fit(toy_stream())
        ends.append(learner.params)
    assert all(torch.allclose(value, ends[1][name], atol=1e-6) for name, value in ends[0].items())


def test_a_private_ascent_uses_the_release_of_the_step_before(learner_of, toy_stream):
    learner = learner_of(privacy=SIMULATED, sharpness=SAM(rho=0.1))
    learner.prepare(toy_stream())
    learner.begin(0)
    released = []
    learner.callbacks = [
        lambda point, learner: (
            point == "step.gradient" and released.append(bits(learner.session.moves.last))
        )
    ]
    learner.train(range(2))
    assert len(released) == 2 and not same_bits(*released)
    assert same_bits(released[1], bits(learner.session.moves.last))


def test_gradient_noise_has_the_annealed_variance():
    """The variance of 40,000 numbers is within 5 % of its mean but for 1 in 10^11 seeds."""
    zeros = {"weight": torch.zeros(200, 200)}
    for step in (0, 99):
        noisy = with_gradient_noise(zeros, 0.3, step, seed=7)["weight"]
        expected = 0.3 / (1 + step) ** 0.55
        assert abs(float(noisy.var()) / expected - 1) < 0.05
    assert not zeros["weight"].any()


def test_noise_differs_by_step_seed_and_client(learner_of, toy_stream):
    ends = []
    for given in ({"seed": 5}, {"seed": 5}, {"seed": 6}, {"seed": 5, "client": 1}):
        learner = learner_of(weight_noise=0.1, optimizer=sgd, **given)
        learner.prepare(toy_stream())
        session = learner.session
        ends.append(session.seed_of("weight noise", 0))
    assert ends[0] == ends[1] and len(set(ends)) == 3
    one, same, other = (normal_like({"w": torch.zeros(9)}, 1.0, seed)["w"] for seed in (1, 1, 2))
    assert one.equal(same) and not one.equal(other)


def test_a_scaled_gradient_has_the_length_and_zeros_stay():
    length = scaled({"a": torch.ones(3), "b": torch.ones(6)}, 0.6)
    assert torch.allclose(torch.cat([*length.values()]).norm(), torch.tensor(0.6))
    assert not scaled({"a": torch.zeros(3)}, 0.6)["a"].any()


def test_parameters_keep_their_bits_when_a_pass_fails(learner_of, toy_stream):
    def failing(point, learner):
        if point == "step.sampled" and learner.position.step == 1:
            learner.session.strategy = replace(learner.strategy)  # same strategy, broken below
            object.__setattr__(learner.session.strategy, "losses", broken)

    def broken(*_):
        raise ZeroDivisionError

    learner = learner_of(weight_noise=0.5, callbacks=[failing])
    learner.prepare(toy_stream())
    learner.begin(0)
    learner.train(range(1))
    before = bits(learner.model.state_dict())
    with pytest.raises(ZeroDivisionError):
        learner.train(range(1, 2))
    assert same_bits(bits(learner.model.state_dict()), before)


# --------------------------------------------------------------------------- memory


def test_gradient_checkpointing_gives_the_same_private_bits(learner_of, toy_stream):
    class Body(nn.Module):
        def __init__(self, inner, *, again):
            super().__init__()
            self.inner = inner
            self._again = again  # no setting, so that the noise is the same

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False) if self._again else self.inner(x)

    ends = []
    for again in (False, True):
        model = mlp(input_shape=(5,), num_classes=4, hidden=(6,), seed=3)
        model.body = Body(model.body, again=again)
        learner = learner_of(model=model, privacy=SIMULATED, iterations=2)
        learner.fit(toy_stream())
        ends.append(bits(learner.model.state_dict()))
    assert same_bits(*ends)
