from functools import partial

import pytest
import torch
import torch.nn.functional as F

import perdure.federated  # noqa: F401  # first: it lets the warnings of Flower's dependencies pass
from perdure.contract.context import Spec, contexts
from perdure.contract.forward import Forward
from perdure.data.client_splits import iid
from perdure.data.datasets.digits import digits
from perdure.data.records import Batch
from perdure.data.scenarios import split
from perdure.errors import ConfigError, FederationError, StrategyError
from perdure.federated import Federation, run_federation
from perdure.learner.learner import Learner
from perdure.metrics import average_accuracy, forgetting
from perdure.models.classifiers import mlp
from perdure.privacy.settings import Privacy
from perdure.strategies import Naive, PackNet
from perdure.strategies.packnet import network_weights

OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
}


def learner_of(strategy, stream, hidden=(16,), seed=0, **changes):
    model = mlp(
        input_shape=stream.input_shape, num_classes=stream.num_classes, hidden=hidden, seed=seed
    )
    options = {"optimizer": OPTIMIZERS["adam"], "iterations": 20, "batch_size": 16, "seed": seed}
    return Learner(model=model, strategy=strategy, **options | changes)


def tasks(experiences=5):
    return split(digits(), scenario="task", experiences=experiences)


def network(weights, x):
    hidden = torch.relu(x.flatten(1) @ weights["body.1.weight"].T + weights["body.1.bias"])
    return hidden @ weights["head.weight"].T + weights["head.bias"]


@pytest.mark.parametrize("dense_steps", [None, 12])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_packnet_steps_do_not_change_earlier_predictions(optimizer, dense_steps):
    stream = tasks()
    learner = learner_of(
        PackNet(pruned_share=0.6, dense_steps=dense_steps), stream, optimizer=OPTIMIZERS[optimizer]
    )
    learner.prepare(stream)
    answers = {}
    bare = []
    for index in range(len(stream)):
        learner.begin(index)
        learner.train(learner.training.block(learner.position.experience, 0, 1))
        learner.finish()
        for k in range(index + 1):
            with torch.no_grad():
                now = learner.predictor(k, after=index)(stream[k].test.inputs)
            assert torch.equal(answers.setdefault(k, now), now)
        bare.append(learner.model.body[1].weight.detach().clone())
    assert not torch.equal(bare[0], bare[1])  # the model itself did move


def test_packnet_forgets_nothing_under_privacy_or_federation():
    stream = split(digits(), scenario="task", experiences=2)
    strategy = PackNet(pruned_share=0.6, dense_steps=40)
    assert (
        forgetting(
            learner_of(strategy, stream, privacy=Privacy(noise_multiplier=1.0, seed=0)).fit(stream)
        )
        == 0
    )

    def make(_):
        return learner_of(strategy, stream, blocks=4, iterations=80)

    server = run_federation(make, iid(stream, clients=3), Federation(clients=3, rounds=4)).learner
    assert server.matrix[0][0] == server.matrix[1][0] > 90 and server.matrix[1][1] > 80
    assert int(server.state["done"]) == 2


def test_clients_that_prune_different_weights_are_refused():
    stream = split(digits(), scenario="task", experiences=2)
    make = lambda number: learner_of(PackNet(dense_steps=7), stream, blocks=4, seed=number)  # noqa: E731
    with pytest.raises(
        (StrategyError, FederationError),
        match="different weights with dense_steps = 7; set dense_steps",
    ):
        run_federation(make, iid(stream, clients=3), Federation(clients=3, rounds=4))


@pytest.mark.reference
def test_the_packnet_network_of_a_task_equals_the_formula():
    stream = tasks()
    strategy = PackNet(pruned_share=0.6, dense_steps=12)
    learner = learner_of(strategy, stream)
    learner.prepare(stream)
    for index in range(3):
        learner.begin(index)
        learner.train(range(20 if index < 2 else 15))  # in the middle of retraining the third
        if index < 2:
            learner.finish()
    params = dict(learner.model.named_parameters())
    state = learner.state
    for task in range(3):
        weights = {}
        for name, live in params.items():
            weights[name] = torch.zeros_like(live)
            own = state[f"owner/{name}"]
            held = state[f"held/{name}"]
            for place in (
                torch.cartesian_prod(*(torch.arange(s) for s in live.shape))
                .view(live.numel(), -1)
                .tolist()
            ):
                at = tuple(place)
                if 0 < own[at] <= min(task + 1, 2):
                    weights[name][at] = held[at]
                elif task == 2 and (own[at] == 3 or (own[at] == 0 and name.startswith("head"))):
                    weights[name][at] = live[at] - held[at]
        x = stream[task].test.inputs
        expected = torch.where(learner.session.context(task).current, network(weights, x), -1e9)
        with torch.no_grad():
            torch.testing.assert_close(learner.predictor(task, after=2)(x), expected)


@pytest.mark.reference
def test_packnet_gives_a_task_its_largest_free_weights():
    stream = tasks()
    strategy = PackNet(pruned_share=0.6)
    learner = learner_of(strategy, stream)
    learner.prepare(stream)
    free = learner.model.body[1].weight.numel()
    for index in range(3):
        learner.begin(index)
        learner.train(range(20))
        before = learner.state
        learner.finish()
        owner = learner.state["owner/body.1.weight"]
        size = (learner.model.body[1].weight - before["held/body.1.weight"]).detach().abs()
        new = owner == index + 1
        left = owner == 0
        assert int(new.sum()) == round(0.4 * free) and float(size[new].min()) >= float(
            size[left].max()
        )
        free -= int(new.sum())
        assert int(left.sum()) == free
        assert learner.state["owner/head.bias"].tolist() == [
            min(c // 2, index + 1) + 1 if c // 2 <= index else 0 for c in range(10)
        ]
        assert set(learner.state["owner/body.1.bias"].tolist()) == {1.0}


@pytest.mark.reference
def test_the_packnet_gradient_is_0_outside_trained_weights():
    stream = tasks()
    strategy = PackNet(pruned_share=0.6, dense_steps=12)
    learner = learner_of(strategy, stream)
    learner.prepare(stream)
    learner.begin(0)
    learner.train(range(20))
    learner.finish()
    learner.begin(1)
    learner.train(range(15))
    state = learner.state
    batch = Batch.current(stream[1].train, 1)
    losses = strategy.losses(learner.session.forward, batch, learner.session.context(1), state)
    mine = dict(
        zip(
            learner.params,
            torch.autograd.grad(losses.mean(), list(learner.params.values())),
            strict=True,
        )
    )
    projected = strategy.project(mine, (), state)
    weights = network_weights(learner.params, state, torch.tensor(1), strategy.head)
    leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
    logits = torch.where(learner.session.context(1).current, network(leaves, batch.inputs), -1e9)
    full = torch.autograd.grad(F.cross_entropy(logits, batch.labels), list(leaves.values()))
    for (name, value), theirs in zip(projected.items(), full, strict=True):
        owner = state[f"owner/{name}"]
        trained = (owner == 2) | ((owner == 0) & name.startswith("head"))
        torch.testing.assert_close(value, torch.where(trained, theirs, 0.0))
        torch.testing.assert_close(mine[name], value)
        assert 0 < int(trained.sum()) < trained.numel() or name == "body.1.bias"
    everywhere = {name: torch.ones_like(value) for name, value in mine.items()}
    kept = strategy.project(everywhere, (), state)["body.1.weight"]
    assert torch.equal(kept.bool(), state["owner/body.1.weight"] == 2)


def by_masks(name, live, state, task, head):
    """Return the formula of the module by boolean masks."""
    owner = state[f"owner/{name}"]
    held = state[f"held/{name}"]
    prunable = live.dim() > 1 and not name.startswith(head)
    free = (owner == 0) & ((state["pruned"] == 0) | (not prunable))
    training = free | (owner == state["done"] + 1)
    last = min(int(state["done"]), task + 1)
    trained = torch.where((task >= state["done"]) & training, live - held, 0.0)
    return torch.where((owner > 0) & (owner <= last), held, trained), training


@pytest.mark.reference
@pytest.mark.parametrize("steps", [6, 15], ids=["dense", "pruned"])
def test_packnet_arithmetic_equals_boolean_masks_bit_for_bit(steps):
    stream = tasks()
    strategy = PackNet(pruned_share=0.6, dense_steps=12)
    learner = learner_of(strategy, stream)
    learner.prepare(stream)
    for index in range(3):
        learner.begin(index)
        learner.train(range(20 if index < 2 else steps))
        if index < 2:
            learner.finish()
    ones = {name: torch.full_like(value, 3.7) for name, value in learner.params.items()}
    projected = strategy.project(ones, (), learner.state)
    for task in range(4):
        weights = network_weights(learner.params, learner.state, task, strategy.head)
        for name, live in learner.params.items():
            expected, training = by_masks(name, live, learner.state, task, strategy.head)
            assert torch.equal(weights[name], expected)
            assert torch.equal(projected[name], torch.where(training, ones[name], 0.0))


def test_weights_pruned_by_packnet_start_the_next_task_at_0(toy_stream, toy_model):
    stream = toy_stream("task")
    strategy = PackNet(pruned_share=0.5)
    learner = Learner(
        model=toy_model(stream), strategy=strategy, optimizer=OPTIMIZERS["adam"], iterations=5
    )
    learner.prepare(stream)
    learner.begin(0)
    learner.train(range(5))
    learner.finish()
    weights = network_weights(learner.params, learner.state, torch.tensor(1), strategy.head)[
        "body.1.weight"
    ]
    owner = learner.state["owner/body.1.weight"]
    assert (weights[owner == 0] == 0).all() and (weights[owner == 1] != 0).all()


def scores(strategy, scenario, seed, hidden=(100,), iterations=200):
    stream = split(digits(), scenario=scenario, experiences=5, seed=seed)
    options = {
        "optimizer": partial(torch.optim.Adam, lr=3e-3),
        "iterations": iterations,
        "batch_size": 32,
    }
    matrix = learner_of(strategy, stream, hidden, seed, **options).fit(stream)
    return float(average_accuracy(matrix)), float(forgetting(matrix))


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
def test_packnet_forgets_nothing_unlike_plain_training(seed):
    (naive, lost), (kept, nothing) = (
        scores(s, "task", seed) for s in (Naive(), PackNet(dense_steps=100))
    )
    assert nothing == 0 < lost and kept > 99 and kept > naive + 1


@pytest.mark.deep(reason="full replay: trains six networks to compare their means")
def test_packnet_retraining_recovers_accuracy_after_pruning():
    pruned, retrained = (
        sum(
            scores(PackNet(pruned_share=0.97, dense_steps=steps), "task", seed, (40,))[0]
            for seed in range(3)
        )
        / 3
        for steps in (None, 100)
    )
    assert retrained > pruned + 1


def test_packnet_refuses_a_domain_stream_or_a_missing_head(toy_model, toy_stream):
    params = dict(toy_model(toy_stream()).named_parameters())
    spec = partial(Spec, params=params, num_classes=4, num_experiences=2, feature_size=6)
    with pytest.raises(StrategyError, match="use EWC"):
        PackNet().init(spec(scenario="domain"))
    with pytest.raises(StrategyError, match=r"'classifier.'.*PackNet\(head=...\)"):
        PackNet(head="classifier.").init(spec(scenario="task"))
    with pytest.raises(StrategyError, match="one row per class"):
        PackNet(head="body.").init(spec(scenario="task"))


def test_packnet_without_tasks_predicts_with_all_networks(toy_model, toy_stream):
    stream = toy_stream()
    strategy = PackNet(pruned_share=0.5)
    learner = Learner(
        model=toy_model(stream), strategy=strategy, optimizer=OPTIMIZERS["adam"], iterations=30
    )
    learner.fit(stream)
    at = contexts(stream, "cpu")
    x = stream[0].test.inputs
    forward = Forward(learner.model.eval())
    with torch.no_grad():
        mine = strategy.predict(forward, x, at(1), learner.state)
        networks = [
            network_weights(learner.params, learner.state, torch.tensor(k), strategy.head)
            for k in range(2)
        ]
        parts = [forward.at(weights)(x) for weights in networks]
        assert torch.equal(mine, torch.cat([parts[0][:, :2], parts[1][:, 2:]], dim=1))
        first = strategy.predict(forward, x, at(0), learner.state)
    assert torch.equal(first[:, :2], mine[:, :2]) and (first[:, 2:] == -1e9).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruned_share": 0.0}, "packnet.pruned_share = 0.0"),
        ({"pruned_share": 1.0}, "packnet.pruned_share = 1.0"),
        ({"dense_steps": 0}, "packnet.dense_steps = 0"),
    ],
)
def test_packnet_refuses_invalid_options(options, message):
    with pytest.raises(ConfigError, match=message):
        PackNet(**options)
