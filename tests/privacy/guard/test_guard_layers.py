"""The guard's checks of layers and of the optimiser."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.module_hooks import any_hooks
from perdure.errors import GuardError
from perdure.models.classifiers import cnn, resnet18
from perdure.privacy.clipping.bookkeeping import clipped_gradient_sum
from perdure.privacy.clipping.clip import Clip, sum_of_clipped
from perdure.privacy.guard.loss_checks import check_losses, check_rows, quiet_training
from perdure.privacy.guard.model_checks import check_optimizer

LABELS = torch.tensor([0, 1, 2, 0, 1, 2])

# --------------------------------------------------------------------------- rows of layers


class Reading(nn.Module):
    """A model that embeds sequences (n, length, 5) with positions in one of several forms."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.embed = nn.Linear(5, 8)
        self.head = nn.Linear(8, 3)
        if "position" in way:
            self.position = nn.Embedding(9, 8)

    def forward(self, x):
        if self.way == "length first":
            return self.head(torch.tanh(self.embed(x.transpose(0, 1))).mean(0))
        x, at = self.embed(x), torch.arange(x.shape[1])
        if self.way != "plain":
            x = x + self.position(
                {"1 position": at[None], "n positions": at.expand(len(x), -1)}.get(self.way, at)
            )
        return self.head(torch.tanh(x).mean(1))


class Normalised(torch.autograd.Function):
    """The identity, whose gradient is divided by its norm over the batch."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / gradient.norm()


class Averaged(Normalised):
    """The identity, whose gradient is divided by the number of records."""

    @staticmethod
    def backward(ctx, gradient):
        return gradient / len(gradient)


class Backwards(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.embed = nn.Linear(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.function.apply(torch.tanh(self.embed(x.mean(1)))))


SEQUENCES = torch.rand(6, 4, 5, generator=torch.Generator().manual_seed(1))


def row_test(model, losses=None):
    plain = lambda x, y: F.cross_entropy(model(x), y, reduction="none")  # noqa: E731
    check_rows(
        model, partial(losses, plain) if losses else plain, SEQUENCES, LABELS, "Mine.losses()"
    )


@pytest.mark.parametrize("way", ["plain", "1 position", "n positions"])
def test_layers_with_one_row_per_record_pass_the_row_check(way):
    assert row_test(model := Reading(way)) is None
    assert not any_hooks(model)


@pytest.mark.parametrize(
    ("way", "layer"), [("length first", "embed"), ("length positions", "position")]
)
def test_the_guard_refuses_a_layer_with_another_batch_axis(way, layer):
    with pytest.raises(
        GuardError,
        match=f"layer {layer} gives 4 rows for 6 records and 4 for 5 in Mine.*batch_first",
    ):
        row_test(Reading(way))


def test_a_layer_with_another_batch_axis_would_break_the_bound():
    torch.manual_seed(0)
    model = Reading("length first")
    clip = Clip(norm=0.1)
    params = dict(model.named_parameters())
    x = 5 * torch.rand(16, 16, 5)
    y = torch.randint(3, (16,))

    def losses(n):
        return F.cross_entropy(model(x[:n]), y[:n], reduction="none")

    rows = [
        torch.autograd.grad(loss, list(params.values()), retain_graph=True) for loss in losses(15)
    ]
    exact = sum_of_clipped(
        {n: torch.stack(g) for n, g in zip(params, zip(*rows, strict=True), strict=True)}, clip
    )
    mixed = clipped_gradient_sum(model, params, lambda: losses(16), 16, clip)
    assert clipped_gradient_sum(model, params, lambda: losses(15), 15, clip) is None
    assert sum((mixed[n] - exact[n]).square().sum() for n in params).sqrt() > 2 * clip.norm


@pytest.mark.parametrize("function", [Normalised, Averaged])
def test_the_guard_refuses_a_backward_pass_that_mixes_records(function):
    model = Backwards(function)
    check_losses(
        lambda x, y: F.cross_entropy(model(x), y, reduction="none"),
        SEQUENCES,
        LABELS,
        "Mine.losses()",
    )
    with pytest.raises(
        GuardError, match=r"layer embed mixes records in Mine.losses\(\).*the gradient of another"
    ):
        row_test(model)


class Centred(Backwards):
    """A model that centres a layer's input over the batch and undoes the effect in the loss."""

    def forward(self, x):
        x = x.mean(1)
        mean = x.detach().mean(0, keepdim=True)
        return self.head(torch.tanh(self.embed(x - mean) + (mean @ self.embed.weight.T).detach()))


def test_the_guard_refuses_layer_inputs_that_mix_records():
    model = Centred(None)
    check_losses(
        lambda x, y: F.cross_entropy(model(x), y, reduction="none"),
        SEQUENCES,
        LABELS,
        "Mine.losses()",
    )
    with pytest.raises(
        GuardError, match=r"layer embed mixes records in Mine.losses\(\).*the input of another"
    ):
        row_test(model)


def halves(plain, x, y):
    n = len(x) // 2
    return torch.cat([plain(x[:n], y[:n]), plain(x[n:], y[n:])])


def out_of_order(plain, x, y):
    return plain(x.flip(0), y.flip(0)).flip(0)


def exchanged(plain, x, y):
    """Exchange the first two records, which leaving out the last record does not show."""
    order = torch.arange(len(x))
    order[:2] = torch.tensor([1, 0])
    return plain(x[order], y[order])[order]


def twice(plain, x, y):
    return plain(x, y) + plain(0.5 * x, y)


def side_by_side(plain, x, y):
    return plain(torch.cat([x, 0.5 * x]), torch.cat([y, y])).view(2, -1).sum(0)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (halves, "layer embed gives 3 rows for 6 records"),
        (out_of_order, "layer embed mixes"),
        (exchanged, "layer embed mixes"),
    ],
)
def test_the_guard_refuses_losses_that_split_or_reorder_rows(losses, message):
    with pytest.raises(GuardError, match=message):
        row_test(Reading("plain"), losses)


@pytest.mark.parametrize("losses", [twice, side_by_side])
def test_several_passes_of_every_record_pass_the_row_check(losses):
    assert row_test(model := Reading("plain"), losses) is None
    assert not any_hooks(model)


@pytest.mark.parametrize("make", [cnn, partial(resnet18, width=4)])
def test_built_in_models_pass_the_row_check(make):
    model = make(input_shape=(1, 16, 16), num_classes=3, seed=0)
    before = torch.random.get_rng_state()
    x = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    quiet_training(model)
    check_rows(
        model,
        lambda x, y: F.cross_entropy(model(x), y, reduction="none"),
        x,
        LABELS,
        "Mine.losses()",
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert not any_hooks(model)


# --------------------------------------------------------------------------- optimisers


class SharpnessAware(torch.optim.Optimizer):
    """A sharpness-aware optimiser whose step() needs a closure that its signature does not show."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        assert closure is not None, "sharpness-aware minimisation needs a closure"


class TwoSteps(SharpnessAware):
    def first_step(self):
        """Move the parameters uphill."""


LINEAR = nn.Linear(5, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.LBFGS, "LBFGS, which does not step from one gradient: every"),
        (SharpnessAware, r"SharpnessAware, .* \(sharpness-aware minimisation needs a closure\)"),
        (TwoSteps, r"TwoSteps, .* \(it has a first_step\)"),
        (torch.optim.SparseAdam, r"SparseAdam, .* \(.*dense gradients"),
    ],
)
def test_the_guard_refuses_optimizers_with_several_gradients(make, message):
    with pytest.raises(GuardError, match=message):
        check_optimizer(make(LINEAR.parameters()))


@pytest.mark.parametrize(
    "name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "Adadelta", "ASGD"]
)
def test_the_guard_accepts_optimizers_with_one_gradient_per_step(name):
    optimizer = getattr(torch.optim, name)(LINEAR.parameters(), lr=0.1)
    before = LINEAR.weight.detach().clone()
    state = repr(optimizer.state_dict())
    check_optimizer(optimizer)
    assert torch.equal(LINEAR.weight, before) and LINEAR.weight.grad is None
    assert repr(optimizer.state_dict()) == state
