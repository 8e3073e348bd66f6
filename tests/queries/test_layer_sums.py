import pytest
import torch
from torch import nn

from helpers.squared_gradients import assert_same, batch, by_hand, fisher_terms, small
from perdure.contract.forward import Forward
from perdure.privacy.clipping.clip import Clip
from perdure.queries.evaluation import exact_sum
from perdure.queries.layer_sums import matrix_layers, sum_by_layers
from perdure.queries.squared_gradients import AbsoluteGradient, SquaredGradient


class Tokens(nn.Module):
    """A class token and positions as parameters, attention, a layer of positions, and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(5, 8))
        self.layer = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        tokens = torch.cat([self.token.expand(len(x), 1, 8), self.embed(x)], 1)
        x = tokens + self.positions
        x = x + torch.softmax(x @ x.mT, -1) @ self.layer(self.norm(x))
        return self.head(x[:, 0])


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.words((x[:, :, 0] * 6).long()).mean(1))


def convolutions():
    """Return grouped, dilated, strided and depthwise convolutions, and one with a single output
    position.
    """
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 4, (3, 2), stride=(1, 2), dilation=(2, 1), padding=(2, 0), groups=4),
        nn.Tanh(),
        nn.Conv2d(4, 3, (8, 4), bias=False),
        nn.Flatten(),
    )


def other_paddings():
    """Return convolutions that form rows as any other parameter does."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding="same"),
        nn.Tanh(),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(192, 3),
    )


def normalised():
    """Return BatchNorm with running statistics, GroupNorm, and an in-place residual."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.Linear(256, 3),
    )
    model[1].running_mean.normal_()
    return model


def sequences():
    return nn.Sequential(
        nn.Conv1d(5, 4, 2, stride=2), nn.Tanh(), nn.Conv1d(4, 3, 1), nn.Flatten(), nn.Linear(3, 3)
    )


MODELS = {
    "tokens": (Tokens, (4, 2)),
    "words": (Words, (4, 2)),
    "convolutions": (convolutions, (2, 8, 8)),
    "other paddings": (other_paddings, (2, 8, 8)),
    "normalised": (normalised, (2, 8, 8)),
    "sequences": (sequences, (5, 2)),
}


def made(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def parameters(module):
    return {name: value.detach() for name, value in module.named_parameters()}


@pytest.mark.reference
@pytest.mark.parametrize("kind", [SquaredGradient, AbsoluteGradient])
@pytest.mark.parametrize("model", list(MODELS))
def test_layer_sums_equal_one_backward_pass_per_record_and_term(model, kind, monkeypatch):
    make, shape = MODELS[model]
    module = made(make)
    data = batch(shape=shape)
    size = torch.square if kind is SquaredGradient else torch.abs
    rows = by_hand(module, fisher_terms, data, size)
    monkeypatch.setattr("perdure.queries.layer_sums.TERMS_AT_ONCE", 2)
    query = kind(fisher_terms)
    found = sum_by_layers(fisher_terms, query.size_of, module, parameters(module), data.tensors())
    assert_same(found, {name: value.sum(0) for name, value in rows.items()}, 1e-6)


def counted(monkeypatch, module, data, terms):
    """Count forward and backward passes of an exact sum, with the run of the blank record."""
    forward = []
    backward = []
    grad = torch.autograd.grad

    def watched(forward_, batch):
        forward.append(len(batch))
        return terms(forward_, batch)

    def counting(*args, **named):
        backward.append(1)
        return grad(*args, **named)

    monkeypatch.setattr("torch.autograd.grad", counting)
    exact_sum(SquaredGradient(watched), Forward(module), data, 1024)
    return len(forward), len(backward)


def test_a_layer_sum_needs_one_forward_pass_for_all_records(monkeypatch):
    module = small("cnn")
    assert counted(monkeypatch, module, batch(20, (1, 8, 8)), fisher_terms) == (2, 3)


def test_layer_sum_passes_hold_as_many_records_as_memory_allows(monkeypatch):
    module = small("cnn")
    data = batch(20, (1, 8, 8))
    expected = exact_sum(SquaredGradient(fisher_terms), Forward(module), data, 1024)
    monkeypatch.setattr("perdure.queries.layer_sums.PASS_NUMBERS", 1)
    assert counted(monkeypatch, module, data, fisher_terms) == (21, 60)
    assert_same(exact_sum(SquaredGradient(fisher_terms), Forward(module), data, 1024), expected)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_layer_sums_keep_no_graph_of_second_derivatives(model):
    seen = set()

    class Watched(SquaredGradient):
        def size_of(self, values):
            seen.add(torch.is_grad_enabled() and values.requires_grad)
            return super().size_of(values)

    module = small(model)
    data = batch(shape=(1, 8, 8) if model == "cnn" else (5,))
    exact_sum(Watched(fisher_terms), Forward(module), data, 100)
    Watched(fisher_terms).clipped_sum(module, parameters(module), data.tensors(), Clip(norm=1.0))
    assert seen == {False}


def test_layer_sums_of_a_linear_layer_form_no_record_gradients():
    """Only inputs and output gradients are squared."""
    largest = []

    class Watched(SquaredGradient):
        def size_of(self, values):
            largest.append(values[0].numel())
            return super().size_of(values)

    module = nn.Sequential(nn.Linear(5, 400), nn.Tanh(), nn.Linear(400, 3))
    exact_sum(Watched(fisher_terms), Forward(module), batch(), 100)
    assert max(largest) == 3 * 400


def test_layer_sum_terms_are_computed_from_each_record_alone():
    def coupled(forward, batch):
        log_p = torch.log_softmax(forward(batch.inputs - batch.inputs.mean(0)), dim=1)
        return -log_p, log_p.exp().detach()

    module = small()
    data = batch()
    rows = by_hand(module, coupled, data)
    found = exact_sum(SquaredGradient(coupled), Forward(module), data, 100)
    assert_same(found, {name: value.sum(0) for name, value in rows.items()})


def test_layers_with_a_shared_weight_are_not_summed_separately():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3))
    model[1].weight = model[0].weight
    assert list(matrix_layers(model, parameters(model))) == ["0", "2"]
    tensors = batch().tensors()
    assert sum_by_layers(fisher_terms, torch.square, model, parameters(model), tensors) is None


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_layer_sums_of_a_torch_transformer_equal_a_record_loop():
    """The layer has a fast path without gradients, which it uses if gradients seem unneeded."""
    layer = nn.TransformerEncoderLayer(2, 1, 4, dropout=0.0, batch_first=True)
    module = nn.Sequential(layer, nn.Flatten(), nn.Linear(8, 3)).eval()
    data = batch(shape=(4, 2))
    found = exact_sum(SquaredGradient(fisher_terms), Forward(module), data, 100)
    rows = by_hand(module, fisher_terms, data)
    assert_same(found, {name: value.sum(0) for name, value in rows.items()}, 1e-6)


def test_a_layer_sum_without_records_is_none():
    module = small()
    none = batch().take(slice(0, 0)).tensors()
    assert sum_by_layers(fisher_terms, torch.square, module, parameters(module), none) is None


def test_losses_without_parameters_have_a_squared_gradient_of_0():
    def constant(forward, batch):
        return forward(batch.inputs).detach()[:, :1], torch.ones(len(batch), 1)

    found = exact_sum(SquaredGradient(constant), Forward(small()), batch(), 100)
    assert all(not value.any() for value in found.values())
