"""SCAFFOLD beside a loop by hand, and its control variates in a federation."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from perdure import Privacy
from perdure.data.client_splits import dirichlet
from perdure.federated import Federation, run_federation
from perdure.learner.learner import Learner
from perdure.strategies import Combine, Naive, Replay, Scaffold
from perdure.testing import check_strategy

RATE = 0.3
SGD = partial(torch.optim.SGD, lr=RATE)
ROUNDS = 3
STEPS = 4


def streams_of(stream, clients=3):
    return dirichlet(stream, clients=clients, alpha=0.5, seed=1, min_size=6)


def run(strategy, streams, model, fraction=1.0):
    def make(number):
        # all records of a client in a batch, so that no draw matters
        return Learner(model=model(), strategy=strategy, optimizer=SGD, epochs=1, batch_size=1000)

    federation = Federation(
        clients=len(streams), rounds=ROUNDS, local_steps=STEPS, fraction=fraction, seed=4
    )
    return run_federation(make, streams, federation), federation


def by_hand(streams, model, federation):
    """Algorithm 1 of the paper with option II, for one experience and whole batches."""
    net = model()
    weights = {name: value.detach().clone() for name, value in net.named_parameters()}
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    server, own = dict(zeros), [dict(zeros) for _ in streams]
    for number in range(ROUNDS):
        cohort = federation.cohort(0, number)
        ends, changes = [], []
        for client in cohort:
            rows = streams[client][0].train
            local = {name: value.clone() for name, value in weights.items()}
            for _ in range(STEPS):
                given = {name: value.requires_grad_() for name, value in local.items()}
                logits = torch.func.functional_call(net, given, rows.inputs)
                allowed = torch.full((logits.shape[1],), float("-inf"))
                allowed[list(streams[client][0].classes)] = 0.0
                loss = F.cross_entropy(logits + allowed, rows.labels)
                found = torch.autograd.grad(loss, list(given.values()))
                local = {
                    name: (value - RATE * (g - own[client][name] + server[name])).detach()
                    for (name, value), g in zip(given.items(), found, strict=True)
                }
            new = {
                name: own[client][name] - server[name] + (weights[name] - value) / (STEPS * RATE)
                for name, value in local.items()
            }
            changes.append({name: new[name] - own[client][name] for name in new})
            own[client] = new
            ends.append((len(rows), local))
        total = sum(size for size, _ in ends)
        weights = {
            name: sum(size / total * local[name] for size, local in ends) for name in weights
        }
        server = {
            name: server[name] + sum(each[name] for each in changes) / len(streams)
            for name in server
        }
    return weights, server


@pytest.mark.reference
@pytest.mark.parametrize("fraction", [1.0, 0.6])
def test_scaffold_equals_the_algorithm_of_the_paper(toy_stream, toy_model, fraction):
    stream = toy_stream()
    whole = streams_of(stream)
    first = [replace(each, experiences=each.experiences[:1]) for each in whole]
    model = partial(toy_model, stream)
    server, federation = run(Scaffold(), first, model, fraction)
    weights, control = by_hand(first, model, federation)
    for name, value in server.learner.model.named_parameters():
        torch.testing.assert_close(value.detach(), weights[name], rtol=1e-4, atol=1e-6)
        found = server.learner.state[f"control/{name}"]
        torch.testing.assert_close(found, control[name], rtol=1e-4, atol=1e-6)
    assert max(float(value.abs().max()) for value in control.values()) > 1e-3


def test_scaffold_of_one_party_corrects_nothing(toy_stream, toy_model):
    stream = toy_stream()
    ends = []
    for strategy in (Naive(), Scaffold()):
        learner = Learner(
            model=toy_model(stream), strategy=strategy, optimizer=SGD, iterations=6, blocks=2
        )
        learner.fit(stream)
        ends.append(learner.model.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-5, atol=1e-6)


def test_scaffold_with_replay_passes_check_strategy():
    check_strategy(Combine(Scaffold(), Replay(memory_size=8)))


@pytest.mark.parametrize("folder", [True, False], ids=["on disk", "in memory"])
def test_scaffold_with_replay_runs_in_a_federation(toy_stream, toy_model, tmp_path, folder):
    stream = toy_stream()
    strategy = Combine(Scaffold(), Replay(memory_size=8))
    found = []
    for alive in (None, 1):

        def make(number):
            return Learner(
                model=toy_model(stream), strategy=strategy, optimizer=SGD, epochs=1, batch_size=8
            )

        streams = streams_of(stream)
        federation = Federation(clients=3, rounds=2, local_steps=3, fraction=0.6, alive=alive)
        place = tmp_path / str(alive) if folder else None
        server = run_federation(make, streams, federation, folder=place)
        assert any(value.any() for name, value in server.learner.state.items() if "control" in name)
        found.append({n: t.numpy().tobytes() for n, t in server.learner.model.state_dict().items()})
    assert found[0] == found[1]


def test_a_private_variate_is_a_mean_of_released_gradients(toy_stream, toy_model):
    stream = toy_stream()
    released = []

    @dataclass(frozen=True, kw_only=True)
    class Listening(Scaffold):
        def after_step(self, before, after, gradient, state, noise_variance=0.0):
            released.append({name: value.clone() for name, value in gradient.items()})
            return super().after_step(before, after, gradient, state, noise_variance)

    learner = Learner(
        model=toy_model(stream),
        strategy=Listening(),
        optimizer=SGD,
        iterations=3,
        blocks=1,
        batch_size=8,
        privacy=Privacy(noise_multiplier=1.0, clip_norm=1.0, delta=1e-3, seed=0),
    )
    learner.fit(stream)
    last = released[-3:]
    for name, value in learner.state.group("own").items():
        wanted = torch.stack([each[name] for each in last]).mean(0)
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6)
