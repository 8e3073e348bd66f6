import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from helpers.strategy_examples import moved
from perdure.contract.context import Spec, contexts
from perdure.contract.forward import Forward
from perdure.contract.state import State
from perdure.data.records import Batch
from perdure.errors import ConfigError, StrategyError
from perdure.learner.learner import Learner
from perdure.models.classifiers import mlp
from perdure.models.low_rank_adapters import adapted
from perdure.models.vision_transformer import transformer
from perdure.privacy.settings import Privacy
from perdure.strategies import LoRA

WIDTH = 8
RANK = 3


def backbone(input_shape=(5,)):
    return transformer(
        input_shape=input_shape, num_classes=1, seed=0, patch=1, width=WIDTH, depth=2, heads=2
    ).body


def model_of(stream, experiences=2, **changes):
    return adapted(
        backbone(), num_classes=stream.num_classes, experiences=experiences, rank=RANK, **changes
    )


def learner_of(stream, strategy=None, model=None, **changes):
    options = {"optimizer": partial(torch.optim.Adam, lr=0.02), "iterations": 10, "batch_size": 8}
    return Learner(
        model=model or model_of(stream), strategy=strategy or LoRA(), **options | changes
    )


def spec_of(model, experiences, scenario="class"):
    return Spec(
        params=dict(model.named_parameters()),
        num_classes=4,
        num_experiences=experiences,
        scenario=scenario,
        feature_size=WIDTH,
    )


def bits(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("done", [0, 1, 2])
def test_the_lora_penalty_equals_the_formula_of_the_paper(toy_stream, done):
    """The reference is a loop over rows of A: the present set against every earlier set, in every
    projection.
    """
    model = moved(model_of(toy_stream(), experiences=3))
    params = dict(model.named_parameters())
    expected = 0.0
    for block in range(2):
        for projection in ("query", "value"):
            sets = [params[f"body.adapters.{t}.{block}.{projection}.down.weight"] for t in range(3)]
            for earlier in sets[:done]:
                expected += sum(
                    float(a @ b) ** 2 for a in earlier.detach() for b in sets[done].detach()
                )
    penalty = LoRA(strength=0.7).penalty(
        params, State({"done": torch.tensor(float(done))}, {"done": "mean"})
    )
    assert (expected > 0.1) == (done > 0)
    assert float(penalty.detach()) == pytest.approx(0.7 * expected, rel=1e-4)


def test_the_lora_loss_covers_the_classes_of_one_experience(toy_stream):
    stream = toy_stream()
    model = moved(model_of(stream))
    at = contexts(stream, "cpu")(1)
    old, new = (Batch.current(stream[k].train, k) for k in range(2))
    expected = [
        F.cross_entropy(
            model(rows.inputs)[:, 2 * k : 2 * k + 2], rows.labels - 2 * k, reduction="none"
        )
        for k, rows in enumerate((old, new))
    ]
    both = Batch.from_tensors(
        {n: torch.cat([value, new.tensors()[n]]) for n, value in old.tensors().items()}
    )
    losses = LoRA().losses(Forward(model), both, at, State())
    # rows of memory too, where it is combined with one
    torch.testing.assert_close(losses, torch.cat(expected))


def test_lora_sets_add_nothing_until_they_are_trained():
    model = adapted(backbone(), num_classes=4, experiences=3, rank=RANK, scale=0.5)
    body = backbone()
    x = torch.rand(6, 5)
    assert torch.equal(model.features(x), body(x))
    moved(model)
    merged = copy.deepcopy(body)
    with torch.no_grad():
        for number, block in enumerate(merged.blocks):
            for sets in model.body.adapters:
                for name in ("query", "value"):
                    low = getattr(sets[number], name)
                    getattr(block.attention, name).weight.add_(
                        0.5 * low.up.weight @ low.down.weight
                    )
    torch.testing.assert_close(model.features(x), merged(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.features(x), body(x), atol=0.01)


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    ],
)
def test_lora_trains_only_the_newest_adapters_and_the_head(toy_stream, optimizer):
    stream = toy_stream()
    learner = learner_of(stream, optimizer=optimizer)
    learner.prepare(stream)
    for index in range(2):
        before = bits(learner.model)
        learner.begin(index)
        learner.train(learner.training.block(learner.position.experience, 0, 1))
        learner.finish()
        now = bits(learner.model)
        changed = {name for name in now if not torch.equal(now[name], before[name])}
        assert changed == {
            name for name in now if name.startswith(("head.", f"body.adapters.{index}."))
        }
    assert float(learner.state["done"]) == 2


def test_lora_keeps_old_head_rows_with_a_new_optimizer(toy_stream):
    stream = toy_stream()
    heads = []

    def look(point, learner):
        if point == "experience.end":
            heads.append(bits(learner.model)["head.weight"])

    learner_of(stream, reset_optimizer=True, callbacks=[look]).fit(stream)
    assert torch.equal(heads[0][:2], heads[1][:2]) and not torch.equal(heads[0][2:], heads[1][2:])


def test_the_lora_penalty_keeps_adapter_sets_orthogonal(toy_stream):
    stream = toy_stream()
    overlaps = []
    for strength in (0.0, 1.0):
        learner = learner_of(stream, LoRA(strength=strength), iterations=50)
        learner.fit(stream)
        second = State({"done": torch.ones(())}, {"done": "mean"})
        overlaps.append(float(LoRA(strength=1.0).penalty(bits(learner.model), second)))
    assert overlaps[1] < 0.1 * overlaps[0]


def test_private_lora_releases_only_gradients_of_trained_weights(toy_stream):
    stream = toy_stream()
    asked = []
    learner = learner_of(stream, privacy=Privacy(noise_multiplier=1.0, seed=0))
    learner.prepare(stream)
    real = learner.private_sum.gradient

    def listen(clipped, params, *, step):
        asked.append(set(params))
        return real(clipped, params, step=step)

    learner.private_sum.gradient = listen
    learner.begin(0)
    learner.train(range(2))
    own = {name for name in learner.params if name.startswith(("head.", "body.adapters.0."))}
    assert asked == [own, own] and len(own) < len(learner.params)


def test_lora_refuses_a_model_with_too_few_adapter_sets(toy_stream):
    stream = toy_stream()
    plain = mlp(input_shape=(5,), num_classes=4, seed=0)
    with pytest.raises(
        StrategyError,
        match=r"'body.adapters.0.'; LoRA needs .*perdure.models.adapted\(backbone, num_classes=4",
    ):
        learner_of(stream, model=plain).prepare(stream)
    with pytest.raises(StrategyError, match=r"'body.adapters.2.'.* experiences=3\)"):
        LoRA().init(spec_of(model_of(stream), 3))
    with pytest.raises(StrategyError, match=r"'classifier.'"):
        LoRA(head="classifier.").init(spec_of(model_of(stream), 2))


def test_lora_refuses_numbers_out_of_range():
    with pytest.raises(ConfigError, match=r"lora.strength = -1"):
        LoRA(strength=-1)
    for name in ("rank", "experiences", "num_classes"):
        with pytest.raises(ConfigError, match=f"{name} = 0"):
            adapted(backbone(), **{"num_classes": 4, "experiences": 2} | {name: 0})
