"""The command `perdure ledger`, and finished runs for tests to read or to change."""

import shutil
import sys
import warnings

import pytest

from perdure.experiment.config import parse
from perdure.experiment.run import run
from perdure.privacy.noise.key import NoiseKey

with warnings.catch_warnings():
    # typer takes names from click that click is about to move
    warnings.filterwarnings("ignore", message="'click", category=DeprecationWarning)
    from perdure.cli import main as cli

CONFIG = """
name = "small"
[data]
experiences = 2
[model]
hidden = [4]
[training]
optimizer = "SGD"
learning_rate = 0.1
epochs = 1
[privacy]
noise_multiplier = 1.5
delta = 0.0005
sampling_rate = 0.25
[[arms]]
strategy = "naive"
[[arms]]
strategy = "ewc"
strength = 1.0
private = true
[[arms]]
strategy = "replay"
memory_size = 20
private = true
"""
FEDERATED = CONFIG.replace("delta", "seed = 3\ndelta") + "[federation]\nclients = 2\nrounds = 2\n"
ARMS = ("ewc-private", "replay-private")
KEY = NoiseKey.from_seed(0)


@pytest.fixture
def perdure(monkeypatch, capfd):
    """Call `perdure ledger`; return (exit code, standard output, standard error).

    The call runs in this process, because starting a process for each of 60 calls takes too long.
    """

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["perdure", "ledger", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capfd.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return call


def shown(answer):
    code, out, err = answer
    assert (code, err) == (0, "")
    return out


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """A finished run with secret noise: two private arms, one without privacy. For reading only."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(parse(CONFIG), CONFIG, folder)
    return folder


@pytest.fixture(scope="session")
def federated(tmp_path_factory):
    """A finished federated run with simulated noise. For reading only."""
    folder = tmp_path_factory.mktemp("federated") / "run"
    run(parse(FEDERATED), FEDERATED, folder)
    return folder


@pytest.fixture(params=["alone", "federated"])
def either(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def mine(alone, tmp_path):
    """Return a copy of the finished run that a test may change."""
    shutil.copytree(alone, tmp_path / "run")
    return tmp_path / "run"
