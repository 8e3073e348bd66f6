"""Certificates: interval bounds hold for every input of the ball, smoothing has its closed form."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perdure.adversarial import PGD, robust_accuracy
from perdure.adversarial.certificates import (
    ABSTAINED,
    Smoothing,
    ball,
    between,
    certify_by_bounds,
    lower_bound,
    worst_logits,
)
from perdure.errors import ConfigError
from perdure.models import cnn, wrap


def seed(value=0):
    return torch.Generator().manual_seed(value)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, stride=2),
            nn.Tanh(),
            nn.AvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(16, 8),
            nn.LeakyReLU(0.1),
            nn.Linear(8, 3),
        )
        layers(torch.rand(20, 1, 10, 10))  # statistics of the normalisation
    return wrap(layers, head="11").eval()


def test_outputs_of_every_input_lie_within_interval_bounds():
    model = network()
    inputs = torch.rand(5, 1, 10, 10, generator=seed())
    labels = torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        lower, upper = model(between(inputs - 0.1, inputs + 0.1)).ends()
        worst = worst_logits(model, ball(inputs, 0.1, None), labels)
        loose = upper - lower.gather(1, labels.unsqueeze(1))
        for number in range(200):
            change = 0.2 * torch.rand(inputs.shape, generator=seed(number)) - 0.1
            change = change.sign() * 0.1 if number % 2 else change
            outputs = model(inputs + change)
            assert (outputs >= lower - 1e-5).all() and (outputs <= upper + 1e-5).all()
            assert (outputs - outputs.gather(1, labels.unsqueeze(1)) <= worst + 1e-5).all()
    others = torch.ones(5, 3).scatter(1, labels.unsqueeze(1), 0).bool()
    assert (worst < loose - 1e-4)[others].all()  # differences of weights are tighter than of ends


def test_interval_bounds_of_a_linear_model_are_exact():
    model = nn.Linear(6, 3)
    inputs = torch.rand(4, 6, generator=seed())
    labels = torch.tensor([0, 1, 2, 0])
    weight = model.weight.detach()
    change = weight - weight[labels].unsqueeze(1)
    logits = model(inputs)
    exact = logits - logits.gather(1, labels.unsqueeze(1)) + 0.2 * change.abs().sum(2)
    found = worst_logits(model, ball(inputs, 0.2, None), labels)
    assert torch.allclose(found, exact, atol=1e-5)


def test_sums_and_products_of_intervals_have_their_rules():
    box = between(torch.tensor([[-1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
    lower, upper = (2 * box - box / -4 + 1).ends()
    assert torch.allclose(lower, torch.tensor([[-1.25, 5.5]]))
    assert torch.allclose(upper, torch.tensor([[3.25, 10.0]]))
    lower, upper = (1 - box).ends()
    assert torch.allclose(lower, torch.tensor([[0.0, -3.0]]))


def test_layers_without_a_rule_are_refused_with_the_reason():
    box = between(torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8))
    with pytest.raises(ConfigError, match="group_norm: it divides by a spread of the input"):
        cnn(input_shape=(1, 8, 8), num_classes=2, seed=0)(box)
    with pytest.raises(ConfigError, match="no rule for softmax"):
        box.softmax(1)
    with pytest.raises(ConfigError, match="no rule for rdiv"):
        1 / box
    with pytest.raises(ConfigError, match="batch_norm"):
        nn.BatchNorm2d(1)(box)
    with pytest.raises(ConfigError, match="got lost"):
        worst_logits(lambda rows: torch.zeros(len(rows), 2), box, torch.tensor([0, 1]))


class Odd(nn.Module):
    """Two layers with an operation between them or after them."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, rows):
        return self.function(self, rows)


def added_in_place(model, rows):
    hidden = model.first(rows)
    hidden += model.first(rows)
    return model.last(hidden)


def relu_in_place(model, rows):
    hidden = model.first(rows)
    return model.last(F.relu(hidden, True) + hidden)


def written_to(model, rows):
    place = torch.empty(len(rows), 4)
    return model.last(torch.clamp(model.first(rows), 0.0, 1.0, out=place))


def masked(model, rows):
    return torch.where(torch.tensor([True, False]), model.last(rows), 0.0)


ODD = {
    "add_": added_in_place,
    "relu in place": relu_in_place,
    "out": written_to,
    "T": lambda model, rows: model.last(rows) + model.last(rows.T.T),
    "data": lambda model, rows: model.last(rows) + model.last(rows.data),
    "to": lambda model, rows: model.last((8 * rows).to(torch.int32).to(torch.float32)),
    "half": lambda model, rows: model.last(rows.to(torch.float16).to(torch.float32)),
    "view": lambda model, rows: model.last(rows.view(torch.int32).view(torch.float32)),
    "where": masked,
    "leaky_relu": lambda model, rows: model.last(F.leaky_relu(model.first(rows), -1.0)),
    "elu": lambda model, rows: model.last(F.elu(model.first(rows), -1.0)),
    "softplus": lambda model, rows: model.last(F.softplus(model.first(rows), 1.0, 0.0)),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_operations_give_no_false_certificate(name):
    torch.manual_seed(4)
    model = Odd(ODD[name]).eval()
    with torch.no_grad():  # logits that differ in nothing but their mask
        model.last.weight[1] = model.last.weight[0] if name == "where" else model.last.weight[1]
        model.last.bias[:] = -model.last.weight.sum(1) / 2
    inputs = torch.rand(100, 4, generator=seed())
    with torch.no_grad():
        labels = model(inputs.clone()).argmax(1)
    if name != "where":
        with pytest.raises(ConfigError, match="interval bounds have no rule for"):
            certify_by_bounds(model, inputs, labels, epsilon=0.1)
        return
    card = certify_by_bounds(model, inputs, labels, epsilon=0.1)
    kept = torch.ones(100, dtype=torch.bool)
    for number in range(50):
        corner = torch.rand(inputs.shape, generator=seed(number)).sub(0.5).sign() * 0.1
        kept &= model((inputs + corner).clamp(0, 1)).argmax(1) == labels
    assert 0 < card.certified_accuracy <= 100 * float(kept.double().mean()) < 100


def test_a_model_outside_of_its_bounds_is_refused():
    model = nn.Linear(4, 2)
    inputs, labels = torch.rand(5, 4, generator=seed()), torch.zeros(5, dtype=torch.int64)

    def other_for_intervals(rows):
        return model(rows) + (0.0 if type(rows) is torch.Tensor else 0.1)

    for predict in (other_for_intervals, lambda rows: model(rows) * math.nan):
        with pytest.raises(ConfigError, match="do not cover this model"):
            certify_by_bounds(predict, inputs, labels, epsilon=0.0)


def test_a_compiled_model_has_the_bounds_of_the_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    inputs = torch.rand(5, 4, generator=seed())
    labels = model(inputs).argmax(1)
    expected = certify_by_bounds(model, inputs, labels, epsilon=0.01)
    compiled = torch.compile(model, backend="eager")
    assert certify_by_bounds(compiled, inputs, labels, epsilon=0.01) == expected


def test_copies_with_nan_logits_vote_for_no_class():
    def broken(rows):
        logits = torch.tensor([-math.inf, 1.0, 0.0]).repeat(len(rows), 1)
        return torch.where(rows < 0.5, math.nan, logits)

    smooth = Smoothing(predict=broken, deviation=0.1)
    classes, radii = smooth.certify(torch.tensor([[0.0], [1.0]]), generator=seed())
    assert classes.tolist() == [ABSTAINED, 1]
    assert radii[0] == 0 < radii[1]


def trained(epsilon):
    """Return a model of two classes in the plane that certifies many records, with the records."""
    inputs = torch.rand(300, 2, generator=seed())
    labels = (inputs[:, 0] > 0.5).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(120):
        worst = worst_logits(model, ball(inputs, epsilon, (0.0, 1.0)), labels)
        optimizer.zero_grad()
        nn.functional.cross_entropy(worst, labels).backward()
        optimizer.step()
    return model, inputs, labels


def test_no_certified_input_is_broken_in_10000_tries():
    model, inputs, labels = trained(0.1)
    card = certify_by_bounds(model, inputs, labels, epsilon=0.1)
    assert 50 < card.certified_accuracy < card.clean_accuracy
    with torch.no_grad():
        worst = worst_logits(model, ball(inputs, 0.1, (0.0, 1.0)), labels)
        sure = worst.scatter(1, labels.unsqueeze(1), -math.inf).amax(1) < 0
        tries = inputs[sure].repeat(10000 // int(sure.sum()) + 1, 1)[:10000]
        own = labels[sure].repeat(10000 // int(sure.sum()) + 1)[:10000]
        corners = torch.rand(tries.shape, generator=seed(1)).sub(0.5).sign() * 0.1
        assert (model((tries + corners).clamp(0, 1)).argmax(1) == own).all()
    attack = PGD(epsilon=0.1, steps=10)
    kept = robust_accuracy(model, inputs, labels, attack, generator=seed())
    assert card.certified_accuracy <= kept + 1e-9
    loose = PGD(epsilon=0.1, steps=10, restarts=3)
    robust = robust_accuracy(model, inputs[sure], labels[sure], loose, generator=seed())
    assert robust == 100
    assert "a proof" in str(card) and card.row()["norm"] == "linf"


def test_the_radius_on_a_linear_classifier_is_the_closed_form():
    """Noise moves w x + b by a normal number, so the share of a class is Phi(margin / sigma)."""
    direction = torch.tensor([3.0, 4.0]) / 5

    def predict(rows):
        score = rows @ direction - 0.2
        return torch.stack([-score, score], 1)

    inputs = torch.tensor([[0.5, 0.5], [0.1, 0.1], [0.2, 0.11]])
    distance = (inputs @ direction - 0.2).abs()
    smooth = Smoothing(predict=predict, deviation=0.5, samples=100_000, batch_size=100_000)
    classes, radii = smooth.certify(inputs, generator=seed())
    # the bound is exact, so it lies below the true radius; 1e5 samples bring it close
    assert (radii <= distance).all()
    assert torch.allclose(radii, distance.double(), atol=0.01)
    assert classes.tolist() == [1, 0, ABSTAINED] or classes.tolist() == [1, 0, 1]


def test_no_record_is_broken_inside_its_smoothed_radius():
    """Moved by 0.9 of its radius in 100 directions, the class with most votes is the same."""
    model, inputs, _ = trained(0.0)
    smooth = Smoothing(predict=model, deviation=0.2, samples=2000)
    classes, radii = smooth.certify(inputs[:100], generator=seed())
    sure = classes != ABSTAINED
    assert sure.sum() > 50
    directions = nn.functional.normalize(torch.randn(100, 2, generator=seed(1)), dim=1)
    noise = 0.2 * torch.randn(4000, 2, generator=seed(2))
    for row, own, radius in zip(inputs[:100][sure], classes[sure], radii[sure], strict=True):
        moved = row + 0.9 * radius.float() * directions
        with torch.no_grad():
            rows = (moved.unsqueeze(1) + noise[::20]).flatten(0, 1)
            share = (model(rows).argmax(1) == own).view(100, -1).double().mean(1)
        assert share.min() > 0.5 - 3 * 0.5 / 200**0.5


def test_smoothing_abstains_where_two_classes_are_equally_likely():
    smooth = Smoothing(predict=lambda rows: torch.cat([rows, -rows], 1), deviation=1.0)
    inputs = torch.tensor([[0.0], [3.0]])
    assert smooth.classes(inputs, generator=seed()).tolist() == [ABSTAINED, 0]
    classes, radii = smooth.certify(inputs, generator=seed())
    assert classes.tolist() == [ABSTAINED, 0]
    assert radii[0] == 0 and radii[1] > 1
    card = smooth.certificate(inputs, torch.tensor([0, 0]), epsilon=1.0, generator=seed())
    assert (card.certified_accuracy, card.confidence) == (50.0, 0.999)


def test_the_confidence_bound_is_exact():
    """P[Binomial(n, bound) >= hits] is alpha at the Clopper-Pearson bound, by the sum of terms."""
    bound = lower_bound(17, 20, 0.01)
    terms = [math.comb(20, k) * bound**k * (1 - bound) ** (20 - k) for k in range(17, 21)]
    assert sum(terms) == pytest.approx(0.01, rel=1e-9)
    assert lower_bound(0, 20, 0.01) == 0


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"deviation": 0.0}, "deviation"),
        ({"deviation": 0.1, "alpha": 1.0}, "alpha"),
        ({"deviation": 0.1, "samples": 0}, "samples"),
    ],
)
def test_smoothing_refuses_a_wrong_value_by_name(given, field):
    with pytest.raises(ConfigError, match=field):
        Smoothing(predict=nn.Identity(), **given)


def test_certificates_refuse_inputs_outside_the_bounds():
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="bounds"):
        certify_by_bounds(model, torch.full((1, 2), 2.0), torch.tensor([0]), epsilon=0.1)
    with pytest.raises(ConfigError, match="labels"):
        certify_by_bounds(model, torch.zeros(1, 2), torch.tensor([0.0]), epsilon=0.1)


@pytest.mark.parametrize(
    "bounds",
    [(0.0,), (1.0, 0.0), 0.5, "x", (0.0, "a"), (0, 1, 2), (float("nan"), 1.0), ((), ()), (0, None)],
    ids=str,
)
def test_a_certificate_refuses_bounds_that_are_no_pair(bounds):
    model = nn.Linear(2, 2)
    inputs = torch.full((1, 2), 0.5)
    with pytest.raises(ConfigError, match=r"^bounds = .* allowed: \(low, high\) with low < high"):
        certify_by_bounds(model, inputs, torch.tensor([0]), epsilon=0.1, bounds=bounds)


@pytest.mark.parametrize("epsilon", [-0.1, float("nan"), "a", None, [0.1]], ids=str)
def test_a_certificate_refuses_a_radius_that_is_no_number(epsilon):
    with pytest.raises(ConfigError, match=r"^epsilon = .* allowed: a finite number, 0 or more"):
        certify_by_bounds(
            nn.Linear(2, 2), torch.zeros(1, 2), torch.tensor([0]), epsilon=epsilon, bounds=None
        )


def test_a_certificate_refuses_labels_that_are_no_classes():
    with pytest.raises(ConfigError, match=r"^labels = '2 to 2' .*; allowed: 0 to 1"):
        certify_by_bounds(nn.Linear(2, 2), torch.zeros(1, 2), torch.tensor([2]), epsilon=0.1)


def test_a_ball_is_cut_at_the_bounds_of_each_feature():
    inputs = torch.tensor([[0.5, 5.0]])
    lower, upper = ball(inputs, 1.0, ((0.0, 4.5), (1.0, 9.0))).ends()
    assert torch.allclose(lower, torch.tensor([[0.0, 4.5]]))
    assert torch.allclose(upper, torch.tensor([[1.0, 6.0]]))
    with pytest.raises(ConfigError, match=r"length of bounds = 3 .* allowed: 2, one number per"):
        ball(inputs, 1.0, ((0.0, 0.0, 0.0), 9.0))
