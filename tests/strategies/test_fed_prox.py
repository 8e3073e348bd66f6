from functools import partial

import pytest
import torch

from perdure.contract.context import Spec
from perdure.data.client_splits import dirichlet
from perdure.errors import ConfigError
from perdure.federated import Federation, run_federation
from perdure.learner.learner import Learner
from perdure.strategies import Combine, FedProx, Naive, Replay
from perdure.testing import check_strategy

SGD = partial(torch.optim.SGD, lr=0.2)


def spec(params):
    return Spec(params=params, num_classes=2, num_experiences=2, feature_size=1, scenario="class")


def test_the_fed_prox_penalty_equals_its_formula():
    anchors = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[3.0]])}
    strategy = FedProx(strength=0.7)
    begun = strategy.begin_round(
        anchors, strategy.init(spec({n: torch.zeros_like(v) for n, v in anchors.items()}))
    )
    at = {"a": torch.tensor([1.5, -4.0]), "b": torch.tensor([[0.0]])}
    assert strategy.penalty(at, begun).item() == pytest.approx(0.35 * (0.25 + 4.0 + 9.0))
    assert set(begun.rules.values()) == {"local"}


@pytest.mark.parametrize("strength", [-1.0, float("inf"), float("nan")])
def test_fed_prox_refuses_an_invalid_strength(strength):
    with pytest.raises(ConfigError, match=r"fed_prox\.strength"):
        FedProx(strength=strength)


def clients_of(strategy, stream, model, rounds=2):
    """Run a federation; return the anchor and the parameters of each block, and the server."""
    seen = []

    def listen(point, learner):
        values = {n: v.detach().clone() for n, v in learner.model.named_parameters()}
        if point == "step.sampled" and learner.position.step % 5 == 0:
            seen.append((values, learner.state))
        if point == "block.end":
            seen[-1] += (values,)

    def make(number):
        return Learner(
            model=model(stream),
            strategy=strategy,
            optimizer=SGD,
            iterations=5 * rounds,
            batch_size=8,
            callbacks=[listen],
        )

    streams = dirichlet(stream, clients=2, alpha=0.5, seed=1, min_size=4)
    server = run_federation(make, streams, Federation(clients=2, rounds=rounds))
    return seen, server


def test_fed_prox_pulls_to_the_global_parameters_of_the_round(toy_stream, toy_model):
    seen, _ = clients_of(FedProx(strength=3.0), toy_stream(), toy_model)
    assert len(seen) == 2 * 2 * 2
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        # both clients of a round start at one global model, and have it as their anchor
        for values, state, _ in (first, second):
            assert all(torch.equal(first[0][n], v) for n, v in values.items())
            assert all(torch.equal(state[f"anchor/{n}"], v) for n, v in values.items())


def test_fed_prox_keeps_clients_nearer_to_the_global_model(toy_stream, toy_model):
    def drift(strategy):
        seen, _ = clients_of(strategy, toy_stream(), toy_model)
        return sum(
            float((after[n] - before[n]).square().sum())
            for before, _, after in seen
            for n in before
        )

    assert 0 < drift(FedProx(strength=3.0)) < 0.5 * drift(Naive())


def test_fed_prox_with_strength_0_changes_no_bit(toy_stream, toy_model):
    replay = Replay(memory_size=8)
    _, plain = clients_of(replay, toy_stream(), toy_model)
    _, joined = clients_of(Combine(FedProx(strength=0.0), replay), toy_stream(), toy_model)
    assert plain.learner.matrix == joined.learner.matrix
    ends = [server.learner.model.state_dict() for server in (plain, joined)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_fed_prox_with_replay_passes_check_strategy():
    check_strategy(Combine(FedProx(strength=0.5), Replay(memory_size=8)))
