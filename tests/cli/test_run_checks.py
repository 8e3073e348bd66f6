"""`perdure config` refuses what `perdure run` refuses before it trains, with the same line."""

import sys
import warnings

import pytest

import perdure.federated

with warnings.catch_warnings():
    # typer takes names from click that click is about to move
    warnings.filterwarnings("ignore", message="'click", category=DeprecationWarning)
    from perdure.cli import main as cli

CONFIG = """
name = "small"
[data]
name = "helpers.own_data:blobs"
experiences = 2
[model]
name = "mlp"
hidden = [4]
[training]
optimizer = "SGD"
learning_rate = 0.1
iterations = 2
batch_size = 8
[[arms]]
strategy = "naive"
"""
FEDERATED = CONFIG + "[federation]\nclients = 2\nrounds = 1\nmin_size = 2\n"
PRIVATE = CONFIG + "private = true\n[privacy]\nnoise_multiplier = 1.0\ndelta = 1e-2\n"
BY_DOMAIN = 'split = "by_attribute"\nattribute = "domain"\n'
SIX = """[federation]
clients = 6
rounds = 1
split = "by_attribute"
attribute = "time"
values = [0, 1, 2, 3, 4, 5]
client_sizes = [[8, 8], [8, 8], [8, 8], [8, 0], [8, 0], [8, 0]]
"""
TEXTS = CONFIG.replace("own_data:blobs", "own_data:moods").replace(
    'name = "mlp"\nhidden = [4]', 'name = "lstm"\nvocabulary = 9\nhidden = 4\nembedding = 4'
)
REFUSED = {
    "too many experiences": (CONFIG.replace("experiences = 2", "experiences = 9"), "experiences ="),
    "data of another machine": (
        CONFIG.replace('"helpers.own_data:blobs"', '"adult"\nroot = "nowhere"'),
        "no adult.data and adult.test in nowhere",
    ),
    "a model for pictures": (
        CONFIG.replace("own_data:blobs", "own_data:tags")
        .replace("experiences = 2", 'stream = "by_domain"')
        .replace('name = "mlp"\nhidden = [4]', 'name = "cnn"'),
        "",
    ),
    "a strategy of another task": (
        CONFIG.replace("own_data:blobs", "own_data:prices")
        .replace("experiences = 2", 'stream = "by_domain"')
        .replace('"naive"', '"ncm"'),
        "single-label",
    ),
    "an unknown group": (CONFIG + '[fairness]\nattribute = "sex"\n', "no attribute 'sex'"),
    "an earlier run that is not there": (CONFIG + '[start]\nrun = "runs/none"\n', "runs/none"),
    "explanations by a convolution that is not there": (
        CONFIG + '[explain]\nmethod = "grad_cam"\n',
        "explain: predict = 'Classifier' is not allowed; allowed: a model with a convolution",
    ),
    "explanations of an unknown layer": (
        CONFIG + '[explain]\nmethod = "grad_cam"\nlayer = "7"\n',
        "explain.layer = '7'",
    ),
    "gradients of token numbers": (
        TEXTS + '[explain]\nmethod = "gradient_shap"\ndrift = true\n',
        "floats for GradientSHAP; for token numbers use kernel_shap or lime",
    ),
    "a baseline beyond the vocabulary": (
        TEXTS + '[explain]\nmethod = "lime"\ndrift = true\nbaseline = 9\n',
        "fails on the background with the tokens 9",
    ),
    "a baseline that is no token": (
        TEXTS + '[explain]\nmethod = "lime"\ndrift = true\nbaseline = 0.5\n',
        "explain.baseline = 0.5",
    ),
    "kept tokens of pictures": (
        CONFIG + '[explain]\nmethod = "lime"\nkept = [1]\n',
        "explain.kept = (1,)",
    ),
    "the second arm": (
        CONFIG.replace("[model]", '[model]\nnorm = "batch"')
        + '[[arms]]\nstrategy = "naive"\n'
        + PRIVATE.removeprefix(CONFIG),
        "BatchNorm",
    ),
    "statistics of a batch under privacy": (
        PRIVATE.replace("[model]", '[model]\nnorm = "batch"'),
        "BatchNorm",
    ),
    "a budget of one experience for two": (
        PRIVATE.replace("noise_multiplier = 1.0", "epsilon = 8.0\nhorizon = 1"),
        "horizon",
    ),
    "a loss that couples private records": (
        PRIVATE.replace('"naive"', '"mir"\nmemory_size = 8'),
        "MIR",
    ),
    "few records for the clients": (
        FEDERATED.replace("min_size = 2", "min_size = 13"),
        "federation.min_size = 13 is not allowed; allowed: at most 12",
    ),
    "an unknown attribute": (
        FEDERATED + BY_DOMAIN.replace("domain", "ward"),
        "no attribute 'ward'",
    ),
    "another number of clients": (
        FEDERATED.replace("clients = 2", "clients = 3") + BY_DOMAIN,
        "federation.clients = 3 is not allowed; allowed: one client for each value of domain",
    ),
    "private clients without sizes": (
        PRIVATE + FEDERATED.removeprefix(CONFIG) + BY_DOMAIN,
        "federation.client_sizes = None",
    ),
    "few clients for Krum": (
        FEDERATED + 'aggregator = "Krum"\naggregator_options = {num_malicious_nodes = 1}\n',
        "at least 5 clients a round; a round has 2",
    ),
    "few holders of an experience for Krum": (
        CONFIG + SIX + 'aggregator = "Krum"\naggregator_options = {num_malicious_nodes = 1}\n',
        "at least 5 clients a round; a round has 3",
    ),
    "few holders of an experience for mixing": (
        CONFIG
        + SIX
        + 'aggregator = "FedMedian"\n'
        + 'pre_aggregators = [{name = "nearest_neighbours", hostile = 2}]\n',
        "fewer than half of the updates that it gets, which are 3",
    ),
}


@pytest.fixture
def perdure(monkeypatch, capfd, tmp_path):
    """Call the command in an empty folder; return (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["perdure", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capfd.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return call


@pytest.mark.parametrize("case", REFUSED)
def test_config_refuses_what_run_refuses(perdure, tmp_path, case):
    text, words = REFUSED[case]
    (tmp_path / "mine.toml").write_text(text)
    code, out, err = perdure("config", "mine.toml")
    assert (code, out) == (2, "")
    assert words in err and err.count("\n") == 1
    assert perdure("run", "mine.toml") == (code, out, err)
    assert not (tmp_path / "runs" / "small" / "arms").exists(), "nothing was trained"


@pytest.mark.parametrize(
    "text",
    [
        CONFIG,
        PRIVATE,
        FEDERATED + BY_DOMAIN,
        CONFIG + SIX,
        PRIVATE + FEDERATED.removeprefix(CONFIG) + "fraction = 0.5\n",
    ],
)
def test_config_accepts_what_can_be_trained_and_writes_nothing(perdure, tmp_path, text):
    (tmp_path / "mine.toml").write_text(text)
    code, out, err = perdure("config", "mine.toml")
    assert (code, err) == (0, "") and out.startswith("naive-p")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]
