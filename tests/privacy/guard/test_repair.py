import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from perdure.errors import GuardError
from perdure.privacy.clipping.bookkeeping import ruled_layers
from perdure.privacy.guard.model_checks import check_model, fix, fixes
from perdure.privacy.guard.repair import RepairedAttention, replacements


def randomised(module, seed=0):
    """Return the module with all parameters drawn again, so that scales differ from 1 and shifts
    from 0.
    """
    place = torch.Generator().manual_seed(seed)
    for param in module.parameters():
        param.data.normal_(generator=place)
    return module


def inputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------- normalisation

NORMS = {
    "2d": nn.BatchNorm2d(48),
    "3d": nn.BatchNorm3d(6, eps=1e-3),
    "frozen": nn.BatchNorm2d(6).requires_grad_(False),
    "scale frozen": nn.BatchNorm2d(6),
    "without scale and shift": nn.BatchNorm2d(6, affine=False),
    "in evaluation mode": nn.BatchNorm2d(6).eval(),
    "synchronised": nn.SyncBatchNorm(6),
    "double": nn.BatchNorm2d(6).double(),
}
NORMS["scale frozen"].weight.requires_grad_(False)


@pytest.mark.parametrize("form", NORMS)
@pytest.mark.parametrize("deep", [False, True])
def test_fix_turns_batch_norm_into_group_norm_with_its_weights(form, deep):
    old = randomised(copy.deepcopy(NORMS[form]))
    model = nn.Sequential(nn.ReLU(), nn.ModuleDict({"norm": old})) if deep else old
    result = fix(model)
    new = result[1]["norm"] if deep else result
    assert type(new) is nn.GroupNorm and new.num_groups == math.gcd(16, old.num_features)
    assert new.eps == old.eps and new.training == old.training
    for name, value in old.named_parameters():
        twin = dict(new.named_parameters())[name]
        assert (
            torch.equal(twin, value)
            and twin.dtype == value.dtype
            and twin.requires_grad == value.requires_grad
        )
        assert twin.data_ptr() != value.data_ptr()
    assert len(list(new.parameters())) == len(list(old.parameters())) and not list(new.buffers())


@pytest.mark.parametrize("shape", [(4, 32), (4, 32, 5)])
def test_batch_norm_of_vectors_becomes_one_group(shape):
    new = fix(nn.BatchNorm1d(32))
    assert new.num_groups == 1
    assert new(inputs(*shape)).std() > 0.5 and new(inputs(1, *shape[1:])).std() > 0.5


def test_fix_replaces_a_layer_used_twice_by_one_layer():
    norm = nn.BatchNorm1d(4)
    result = fix(nn.Sequential(norm, nn.Linear(4, 4), norm))
    assert type(result[0]) is nn.GroupNorm and result[0] is result[2]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("make", [nn.InstanceNorm1d, nn.InstanceNorm2d])
def test_fix_removes_only_running_statistics_of_instance_norm(make, affine):
    old = randomised(make(6, affine=affine, track_running_stats=True))
    new = fix(nn.Sequential(old))[0]
    assert type(new) is make and not list(new.buffers())
    x = inputs(3, 6, 4) if make is nn.InstanceNorm1d else inputs(3, 6, 4, 4)
    assert torch.allclose(new(x), old.train()(x), atol=1e-6)
    assert fixes(make(6, affine=affine)) == ()


def test_fix_removes_instance_norm_statistics_even_if_unused():
    old = nn.InstanceNorm1d(6, track_running_stats=True)
    old.track_running_stats = False
    assert not list(fix(nn.Sequential(old))[0].buffers())


# --------------------------------------------------------------------------- recurrent layers

SHAPES = {
    "plain": {},
    "without bias": {"bias": False},
    "batch first": {"batch_first": True},
    "two layers, both ways": {"num_layers": 2, "bidirectional": True},
    "dropout between": {"num_layers": 2, "dropout": 0.5},
}


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN, partial(nn.RNN, nonlinearity="relu")])
def test_fix_turns_recurrent_layers_into_equal_opacus_layers(make, form):
    old = make(5, 6, **SHAPES[form]).eval()
    result = fix(nn.ModuleDict({"deep": nn.ModuleList([old])}).eval())["deep"][0]
    assert type(result).__name__ == f"DP{type(old).__name__}" and not result.training
    left, state = result(inputs(4, 3, 5))
    expected, expected_state = old(inputs(4, 3, 5))
    assert torch.allclose(left, expected, atol=1e-6)
    for mine, theirs in zip(
        *(s if isinstance(s, tuple) else (s,) for s in (state, expected_state)), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-6)
    assert set(dict(old.named_parameters())) == set(dict(result.named_parameters()))


def test_fix_keeps_precision_and_frozen_weights_of_an_lstm():
    old = nn.LSTM(5, 6).double()
    old.weight_ih_l0.requires_grad_(False)
    new = fix(old)
    assert {name for name, p in new.named_parameters() if not p.requires_grad} == {"weight_ih_l0"}
    assert {p.dtype for p in new.parameters()} == {torch.float64}
    assert not new.l0.ih.weight.requires_grad


@pytest.mark.filterwarnings("ignore:dropout option adds dropout:UserWarning")
def test_fix_ignores_dropout_of_a_one_layer_lstm_as_torch_does():
    old = nn.LSTM(5, 6, dropout=0.9).train()
    assert torch.allclose(fix(old)(inputs(4, 3, 5))[0], old(inputs(4, 3, 5))[0], atol=1e-6)


def test_fix_refuses_layers_without_a_safe_replacement():
    with pytest.raises(GuardError, match="1 is LSTM"):
        fix(nn.Sequential(nn.BatchNorm1d(5), nn.LSTM(5, 6, proj_size=2)))
    with pytest.raises(GuardError, match="0 is MultiheadAttention with dropout"):
        fix(nn.Sequential(nn.MultiheadAttention(8, 2, dropout=0.1, add_bias_kv=True)))


# --------------------------------------------------------------------------- attention


def masks(heads, n, length, sources):
    place = torch.Generator().manual_seed(3)
    true = torch.rand(length, sources, generator=place) < 0.3
    true[:, 0] = False
    padding = torch.rand(n, sources, generator=place) < 0.3
    padding[:, 0] = False
    number = torch.randn(n * heads, length, sources, generator=place)
    return {
        "no mask": {},
        "truth values": {"attn_mask": true},
        "numbers": {"attn_mask": number[0]},
        "numbers for each head": {"attn_mask": number},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": true, "key_padding_mask": padding},
    }


@pytest.mark.parametrize("mask", masks(1, 1, 1, 1))
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 7}])
@pytest.mark.parametrize("heads", [1, 4])
def test_repaired_attention_equals_torch_attention(heads, options, batch_first, mask):
    old = randomised(
        nn.MultiheadAttention(8, heads, dropout=0.3, batch_first=batch_first, **options)
    ).eval()
    new = fix(old)
    assert type(new) is RepairedAttention and new.dropout.p == 0.3
    turn = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    q = turn(inputs(3, 4, 8))
    k = turn(inputs(3, 5, old.kdim, seed=1))
    v = turn(inputs(3, 5, old.vdim, seed=2))
    for more in ({}, {"average_attn_weights": False}, {"need_weights": False}):
        (left, seen), (expected, expected_seen) = (
            m(q, k, v, **masks(heads, 3, 4, 5)[mask], **more) for m in (new, old)
        )
        assert torch.allclose(left, expected, rtol=1e-4, atol=1e-5)
        assert seen is expected_seen is None or torch.allclose(
            seen, expected_seen, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("options", [{"batch_first": True}, {}])
def test_a_torch_transformer_works_with_repaired_attention(options, gradients):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, **options)
    with pytest.warns(UserWarning, match="nested_tensor") if not options else torch.enable_grad():
        old = nn.TransformerEncoder(layer, 2).eval()
    assert [line.split(":")[0] for line in fixes(old)] == [
        "layers.0.self_attn",
        "layers.1.self_attn",
    ]
    new = fix(old)
    x = inputs(4, 4, 8)
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    padding = torch.zeros(4, 4, dtype=torch.bool)
    with torch.set_grad_enabled(gradients):
        for more in ({}, {"mask": causal}, {"mask": causal, "is_causal": True}):
            assert torch.allclose(new(x, **more), old(x, **more), atol=1e-5)
        assert torch.allclose(new(x, src_key_padding_mask=padding), old(x), atol=1e-5)
    assert not torch.equal(new.train()(x), new(x))


def test_repaired_attention_uses_dropout_only_in_training():
    new = fix(nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)).train()
    x = inputs(3, 4, 8)
    seen = new(x, x, x, average_attn_weights=False)[1]
    assert 0.2 < float((seen == 0).double().mean()) < 0.8
    assert not bool((new.eval()(x, x, x)[1] == 0).any())


def test_repaired_attention_has_clipping_rules():
    model = fix(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True))
    assert ruled_layers(model, dict(model.named_parameters())) is not None
    assert [type(m) for n, m in model.named_modules() if n in ("self_attn", "multihead_attn")] == [
        RepairedAttention
    ] * 2


# --------------------------------------------------------------------------- the repair as a whole


def whole():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(4, 8, 3),
        nn.BatchNorm1d(8),
        nn.InstanceNorm1d(8, track_running_stats=True),
        nn.LSTM(6, 5),
        nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, dropout=0.1)}),
        nn.Linear(5, 3),
    )


def test_fix_reports_its_changes_and_keeps_the_given_model():
    model = whole()
    types = [type(m) for m in model.modules()]
    state = {n: v.clone() for n, v in model.state_dict().items()}
    before = torch.random.get_rng_state()
    assert fixes(model) == (
        "1: BatchNorm1d -> GroupNorm(1, 8, eps=1e-05, affine=True, bias=True)",
        "2: InstanceNorm1d -> InstanceNorm1d(8, eps=1e-05, momentum=0.1, affine=False, bias=False, "
        "track_running_stats=False)",
        "3: LSTM -> DPLSTM",
        "4.attention: MultiheadAttention -> RepairedAttention",
    )
    result = fix(model)
    assert torch.equal(before, torch.random.get_rng_state())
    assert [type(m) for m in model.modules()] == types
    assert all(torch.equal(state[n], v) for n, v in model.state_dict().items())
    assert not {p.data_ptr() for p in result.parameters()} & {
        p.data_ptr() for p in model.parameters()
    }
    assert fixes(result) == () and replacements(result) == {}
    with pytest.raises(GuardError, match=r"fix\(model\)"):
        check_model(model)


def test_fix_returns_an_equal_copy_of_a_model_without_faults():
    model = nn.Sequential(nn.Linear(5, 6), nn.GroupNorm(2, 6))
    result = fix(model)
    assert result is not model and all(
        torch.equal(a, b) for a, b in zip(result.parameters(), model.parameters(), strict=True)
    )


# -------------------------------------------------------------- why Opacus's own repair is not used


@pytest.mark.reference
def test_the_repair_of_opacus_still_has_known_faults():
    from opacus.validators import ModuleValidator

    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = inputs(3, 4, 8)
    assert not torch.allclose(
        ModuleValidator.fix(attention)(x, x, x)[0], attention(x, x, x)[0], atol=0.01
    )
    instance = ModuleValidator.fix(nn.InstanceNorm1d(4, affine=True, track_running_stats=True))
    instance(inputs(3, 4, 5) + 1)
    assert float(instance.running_mean.abs().sum()) > 0
    frozen = nn.BatchNorm1d(4).requires_grad_(False)
    plain = nn.BatchNorm1d(4, affine=False)
    assert [type(ModuleValidator.fix(norm)) for norm in (frozen, plain)] == [nn.BatchNorm1d] * 2
    norm = randomised(nn.BatchNorm1d(4))
    assert not torch.equal(ModuleValidator.fix(norm).weight, norm.weight)
    assert type(ModuleValidator.fix(nn.RNN(4, 4))) is nn.RNN
