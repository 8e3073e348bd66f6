"""The transformer: equal to PyTorch's layers and torchvision's model, per row, and with clipping
rules.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perdure.contract.forward import Forward
from perdure.data.records import Batch, Records
from perdure.errors import ConfigError
from perdure.learner.learner import Learner
from perdure.models.low_rank_adapters import adapted
from perdure.models.prompts import Prompted, composed, prompted
from perdure.models.vision_transformer import (
    Addition,
    Attention,
    Block,
    Transformer,
    fixed,
    from_timm,
    patches,
    tiny,
    transformer,
)
from perdure.privacy.clipping.bookkeeping import clipped_gradient_sum
from perdure.privacy.clipping.clip import Clip, clipped_sum
from perdure.privacy.guard.model_checks import check_buffers, check_model
from perdure.privacy.settings import Privacy
from perdure.queries.per_record import gradient_rows
from perdure.strategies import Naive

SHAPE = (2, 8, 12)
N = 5


def images(n=N, shape=SHAPE, seed=0):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def model(**changes):
    return transformer(
        input_shape=SHAPE, num_classes=4, seed=0, **{"width": 12, "depth": 2, "heads": 3} | changes
    )


def moved(module, scale=0.3):
    """Return the module with weights that are nowhere 0 or 1, so that every weight has an
    effect.
    """
    place = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in module.parameters():
            value.add_(scale * torch.randn(value.shape, generator=place))
    return module


MODELS = {
    "open": lambda: moved(model()),
    "adapted": lambda: moved(adapted(model().body, num_classes=4, experiences=2, rank=2)),
    "prompted": lambda: moved(prompted(model().body, num_classes=4, pool=4, length=2, chosen=2)),
    "composed": lambda: moved(
        composed(model().body, num_classes=4, experiences=2, components=3, length=2)
    ),
}
every = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


# --------------------------------------------------------------------------- against others


def multihead(own):
    """Return PyTorch's attention with the same weights."""
    theirs = nn.MultiheadAttention(own.query.in_features, own.heads, batch_first=True)
    parts = [own.query, own.key, own.value]
    theirs.load_state_dict(
        {
            "in_proj_weight": torch.cat([part.weight for part in parts]),
            "out_proj.weight": own.output.weight,
            "in_proj_bias": torch.cat([part.bias for part in parts]),
            "out_proj.bias": own.output.bias,
        }
    )
    return theirs


@pytest.mark.reference
def test_attention_equals_pytorch_attention():
    own = moved(Attention(12, 3))
    x = torch.randn(4, 7, 12)
    torch.testing.assert_close(
        own(x), multihead(own)(x, x, x, need_weights=False)[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.reference
def test_a_prefix_adds_keys_and_values_to_attention():
    own = moved(Attention(12, 3))
    x = torch.randn(4, 7, 12)
    query = nn.Linear(12, 12, bias=False)
    value = nn.Linear(12, 12, bias=False)
    keys = torch.randn(4, 2, 12)
    values = torch.randn(4, 2, 12)
    plain = multihead(own)
    with torch.no_grad():  # its own projections do nothing: it is given what is projected already
        plain.in_proj_weight.copy_(torch.eye(12).repeat(3, 1))
        plain.in_proj_bias.zero_()
    more = torch.cat([keys, own.key(x)], 1), torch.cat([values, own.value(x) + value(x)], 1)
    expected = plain(own.query(x) + query(x), *more, need_weights=False)[0]
    addition = Addition(query=query, value=value, keys=keys, values=values)
    torch.testing.assert_close(own(x, addition), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.reference
def test_a_transformer_block_equals_the_encoder_layer_of_pytorch():
    own = moved(Block(12, 3, 20))
    x = torch.randn(4, 7, 12)
    theirs = nn.TransformerEncoderLayer(
        12,
        3,
        20,
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=1e-6,
        batch_first=True,
        norm_first=True,
    )
    theirs.self_attn = multihead(own.attention)
    for name, part in (
        ("norm1", own.norm1),
        ("norm2", own.norm2),
        ("linear1", own.expand),
        ("linear2", own.contract),
    ):
        getattr(theirs, name).load_state_dict(part.state_dict())
    torch.testing.assert_close(own(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_patches_equal_the_patches_of_a_convolution():
    x = images()
    layer = nn.Conv2d(2, 6, 4, stride=4)
    ours = F.linear(patches(x, 4), layer.weight.flatten(1), layer.bias)
    torch.testing.assert_close(ours, layer(x).flatten(2).mT, rtol=1e-4, atol=1e-5)
    assert patches(torch.arange(12.0).view(2, 6), 3).tolist() == [
        [[0, 1, 2], [3, 4, 5]],
        [[6, 7, 8], [9, 10, 11]],
    ]


def torchvision_weights():
    """Return a small model of torchvision and its weights under timm's names."""
    from torchvision.models import VisionTransformer

    theirs = moved(
        VisionTransformer(
            image_size=8,
            patch_size=4,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            mlp_dim=20,
            num_classes=7,
        ),
        scale=0.1,
    )
    theirs.heads = nn.Identity()
    names = {
        "class_token": "cls_token",
        "conv_proj": "patch_embed.proj",
        "encoder.pos_embedding": "pos_embed",
        "encoder.layers.encoder_layer_": "blocks.",
        "ln_1": "norm1",
        "ln_2": "norm2",
        "encoder.ln": "norm",
        "self_attention.in_proj_": "attn.qkv.",
        "self_attention.out_proj": "attn.proj",
        "mlp.0": "mlp.fc1",
        "mlp.3": "mlp.fc2",
    }
    weights = {}
    for name, value in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = value
    return theirs.eval(), weights


@pytest.mark.reference
def test_timm_weights_give_the_outputs_of_torchvision(tmp_path):
    from safetensors.torch import save_file

    theirs, weights = torchvision_weights()
    x = images(shape=(3, 8, 8))
    head = {"head.weight": torch.rand(7, 12), "head.bias": torch.rand(7)}
    save_file(
        {name: value.contiguous() for name, value in (weights | head).items()},
        tmp_path / "vit.safetensors",
    )
    for given in (weights, tmp_path / "vit.safetensors", str(tmp_path / "vit.safetensors")):
        torch.testing.assert_close(from_timm(given, heads=3)(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_from_timm_refuses_other_weights_by_name(tmp_path):
    _, weights = torchvision_weights()
    with pytest.raises(
        ConfigError, match=r"the weights have an entry blocks.0.ls1.gamma, which this model"
    ):
        from_timm(weights | {"blocks.0.ls1.gamma": torch.ones(12)}, heads=3)
    with pytest.raises(ConfigError, match=r"the weights have no entry 'cls_token'"):
        from_timm({name: value for name, value in weights.items() if name != "cls_token"}, heads=3)
    with pytest.raises(ConfigError, match=r"weights do not fit .*positions"):
        from_timm(weights | {"pos_embed": torch.rand(1, 7, 12)}, heads=3)
    (tmp_path / "broken.safetensors").write_bytes(b"?")
    for path in (tmp_path / "broken.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(ConfigError, match=r"cannot be read .*; give a file of safetensors"):
            from_timm(path, heads=3)


# --------------------------------------------------------------------------- rows and gradients


@every
def test_transformer_rows_are_equal_alone_and_in_a_batch(make):
    own = make()
    x = images()
    params = dict(own.named_parameters())
    alone = torch.func.vmap(lambda row: torch.func.functional_call(own, params, (row[None],))[0])(x)
    torch.testing.assert_close(alone, own(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own(x[2:3]), own(x)[2:3], rtol=1e-4, atol=1e-5)
    assert torch.equal(own(x), own.head(own.features(x))) and own.features(x).shape == (
        N,
        own.feature_size,
    )


@pytest.mark.reference
@every
def test_transformer_book_keeping_equals_a_loop_over_records(make):
    own = make()
    batch = Batch.current(Records(inputs=images(), labels=torch.arange(N) % 4), 0)
    params = dict(own.named_parameters())

    def losses(forward, rows):
        logits = forward(rows.inputs)
        pull = 0.0
        if isinstance(own, Prompted):  # nothing else moves its keys
            logits, similarity = forward.method("matched")(rows.inputs)
            pull = (1 - similarity).sum(1)
        return (1 + 20 * (rows.labels == 2)) * (
            F.cross_entropy(logits, rows.labels, reduction="none") + pull
        )

    clip = Clip(norm=2.0)
    kept = clipped_gradient_sum(own, params, lambda: losses(Forward(own), batch), N, clip)
    one_by_one = clipped_sum(gradient_rows(losses, own), params, batch.tensors(), clip, 64)
    assert kept is not None, "a layer has no rule, so that every step would go record by record"
    for name in params:
        torch.testing.assert_close(kept[name], one_by_one[name], rtol=1e-3, atol=1e-5)
        assert float(kept[name].abs().max()) > 0, name


@every
def test_the_guard_accepts_a_transformer_and_its_trained_parts(make):
    own = make()
    check_model(own)
    check_buffers(own, images())
    assert set(own.state_dict()) == {name for name, _ in own.named_parameters()}


def test_private_training_of_a_whole_transformer_runs(toy_stream):
    stream = toy_stream()
    own = transformer(input_shape=(5,), num_classes=4, seed=0, patch=1, width=8, depth=1, heads=2)
    learner = Learner(
        model=own,
        strategy=Naive(),
        optimizer=torch.optim.SGD,
        iterations=2,
        privacy=Privacy(noise_multiplier=1.0, seed=0),
    )
    assert learner.fit(stream).isfinite().all()


# --------------------------------------------------------------------------- building


def test_transformer_parameters_depend_only_on_the_seed():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = (
        transformer(input_shape=(6,), num_classes=3, seed=s, patch=2) for s in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    for (name, value), same in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(value, same), name
    assert not torch.equal(first.head.weight, other.head.weight)
    assert torch.equal(tiny((6,))(torch.ones(1, 6)), tiny((6,))(torch.ones(1, 6)))


def test_a_fixed_copy_of_a_transformer_has_equal_outputs():
    body = model().body
    x = images()
    copied = fixed(body)
    assert (
        torch.equal(copied(x), body(x))
        and not [*copied.parameters()]
        and len([*body.parameters()]) > 20
    )
    assert not copied.state_dict() and not copied(x).requires_grad
    with torch.no_grad():
        body.embed.weight.zero_()
    assert not torch.equal(copied(x), body(x))


def test_stored_transformer_weights_can_be_loaded(tmp_path):
    from safetensors.torch import load_file, save_file

    body = moved(model()).body
    save_file(body.state_dict(), tmp_path / "body.safetensors")
    other = Transformer(input_shape=SHAPE, patch=4, width=12, depth=2, heads=3)
    other.load_state_dict(load_file(tmp_path / "body.safetensors"))
    assert torch.equal(other(images()), body(images()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 0}, "patch = 0"),
        ({"depth": 0}, "depth = 0"),
        ({"width": 0}, "width = 0"),
        ({"heads": 0}, "heads = 0"),
        ({"heads": 5}, "heads = 5 .* divisors of the width 12"),
        ({"num_classes": 0}, "num_classes = 0"),
        ({"patch": 3}, r"input_shape = \(2, 8, 12\) .* multiples of patch = 3"),
        ({"input_shape": (8, 8)}, r"input_shape = \(8, 8\)"),
        ({"input_shape": ()}, r"input_shape = \(\)"),
    ],
)
def test_a_transformer_refuses_shapes_that_do_not_fit(changes, message):
    fitting = {"input_shape": SHAPE, "num_classes": 4, "width": 12, "heads": 3}
    with pytest.raises(ConfigError, match=message):
        transformer(seed=0, **fitting | changes)


@pytest.mark.parametrize("make", [adapted, prompted, composed])
def test_adapters_and_prompts_refuse_a_backbone_of_another_class(make):
    more = {} if make is prompted else {"experiences": 2}
    with pytest.raises(
        ConfigError,
        match=r"backbone = 'Linear' .*perdure.models.vision_transformer.Transformer.*from_timm",
    ):
        make(nn.Linear(3, 3), num_classes=4, **more)
