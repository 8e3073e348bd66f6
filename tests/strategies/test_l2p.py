from functools import partial

import pytest
import torch
import torch.nn.functional as F

from perdure.contract.context import contexts
from perdure.contract.forward import Forward
from perdure.contract.state import State
from perdure.data.records import Batch
from perdure.errors import ConfigError, StrategyError
from perdure.learner.learner import Learner
from perdure.models.classifiers import mlp
from perdure.models.prompts import prompted
from perdure.models.vision_transformer import tiny
from perdure.strategies import L2P
from perdure.testing import check_strategy


def model_of(stream, **changes):
    options = {"pool": 5, "length": 2, "chosen": 2} | changes
    return prompted(tiny(stream.input_shape), num_classes=stream.num_classes, **options)


def learner_of(stream, strategy=None, model=None, **changes):
    options = {"optimizer": partial(torch.optim.Adam, lr=0.02), "iterations": 20, "batch_size": 8}
    return Learner(model=model or model_of(stream), strategy=strategy or L2P(), **options | changes)


def similarity(model, x):
    with torch.no_grad():
        return model.matched(x)[1]


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
@torch.no_grad()
def test_the_l2p_loss_equals_the_formula_of_the_paper(toy_stream, scenario):
    stream = toy_stream(scenario)
    model = model_of(stream)
    at = contexts(stream, "cpu")(1)
    batch = Batch.current(stream[1].train, 1)
    own = slice(None) if scenario == "domain" else slice(2, 4)
    entropy = F.cross_entropy(
        model(batch.inputs)[:, own], batch.labels - (own.start or 0), reduction="none"
    )
    pull = torch.stack([1 - row[0] + 1 - row[1] for row in similarity(model, batch.inputs)])
    losses = L2P(strength=0.7).losses(Forward(model), batch, at, State())
    torch.testing.assert_close(losses, entropy + 0.7 * pull)


def test_l2p_training_moves_keys_towards_their_queries(toy_stream):
    stream = toy_stream()
    ends = []
    for strength in (0.0, 1.0):
        learner = learner_of(stream, L2P(strength=strength))
        start = {name: value.detach().clone() for name, value in learner.params.items()}
        learner.fit(stream)
        ends.append(float(similarity(learner.model, stream[1].test.inputs).mean()))
        moved = not torch.equal(
            learner.params["body.keys.weight"].detach(), start["body.keys.weight"]
        )
        assert moved == (strength > 0), "nothing but the pull may move a key"
    assert ends[1] > ends[0] + 0.2


def test_l2p_keeps_old_head_rows_with_a_new_optimizer(toy_stream):
    stream = toy_stream()
    heads = []

    def look(point, learner):
        if point == "experience.end":
            heads.append(learner.params["head.weight"].detach().clone())

    learner_of(stream, reset_optimizer=True, callbacks=[look]).fit(stream)
    assert torch.equal(heads[0][:2], heads[1][:2]) and not torch.equal(heads[0][2:], heads[1][2:])


def test_l2p_passes_check_strategy_on_task_streams():
    assert "private" in check_strategy(L2P(), scenario="task").passed


def test_l2p_refuses_a_model_without_a_prompt_pool(toy_stream):
    stream = toy_stream()
    with pytest.raises(
        StrategyError, match=r"L2P needs perdure.models.prompted\(backbone, num_classes=4\)"
    ):
        learner_of(stream, model=mlp(input_shape=(5,), num_classes=4, seed=0)).prepare(stream)


def test_l2p_refuses_a_negative_strength():
    with pytest.raises(ConfigError, match=r"l2p.strength = -0.5"):
        L2P(strength=-0.5)
