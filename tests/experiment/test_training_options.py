"""Options of [training] reach the learner, and averages work in a federation."""

from functools import partial

import pytest
import torch
from torchvision.transforms import v2

from helpers.learners import bits, same_bits
from perdure.data import Mixup, Views, iid
from perdure.errors import ConfigError
from perdure.experiment.arm import ArmRun
from perdure.experiment.config import parse
from perdure.experiment.metrics_log import MetricsLog
from perdure.federated import Federation, run_federation
from perdure.learner import EMA, SAM, SWA, Learner, Validation, WarmUp
from perdure.strategies import Naive

CONFIG = """
name = "options"
[training]
iterations = 2
warmup = 0.5
l1 = 1e-4
l2 = 1e-3
gradient_noise = 1e-5
weight_noise = 1e-2
schedule = {name = "CosineAnnealingLR"}
averaging = {name = "swa", start = 0.5}
sharpness = {rho = 0.1}
mixing = {name = "mixup", alpha = 0.3}
validation = {share = 0.2, every = 1, patience = 2, keep_best = false}
[[arms]]
strategy = "naive"
"""


def test_a_config_gives_its_options_to_the_learner(toy_stream, tmp_path):
    config = parse(CONFIG)
    stream = toy_stream()
    log = MetricsLog(tmp_path / "metrics.jsonl")
    learner = ArmRun(config, config.arms[0], stream, tmp_path, log).learner(stream)
    assert learner.averaging == SWA(start=0.5) and learner.sharpness == SAM(rho=0.1)
    assert (learner.l1, learner.l2) == (1e-4, 1e-3)
    assert (learner.gradient_noise, learner.weight_noise) == (1e-5, 1e-2)
    assert learner.validation == Validation(share=0.2, every=1, patience=2, keep_best=False)
    assert learner.mixing == Mixup(alpha=0.3)
    assert learner.scheduler == WarmUp(steps=0.5, then=config.training.schedule)


def test_a_config_refuses_mixed_pairs_for_private_arms():
    private = CONFIG.replace("validation =", "# ") + "private = true\n[privacy]\nepsilon = 1.0\n"
    with pytest.raises(ConfigError, match=r"training\.mixing .*two rows"):
        parse(private)


@pytest.fixture
def federated(toy_stream, toy_model):
    def run(averaging, folder=None, callbacks=()):
        streams = iid(toy_stream(), clients=2, seed=0)

        def make(client):
            return Learner(
                model=toy_model(toy_stream()),
                strategy=Naive(),
                optimizer=partial(torch.optim.SGD, lr=0.1),
                iterations=4,
                blocks=2,
                batch_size=4,
                averaging=averaging,
            )

        federation = Federation(clients=2, rounds=2)
        server = run_federation(make, streams, federation, folder=folder, callbacks=callbacks)
        return bits(server.learner.model.state_dict())

    return run


def test_clients_answer_with_the_average_of_their_round(federated):
    plain = federated(None)
    assert not same_bits(plain, federated(EMA(decay=0.5)))
    # the average of the last step alone is that step
    assert same_bits(plain, federated(EMA(decay=0.0)))


def test_a_federation_with_averages_resumes_bit_identically(federated, tmp_path):
    def stop(point, server):
        if point == "round.received" and server.exchange == 4:
            raise KeyboardInterrupt

    averaging = SWA(start=0.0)
    with pytest.raises(KeyboardInterrupt):
        federated(averaging, tmp_path, callbacks=[stop])
    assert same_bits(federated(averaging, tmp_path), federated(averaging))


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (
            'count = 4, change = "RandomAffine", degrees = 20, translate = [0.1, 0.1]',
            v2.RandomAffine(degrees=20, translate=[0.1, 0.1]),
        ),
        (
            'count = 2, change = [{name = "RandomInvert"}, {name = "ColorJitter", hue = 0.1}]',
            v2.Compose([v2.RandomInvert(), v2.ColorJitter(hue=0.1)]),
        ),
    ],
)
def test_a_config_makes_transforms_of_torchvision(table, expected):
    config = parse(CONFIG.replace("[[arms]]", f"views = {{{table}}}\n[[arms]]"))
    found = config.training.views.views
    assert found.change.settings == Views(count=1, change=expected).change.settings
