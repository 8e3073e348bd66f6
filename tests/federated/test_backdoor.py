"""A malicious client puts a backdoor into the global model of a federation."""

from functools import partial

import pytest
import torch

from perdure.adversarial import PGD, Backdoor, robustness_by_client
from perdure.data import digits, dirichlet, split
from perdure.errors import ConfigError
from perdure.federated import Federation, run_federation
from perdure.learner.learner import Learner
from perdure.models import mlp
from perdure.strategies import Naive

STREAM = split(digits(), scenario="class", experiences=1)
CLIENTS = dirichlet(STREAM, clients=3, alpha=100.0)
DOOR = Backdoor(target=7, size=4, share=0.5)


def make(client=0):
    return Learner(
        model=mlp(input_shape=STREAM.input_shape, num_classes=10, hidden=(24,), seed=0),
        strategy=Naive(),
        optimizer=partial(torch.optim.Adam, lr=0.01),
        iterations=90,
        blocks=2,
        batch_size=32,
        client=client,
        owner=f"client-{client}",
        show_progress=False,
    )


@pytest.fixture(scope="module")
def models():
    """Return the predictors of a federation of honest clients, and of one with a malicious one."""
    bad = [*CLIENTS[:2], DOOR.poisoned(CLIENTS[2], seed=0)]
    found = []
    for streams in (CLIENTS, bad):
        server = run_federation(make, streams, Federation(clients=3, rounds=2))
        found.append(server.learner.predictor(0, after=0))
    return found


def test_one_client_opens_a_backdoor_in_the_global_model(models):
    test = STREAM[0].test
    honest, bad = (DOOR.success_rate(each, test.inputs, test.labels) for each in models)
    clean = [100 * (each(test.inputs).argmax(1) == test.labels).double().mean() for each in models]
    assert honest < 15
    assert bad > honest + 30
    assert clean[1] > clean[0] - 10  # nothing shows on clean records


def test_robust_accuracy_is_measured_for_each_client(models):
    test = STREAM[0].test
    halves = [test.take(test.labels < 5), test.take(test.labels >= 5)]
    attack = PGD(epsilon=0.05, steps=2, random_start=False)
    cards = robustness_by_client(models[0], halves, attack, generator=None)
    whole = robustness_by_client(models[0], [test], attack, generator=None)[0]
    hits = sum(card.robust_accuracy * card.records for card in cards)
    assert hits / whole.records == pytest.approx(whole.robust_accuracy, abs=1.0)
    assert [card.records for card in cards] == [len(each) for each in halves]


def test_poisoned_records_have_trigger_and_target():
    images = torch.rand(3, 1, 6, 6)
    marked = Backdoor(target=0, size=2).stamped(images)
    assert (marked[..., 4:, 4:] == 1).all() and torch.equal(marked[..., :4, :], images[..., :4, :])
    assert (Backdoor(target=0, size=2, value=-1.0).stamped(torch.rand(2, 5))[:, 3:] == -1).all()
    before = CLIENTS[0][0].train
    after = Backdoor(target=3, share=0.4).poisoned(CLIENTS[0], seed=1)[0].train
    changed = (after.inputs != before.inputs).flatten(1).any(1)
    assert (after.labels[changed] == 3).all() and torch.equal(after.ids, before.ids)
    assert 0.3 < changed.double().mean() < 0.5
    assert torch.equal(
        after.labels[~changed & (after.labels != 3)], before.labels[~changed & (after.labels != 3)]
    )


def test_a_backdoor_that_cannot_work_is_refused():
    with pytest.raises(ConfigError, match="target"):
        Backdoor(target=12).poisoned(CLIENTS[0], seed=0)
    with pytest.raises(ConfigError, match="other classes"):
        DOOR.success_rate(lambda rows: rows, torch.zeros(2, 3), torch.tensor([7, 7]))
    with pytest.raises(ConfigError, match="share"):
        Backdoor(target=1, share=0.0)
