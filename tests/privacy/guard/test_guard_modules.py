"""Modules that the guard refuses, and tests of the reasons."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from perdure.errors import GuardError
from perdure.privacy.guard.loss_checks import check_losses, check_rows
from perdure.privacy.guard.model_checks import check_buffers, check_model

INPUTS = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])

RECURRENT = {"LSTM": nn.LSTM(5, 6), "GRU": nn.GRU(5, 6), "RNN": nn.RNN(5, 6)}
CELLS = {"LSTMCell": nn.LSTMCell(5, 6), "GRUCell": nn.GRUCell(5, 6), "RNNCell": nn.RNNCell(5, 6)}


@pytest.mark.parametrize("kind", [*RECURRENT, *CELLS])
def test_the_error_for_torch_recurrent_layers_names_the_fix(kind):
    ending = r", or call perdure.privacy.fix\(model\)$" if kind in RECURRENT else "$"
    with pytest.raises(
        GuardError, match=rf"^1 is {kind}: .*no gradients per record.*opacus\..*\.DP{kind}{ending}"
    ):
        check_model(nn.Sequential(nn.ReLU(), (RECURRENT | CELLS)[kind]))


@pytest.mark.parametrize("kind", [*RECURRENT, *CELLS])
def test_torch_cannot_differentiate_recurrent_layers_per_record(kind):
    layer = (RECURRENT | CELLS)[kind]
    layer = copy.deepcopy(layer).double()
    x = torch.rand(3, 1 if kind in CELLS else 4, 5, dtype=torch.float64)

    def loss(params, x):
        answer = torch.func.functional_call(layer, params, (x,))
        return (answer[0] if isinstance(answer, tuple) else answer).sum()

    with pytest.raises(RuntimeError, match="broadcast shape"):
        torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(layer.named_parameters()), x)


def test_an_lstm_with_projection_is_refused_without_a_fix():
    with pytest.raises(GuardError, match=r"DPLSTM, which has no proj_size$"):
        check_model(nn.LSTM(5, 6, proj_size=2))


class Attending(nn.Module):
    """Attention over (n, length, 8); `rearrange` gives torch's other layout the right axes."""

    def __init__(self, batch_first, rearrange=True, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
        self.turn = rearrange and not batch_first
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = x.transpose(0, 1) if self.turn else x
        x, _ = self.attention(x, x, x)
        return self.head((x.transpose(0, 1) if self.turn else x).mean(1))


def test_the_guard_refuses_attention_with_dropout():
    with pytest.raises(
        GuardError,
        match=r"attention is MultiheadAttention with dropout.*dropout=0.0, or call perdure",
    ):
        check_model(Attending(True, dropout=0.1))
    with pytest.raises(GuardError, match=r"dropout=0.0$"):
        check_model(Attending(True, dropout=0.1, add_bias_kv=True))


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_without_dropout_has_exact_record_gradients(batch_first):
    model = Attending(batch_first)
    x = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(0))
    check_model(model)
    params = {name: value.detach() for name, value in model.named_parameters()}

    def loss(params, x):
        return torch.func.functional_call(model, params, (x[None],)).square().sum()

    rows = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    for i in range(5):
        one = torch.autograd.grad(model(x[i : i + 1]).square().sum(), list(model.parameters()))
        for value, row in zip(one, rows.values(), strict=True):
            assert torch.allclose(row[i], value, rtol=1e-4, atol=1e-5)


def test_the_guard_refuses_attention_over_records():
    model = Attending(False, rearrange=False)
    labels = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(GuardError, match="couples records"):
        check_losses(
            lambda x, y: F.cross_entropy(model(x), y, reduction="none"),
            torch.randn(6, 4, 8),
            labels,
            "Mine.losses()",
        )


class Louder(nn.Dropout):
    def forward(self, x):
        return x - x.mean(0) if self.training else x


def hooked(make, **options):
    return make(nn.Linear(5, 3), "weight", **options)


def test_the_guard_refuses_spectral_normalisation():
    torch.manual_seed(0)
    model = nn.Sequential(
        torch.nn.utils.parametrizations.spectral_norm(nn.Linear(40, 30), n_power_iterations=1)
    )
    with pytest.raises(
        GuardError, match=r"0.parametrizations.weight.0 is _SpectralNorm.*remove_parametrizations"
    ):
        check_model(model)
    # one pass more, another weight
    assert not torch.equal(model(torch.ones(1, 40)), model(torch.ones(1, 40)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        partial(prune.l1_unstructured, amount=0.3),
    ],
)
def test_the_guard_refuses_weights_computed_by_a_hook(make):
    with pytest.raises(
        GuardError,
        match=r"0 is Linear with a weight that a hook computes.*parametrizations.weight_norm",
    ):
        check_model(nn.Sequential(hooked(make)))


def test_the_guard_accepts_weight_norm_by_parametrisation():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)))
    check_model(model)
    check_buffers(model, INPUTS)
    check_rows(
        model, lambda x, y: F.cross_entropy(model(x), y, reduction="none"), INPUTS, LABELS, "plain"
    )


def test_the_guard_refuses_a_subclass_of_torch_dropout():
    with pytest.raises(
        GuardError, match=r"1 is Louder, a subclass of torch's Dropout.*use torch.nn.Dropout"
    ):
        check_model(nn.Sequential(nn.Linear(5, 3), Louder()))
    check_model(nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.5), nn.AlphaDropout(0.5)))


@pytest.mark.parametrize("make", [partial(nn.LazyLinear, 3), nn.LazyBatchNorm1d])
def test_the_guard_refuses_lazy_layers_without_parameters(make):
    model = nn.Sequential(make())
    with pytest.raises(
        GuardError, match=r"0 is Lazy.*first private batch would decide.*run synthetic inputs"
    ):
        check_model(model)


def test_the_guard_accepts_a_lazy_layer_that_was_run_once():
    model = nn.Sequential(nn.LazyLinear(3))
    model(INPUTS)
    check_model(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_are_refused_under_privacy(dtype):
    with pytest.raises(GuardError, match=rf"parameter 0.weight is {dtype}.*call model.float\(\)"):
        check_model(nn.Sequential(nn.Linear(5, 3).to(dtype)))
    one_more = torch.tensor(1000.0, dtype=dtype) + torch.tensor(3.0, dtype=dtype)
    # a record's share lost or grown by a third
    assert dtype == torch.float16 or abs(float(one_more) - 1003) >= 1
    check_model(nn.Sequential(nn.Linear(5, 3).double()))


def test_the_guard_refuses_instance_norm_that_has_statistics():
    layer = nn.InstanceNorm2d(6, track_running_stats=True)
    layer.track_running_stats = False
    with pytest.raises(GuardError, match="with running statistics"):
        check_model(layer)
    layer(torch.rand(2, 6, 3, 3))
    assert float(layer.running_mean.abs().sum()) > 0  # torch moves them all the same
