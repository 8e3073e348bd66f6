"""Options of the built-in models in training: dropout that resumes to the bit, and privacy."""

from functools import partial

import pytest
import torch

from perdure import Learner, Privacy
from perdure.errors import GuardError
from perdure.models import ModelConfig, build
from perdure.strategies import Naive

SIMULATED = Privacy(noise_multiplier=1.0, clip_norm=0.5, seed=0)


class StopError(Exception):
    """Interruption of a run."""


def learner_of(config: ModelConfig, stream, **options) -> Learner:
    model = build(config, input_shape=stream.input_shape, num_classes=stream.num_classes, seed=0)
    made = {
        "optimizer": partial(torch.optim.SGD, lr=0.5),
        "iterations": 4,
        "blocks": 2,
        "batch_size": 8,
    }
    return Learner(model=model, strategy=Naive(), **made | options)


def parameters(learner: Learner) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in learner.model.parameters()])


@pytest.mark.parametrize("privacy", [None, SIMULATED], ids=["plain", "private"])
@pytest.mark.parametrize(
    ("activation", "rows"), [("relu", 3), ("prelu", None)], ids=["micro-batches", "vmap"]
)
def test_a_run_with_dropout_resumes_to_the_bit(toy_stream, tmp_path, privacy, activation, rows):
    stream = toy_stream()
    config = ModelConfig(hidden=(6,), dropout=0.4, activation=activation)
    options = {"privacy": privacy, "micro_batch_size": rows}
    whole = learner_of(config, stream, **options)
    whole.fit(stream)

    def stop(point, learner):
        if point == "step.done" and learner.position.step == 3:
            raise StopError

    torch.manual_seed(1)
    with pytest.raises(StopError):
        learner_of(config, stream, folder=tmp_path, callbacks=[stop], **options).fit(stream)
    torch.manual_seed(2)
    again = learner_of(config, stream, folder=tmp_path, **options)
    again.fit(stream)
    assert torch.equal(parameters(whole), parameters(again))
    without = learner_of(ModelConfig(hidden=(6,), activation=activation), stream, **options)
    without.fit(stream)
    assert not torch.equal(parameters(without), parameters(again))


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(hidden=(6, 6, 4), skip=True, norm="layer", activation="silu"),
        ModelConfig(hidden=(6, 6), norm="group", activation="prelu", init="xavier"),
    ],
    ids=["residual", "prelu"],
)
def test_models_with_options_are_private_by_construction(toy_stream, config):
    stream = toy_stream()
    learner = learner_of(config, stream, privacy=SIMULATED, iterations=2)
    learner.fit(stream)
    (entry, *_) = learner.private_sum.ledger.entries
    assert entry.independence == "by construction"


def test_batch_normalisation_of_an_mlp_is_refused_under_privacy(toy_stream):
    stream = toy_stream()
    with pytest.raises(GuardError, match="BatchNorm1d: it mixes the records"):
        learner_of(ModelConfig(hidden=(6,), norm="batch"), stream, privacy=SIMULATED).fit(stream)
    learner_of(ModelConfig(hidden=(6,), norm="batch"), stream).fit(stream)
