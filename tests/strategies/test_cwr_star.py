from functools import partial

import pytest
import torch
import torch.nn.functional as F

import perdure.federated  # noqa: F401  # first: it lets the warnings of Flower's dependencies pass
from perdure.contract.context import Spec
from perdure.data.client_splits import dirichlet
from perdure.data.datasets.digits import digits
from perdure.data.scenarios import split
from perdure.errors import StrategyError
from perdure.federated import Federation, run_federation
from perdure.learner.learner import Learner
from perdure.metrics import average_accuracy
from perdure.models.classifiers import mlp
from perdure.models.frozen import frozen
from perdure.models.random_convolutions import RandomConvolutions
from perdure.privacy.settings import Privacy
from perdure.strategies import CWRStar, Naive

STEPS = 6


def learner_of(strategy, stream, seed=0, **changes):
    model = mlp(
        input_shape=stream.input_shape, num_classes=stream.num_classes, hidden=(16,), seed=seed
    )
    options = {
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "iterations": STEPS,
        "batch_size": 16,
        "seed": seed,
    }
    return Learner(model=model, strategy=strategy, **options | changes)


def step(params, trained, batch, allowed):
    """Take one step of plain SGD on the trained parameters."""
    leaves = {name: params[name].clone().requires_grad_() for name in trained}
    every = {**params, **leaves}
    hidden = torch.relu(batch.inputs.flatten(1) @ every["body.1.weight"].T + every["body.1.bias"])
    logits = torch.where(allowed, hidden @ every["head.weight"].T + every["head.bias"], -1e9)
    grads = torch.autograd.grad(F.cross_entropy(logits, batch.labels), list(leaves.values()))
    return {
        **params,
        **{n: (v - 0.1 * g).detach() for (n, v), g in zip(leaves.items(), grads, strict=True)},
    }


def by_hand(stream, experiences, seed=0):
    """Return the head by the printed algorithm, which writes to the head at the start of every
    experience.
    """
    sampler = learner_of(Naive(), stream, seed)
    sampler.prepare(stream)
    params = {name: value.detach().clone() for name, value in sampler.params.items()}
    cw = {name: torch.zeros_like(params[name]) for name in ("head.weight", "head.bias")}
    past = torch.zeros(stream.num_classes)
    for index in range(experiences):
        sampler.begin(index)
        context = sampler.session.context(index)
        classes = sorted(stream[index].classes)
        for name, value in cw.items():
            params[name] = torch.zeros_like(value)
            params[name][classes] = value[classes]
        allowed = context.seen if stream.scenario == "class" else torch.ones_like(context.seen)
        for number in range(STEPS):
            batch = sampler.session.held.sample(number)
            params = step(params, list(cw) if index else list(params), batch, allowed)
        for name, value in cw.items():
            mean = params[name][classes].mean()
            for c in classes:
                weight = (past[c] / (stream[index].train.labels == c).sum()).sqrt()
                value[c] = (value[c] * weight + params[name][c] - mean) / (weight + 1)
        for c in classes:
            past[c] += (stream[index].train.labels == c).sum()
        sampler.session.held.close()
    return params, cw


@pytest.mark.reference
@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_the_shifted_cwr_head_equals_a_rewritten_head(scenario):
    stream = split(digits(), scenario=scenario, experiences=5)
    learner = learner_of(CWRStar(), stream)
    learner.fit(stream)
    params, cw = by_hand(stream, len(stream))
    for name, value in cw.items():
        assert float(value.abs().max()) > 0.01
        torch.testing.assert_close(learner.state[f"cw/{name}"], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        learner.params["body.1.weight"].detach(), params["body.1.weight"], rtol=1e-4, atol=1e-5
    )
    x = stream[0].test.inputs
    hidden = torch.relu(x.flatten(1) @ params["body.1.weight"].T + params["body.1.bias"])
    with torch.no_grad():
        mine = learner.predictor(0, after=len(stream) - 1)(x)
    torch.testing.assert_close(
        mine, hidden @ cw["head.weight"].T + cw["head.bias"], rtol=1e-3, atol=1e-4
    )


def test_cwr_star_keeps_the_body_and_weights_of_old_classes():
    stream = split(digits(), scenario="class", experiences=5)
    learner = learner_of(CWRStar(), stream, optimizer=partial(torch.optim.Adam, lr=0.01))
    learner.prepare(stream)
    bodies = []
    heads = []
    for index in range(3):
        learner.begin(index)
        learner.train(range(STEPS))
        learner.finish()
        bodies.append(learner.params["body.1.weight"].detach().clone())
        heads.append(learner.state["cw/head.weight"])
    assert torch.equal(bodies[0], bodies[1]) and torch.equal(bodies[0], bodies[2])
    assert torch.equal(heads[0][:2], heads[2][:2]) and torch.equal(heads[1][:4], heads[2][:4])
    assert (heads[0][2:] == 0).all() and (heads[1][2:4] != 0).any()


@pytest.mark.reference
def test_cwr_star_client_counts_add_up_to_all_records():
    """Clients have other shares of the classes; the weights of past and present are those of all
    clients.
    """
    stream = split(digits(), scenario="domain", experiences=2)
    parts = dirichlet(stream, clients=3, alpha=0.5)
    server = run_federation(
        lambda _: learner_of(CWRStar(), stream, blocks=2), parts, Federation(clients=3, rounds=2)
    ).learner
    state = server.state
    counts = torch.stack(
        [torch.bincount(e.train.labels, minlength=stream.num_classes) for e in stream]
    ).double()
    assert torch.equal(state["totals"], counts.sum(0)) and torch.equal(state["before"], counts[0])
    weight = (counts[0] / counts[1]).sqrt().float()
    for name in ("head.weight", "head.bias"):
        w = weight[:, None] if "weight" in name else weight
        expected = (w * state[f"kept/{name}"] + state[f"trained/{name}"]) / (w + 1)
        torch.testing.assert_close(state[f"cw/{name}"], expected)
        assert float(state[f"kept/{name}"].abs().max()) > 0
    own = [
        torch.bincount(part[0].train.labels, minlength=stream.num_classes).double()
        for part in parts
    ]
    assert not torch.allclose(own[0] / own[0].sum(), counts[0] / counts[0].sum(), atol=0.02)


def test_cwr_star_accepts_private_class_counts_below_zero(toy_stream, toy_model):
    stream = toy_stream()
    strategy = CWRStar()
    learner = Learner(
        model=toy_model(stream),
        strategy=strategy,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        iterations=3,
        privacy=Privacy(noise_multiplier=1.0, seed=0),
    )
    assert learner.fit(stream).isfinite().all()
    asked = [
        entry.purpose
        for entry in learner.private_sum.ledger.entries
        if "class counts" in entry.purpose
    ]
    assert len(asked) == 2
    # classes of the second experience had no past to be noisy
    assert learner.state["before"][2:].tolist() == [0, 0]
    low = torch.full((4,), -3.0, dtype=torch.float64)
    noisy = strategy.derive(learner.state.replace({"before": low, "totals": low - 1}))
    assert torch.equal(noisy["cw/head.bias"][2:], learner.state["trained/head.bias"][2:])
    assert all(value.isfinite().all() for value in noisy.group("cw").values())


def scores(strategy, seed):
    stream = split(digits(), scenario="class", experiences=5, seed=seed)
    learner = Learner(
        model=convolutions(seed),
        strategy=strategy,
        optimizer=partial(torch.optim.Adam, lr=3e-3),
        iterations=200,
        batch_size=32,
        seed=seed,
    )
    return float(average_accuracy(learner.fit(stream)))


def convolutions(seed):
    features = RandomConvolutions(filters=12, size=3, pool=2)
    return frozen(features, input_shape=(1, 8, 8), num_classes=10, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed",
    [
        0,
        *(
            pytest.param(k, marks=pytest.mark.deep(reason="full replay: more seeds"))
            for k in (1, 2)
        ),
    ],
)
def test_cwr_star_forgets_less_than_plain_training(seed):
    assert scores(CWRStar(), seed) > scores(Naive(), seed) + 20


def test_cwr_star_refuses_a_head_that_is_not_linear(toy_model, toy_stream):
    params = dict(toy_model(toy_stream()).named_parameters())
    spec = partial(Spec, params=params, num_classes=4, num_experiences=2, scenario="class")
    for strategy, size in (
        (CWRStar(head="classifier."), 6),
        (CWRStar(), 7),
        (CWRStar(head="body."), 6),
    ):
        with pytest.raises(StrategyError, match=r"CWRStar\(head=...\)"):
            strategy.init(spec(feature_size=size))
    only = {"head.weight": params["head.weight"]}
    state = CWRStar().init(
        Spec(params=only, num_classes=4, num_experiences=2, scenario="class", feature_size=6)
    )
    assert "cw/head.bias" not in state and state["cw/head.weight"].shape == (4, 6)
