"""Low-rank adapters on named layers of any model, with peft as the reference."""

from functools import partial

import pytest
import torch
from torch import nn

from perdure import Learner, Privacy
from perdure.data.scenarios import split
from perdure.errors import ConfigError
from perdure.models import LowRankLinear, decoder, low_rank, wrap
from perdure.strategies import EWC

SGD = partial(torch.optim.SGD, lr=0.5)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.Linear(8, 4)
    )


def moved(model):
    """Return the model with B different from 0, so that A has a gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("up.weight"):
                value.copy_(torch.randn(value.shape, generator=generator))
    return model


def test_new_adapters_change_no_output_and_freeze_other_weights():
    model = net()
    model(torch.randn(9, 5))  # moves the running statistics
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = low_rank(model, modules=("0", "3"), rank=2, trained="4")
    trained = {
        f"{name}.change.{part}.weight": shape
        for name, ins in (("0", 5), ("3", 8))
        for part, shape in (("down", (2, ins)), ("up", (8, 2)))
    } | {"4.weight": (4, 8), "4.bias": (4,)}
    assert {name: tuple(value.shape) for name, value in adapted.named_parameters()} == trained
    assert adapted.state_dict().keys() == trained.keys()
    x = torch.randn(6, 5)
    torch.testing.assert_close(adapted.train()(x), model.eval()(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_low_rank_layers_compute_the_formula_of_the_paper():
    model = moved(low_rank(net()[:1], modules="0", rank=3, scale=0.5))
    (layer,) = model
    assert isinstance(layer, LowRankLinear)
    x = torch.randn(6, 5)
    a, b = layer.change.down.weight, layer.change.up.weight
    expected = nn.functional.linear(x, layer.layer.weight + 0.5 * b @ a, layer.layer.bias)
    torch.testing.assert_close(model(x), expected)


def test_low_rank_finds_layers_by_the_last_parts_of_their_names():
    model = low_rank(
        decoder(input_shape=(8,), vocabulary=9, num_classes=2, width=8, seed=0),
        modules=("query", "attention.value", "body.blocks.0.expand"),
        rank=2,
    )
    adapted = [name for name, part in model.named_modules() if isinstance(part, LowRankLinear)]
    assert adapted == [
        "body.blocks.0.attention.query",
        "body.blocks.0.attention.value",
        "body.blocks.0.expand",
        "body.blocks.1.attention.query",
        "body.blocks.1.attention.value",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules": "q_proj"}, r"modules = 'q_proj' .*model.named_modules\(\), as 0, 3, 4"),
        ({"modules": "2"}, "modules = '2' .*a linear layer, but this is a Tanh"),
        ({"modules": ()}, r"modules = \(\) .*one name of a layer, or more"),
        ({"modules": "0", "trained": "head"}, "trained = 'head' .*as 0, 3, 4"),
        ({"modules": "0", "rank": 0}, "rank = 0 .*whole numbers from 1"),
        ({"modules": "0", "rank": 2.5}, "rank = 2.5 .*whole numbers from 1"),
    ],
)
def test_low_rank_refuses_a_layer_that_cannot_be_adapted(settings, message):
    with pytest.raises(ConfigError, match=message):
        low_rank(net(), **settings)


@pytest.mark.parametrize("privacy", [None, Privacy(noise_multiplier=0.5, seed=0)])
def test_a_strategy_trains_only_the_adapters_of_a_model(toy_data, privacy):
    frozen = net().eval()
    model = wrap(low_rank(frozen, modules=("0", "3"), rank=2, trained="4"), head="4")
    learner = Learner(
        model=model,
        strategy=EWC(strength=1.0),
        optimizer=SGD,
        epochs=2 if privacy else 20,
        batch_size=8,
        privacy=privacy,
    )
    matrix = learner.fit(split(toy_data, scenario="class", experiences=2))
    inner = model.model
    assert torch.equal(inner[0].layer.weight, frozen[0].weight)
    assert all(bool(value.any()) for value in inner.parameters())
    assert privacy or matrix[0, 0] > 90


@pytest.mark.deep(reason="deployment: transformers and peft take ten seconds to import")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, about transformers
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_low_rank_equals_peft_in_outputs_and_gradients(kind):
    import peft
    import transformers

    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.0}
    if kind == "linear":
        config = transformers.LlamaConfig(
            vocab_size=17,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
        model = transformers.LlamaForCausalLM(config)
        names = ["q_proj", "v_proj", "down_proj"]
    else:
        config = transformers.GPT2Config(
            vocab_size=17,
            n_positions=12,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = transformers.GPT2LMHeadModel(config)
        names = ["c_attn", "c_fc"]
        settings["fan_in_fan_out"] = True
    ours = moved(low_rank(model.eval(), modules=names, rank=4, scale=1.5))
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, **settings)).eval()
    pairs = {
        name: name.replace("change.down", "lora_A.default").replace("change.up", "lora_B.default")
        for name, _ in ours.named_parameters()
    }
    others = {
        name.removeprefix("base_model.model."): value
        for name, value in theirs.named_parameters()
        if value.requires_grad
    }
    assert sorted(pairs.values()) == sorted(others)
    own = dict(ours.named_parameters())
    with torch.no_grad():
        for name, other in pairs.items():
            others[other].copy_(own[name])
    tokens = torch.randint(0, 17, (3, 12), generator=torch.Generator().manual_seed(2))
    answers = [each(tokens).logits for each in (ours, theirs)]
    torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-5)
    for answer in answers:
        answer.logsumexp(2).sum().backward()
    for name, other in pairs.items():
        torch.testing.assert_close(own[name].grad, others[other].grad, rtol=1e-5, atol=1e-5)
