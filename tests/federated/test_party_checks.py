"""Learners of clients that do not fit together are refused before training."""

import pytest

from helpers.federations import SIMULATED, maker, short
from perdure.data.client_splits import iid
from perdure.errors import ConfigError, FederationError
from perdure.federated import Federation, Server, client_app, fit_federated
from perdure.federated.flower_adapter import InProcessGrid
from perdure.privacy.settings import Privacy
from perdure.strategies import Naive

SECRET = Privacy(noise_multiplier=1.0)
THREE = Federation(clients=3, rounds=1, quorum=1.0)


@pytest.fixture
def three(stream):
    return iid(short(stream, 1), clients=3, min_size=8, exact=False)


def mixed(stream, **options):
    """Return a function from a client's number to a learner with its own options."""

    def make(client):
        own = {name: values[client] for name, values in options.items()}
        return maker(stream, Naive(), **own)(client)

    return make


def never(point, learner):
    raise AssertionError(f"{point}: a client trains")


@pytest.mark.parametrize(
    ("privacy", "told"),
    [
        ((None, SIMULATED, SIMULATED), "client 0 without privacy, but clients 1 and 2 with"),
        ((SIMULATED, None, None), "clients 1 and 2 without privacy, but client 0 with"),
    ],
)
def test_a_federation_refuses_private_with_plain_clients(stream, three, privacy, told):
    make = mixed(stream, privacy=privacy, callbacks=[[never]] * 3)
    with pytest.raises(FederationError, match=told):
        fit_federated(make, three, THREE)


@pytest.mark.parametrize("asked", [None, SIMULATED])
def test_a_server_and_client_that_differ_in_privacy_are_refused(stream, three, asked):
    """The clients run on separate machines, where no code sees the learners of all clients."""
    own = SIMULATED if asked is None else None
    make = maker(stream, Naive(), privacy=own, callbacks=[never_trains])
    app = client_app(lambda client: (make(client), three[client]))
    server = Server(
        learner=maker(stream, Naive(), privacy=asked)(0), stream=three[0], federation=THREE
    )
    told = "client 0 trains without privacy" if asked else "client 0 trains with privacy"
    with InProcessGrid(app, 3).running() as grid, pytest.raises(FederationError, match=told):
        server.serve(grid)


def never_trains(point, learner):
    if point == "block.begin":
        never(point, learner)


def test_the_error_for_secret_noise_without_folder_names_the_fix(stream, three):
    make = maker(stream, Naive(), privacy=SECRET)
    with pytest.raises(ConfigError, match=r"clients 0, 1 and 2 .*fit_federated\(..., folder=...\)"):
        fit_federated(make, three, THREE)


def test_a_client_learner_with_a_folder_of_its_own_is_refused(stream, three, tmp_path):
    """The folder would be ignored, because the client's state is stored below the federation's
    folder.
    """
    make = mixed(stream, folder=[None, tmp_path / "mine", None])
    with pytest.raises(ConfigError, match=r"client 1: Learner\(folder=.*fit_federated\("):
        fit_federated(make, three, THREE, folder=tmp_path)
    app = client_app(lambda client: (make(client), three[client]))
    server = Server(learner=make(0), stream=three[0], federation=THREE)
    with (
        InProcessGrid(app, 3).running() as grid,
        pytest.raises(FederationError, match=r"client 1 stopped: ConfigError.*client_app\("),
    ):
        server.serve(grid)


def test_one_owner_for_two_private_client_ledgers_is_refused(stream, three):
    make = mixed(stream, owner=["a", "b", "a"], privacy=[SIMULATED] * 3)
    with pytest.raises(ConfigError, match=r"owner = 'a' is given to clients 0 and 2"):
        fit_federated(make, three, THREE)


def test_owner_names_of_clients_do_not_change_results(stream, three):
    named = mixed(stream, owner=["a", "b", "c"], privacy=[SIMULATED] * 3)
    plain = maker(stream, Naive(), privacy=SIMULATED)
    assert fit_federated(named, three, THREE).equal(fit_federated(plain, three, THREE))
