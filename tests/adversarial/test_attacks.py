import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from perdure.adversarial import FGSM, PGD, RSFGSM, robust_accuracy
from perdure.errors import ConfigError

SLACK = 1e-5
"""Rounding of float32 around the ball and the bounds."""


def seed(value=0):
    return torch.Generator().manual_seed(value)


def mlp(features=12, classes=3, value=0):
    with torch.random.fork_rng():
        torch.manual_seed(value)
        model = nn.Sequential(nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, classes))
    return model.requires_grad_(False)


def cross_entropy_of(model, labels):
    return lambda rows: F.cross_entropy(model(rows), labels, reduction="none")


@pytest.fixture(scope="module")
def digits():
    """Return a small trained model and test images that were not used for training."""
    from sklearn.datasets import load_digits

    torch.set_num_threads(1)
    data = load_digits()
    inputs = torch.tensor(data.data / 16, dtype=torch.float32)
    labels = torch.tensor(data.target)
    model = mlp(64, 10).requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[:1200]), labels[:1200]).backward()
        optimizer.step()
    return model.requires_grad_(False), inputs[1200:], labels[1200:]


class Noise(FGSM):
    """Draw uniformly from the corners of the ball, as an adversary without gradients does."""

    def perturb(self, losses, inputs, *, generator=None):
        signs = torch.randint(0, 2, inputs.shape, generator=generator) * 2 - 1
        return (inputs + self.epsilon * signs).clamp(*self.bounds)


@pytest.mark.property
@settings(deadline=None, max_examples=60)
@given(
    attack=st.sampled_from([FGSM, PGD, RSFGSM]),
    norm=st.sampled_from(["linf", "l2", "l1"]),
    epsilon=st.floats(0, 2, width=32),
    bounds=st.sampled_from([None, (0.0, 1.0), (-0.5, 2.0)]),
    value=st.integers(0, 2**31),
)
def test_perturbed_inputs_stay_in_the_epsilon_ball_and_bounds(attack, norm, epsilon, bounds, value):
    inputs = torch.rand(5, 3, 4, generator=seed(value))
    losses = cross_entropy_of(nn.Sequential(nn.Flatten(), mlp()), torch.tensor([0, 1, 2, 0, 1]))
    moved = attack(epsilon=epsilon, norm=norm, bounds=bounds).perturb(
        losses, inputs, generator=seed(value)
    )
    change = (moved - inputs).flatten(1)
    order = {"linf": float("inf"), "l2": 2, "l1": 1}[norm]
    assert (torch.linalg.vector_norm(change, ord=order, dim=1) <= epsilon + SLACK).all()
    if bounds is not None:
        assert moved.min() >= bounds[0] and moved.max() <= bounds[1]
    if epsilon >= 1e-3:
        assert change.abs().sum(1).min() > 0


def test_fgsm_moves_entries_outside_the_bounds_only_inwards():
    inputs = torch.tensor([[-1.0, 3.0, 0.5]])
    out = FGSM(epsilon=0.25).perturb(lambda x: -x[:, 0] + x[:, 1] + x[:, 2], inputs)
    back = FGSM(epsilon=0.25).perturb(lambda x: x[:, 0] - x[:, 1] + x[:, 2], inputs)
    assert torch.equal(out, torch.tensor([[-1.0, 3.0, 0.75]]))
    assert torch.equal(back, torch.tensor([[-0.75, 2.75, 0.75]]))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_fgsm_on_a_linear_model_equals_the_closed_form(norm):
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, -1.0]])
    inputs = torch.randn(6, 3, generator=seed())
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    # With two classes the loss rises along w_other - w_label, whatever the point.
    uphill = weight[1 - labels] - weight[labels]
    largest = F.one_hot(uphill.abs().argmax(1), 3)
    direction = {
        "linf": uphill.sign(),
        "l2": uphill / uphill.norm(dim=1, keepdim=True),
        "l1": largest * uphill.sign(),
    }[norm]
    attack = FGSM(epsilon=0.3, norm=norm, bounds=None)
    moved = attack.perturb(cross_entropy_of(lambda x: x @ weight.T, labels), inputs)
    assert torch.allclose(moved, inputs + 0.3 * direction, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("random_start", [True, False])
def test_pgd_on_a_linear_loss_reaches_the_maximum_in_the_ball(norm, random_start):
    weight = torch.tensor([3.0, -1.0, 0.5, 2.0])
    inputs = torch.randn(5, 4, generator=seed())
    attack = PGD(
        epsilon=0.5, norm=norm, bounds=None, steps=40, step_size=0.5, random_start=random_start
    )
    gain = (attack.perturb(lambda x: x @ weight, inputs, generator=seed(1)) - inputs) @ weight
    # Hölder: the greatest gain is epsilon times the dual norm of the weights.
    dual = {"linf": weight.abs().sum(), "l2": weight.norm(), "l1": weight.abs().max()}[norm]
    assert torch.allclose(gain, 0.5 * dual.expand(5), rtol=1e-3)


def test_an_l2_attack_step_is_full_even_with_tiny_gradients():
    weight = torch.tensor([3e-30, 4e-30])
    moved = FGSM(epsilon=1.0, norm="l2", bounds=None).perturb(
        lambda x: x @ weight, torch.zeros(1, 2)
    )
    assert torch.allclose(moved, torch.tensor([[0.6, 0.8]]))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_attack_does_not_change_a_row_without_gradient(norm):
    inputs = torch.rand(2, 3, generator=seed())
    moved = FGSM(epsilon=0.1, norm=norm).perturb(
        lambda x: x.sum(1) * torch.tensor([0.0, 1.0]), inputs
    )
    assert torch.equal(moved[0], inputs[0])
    assert (moved[1] > inputs[1]).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", [FGSM(epsilon=0.1), PGD(epsilon=0.1, random_start=False)])
def test_a_record_gets_equal_perturbations_alone_and_in_a_batch(attack, norm):
    attack = type(attack)(**vars(attack) | {"norm": norm})
    model = mlp().double()
    labels = torch.tensor([0, 1, 2, 0])
    inputs = torch.rand(4, 12, generator=seed(), dtype=torch.float64)
    together = attack.perturb(cross_entropy_of(model, labels), inputs)
    for i in range(4):
        alone = attack.perturb(cross_entropy_of(model, labels[i : i + 1]), inputs[i : i + 1])
        assert torch.allclose(together[i : i + 1], alone, atol=1e-10)


def test_an_attack_leaves_inputs_and_param_gradients_unchanged():
    model = mlp().requires_grad_(True)
    inputs = torch.rand(4, 12, generator=seed())
    before = inputs.clone()
    with torch.no_grad():
        moved = PGD(epsilon=0.1).perturb(
            cross_entropy_of(model, torch.tensor([0, 1, 2, 0])), inputs, generator=seed()
        )
    assert torch.equal(inputs, before) and not inputs.requires_grad
    assert not moved.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_random_start_comes_from_the_generator_alone():
    losses = cross_entropy_of(mlp(), torch.tensor([0, 1]))
    inputs = torch.rand(2, 12, generator=seed())
    attack = PGD(epsilon=0.1, steps=1, step_size=1e-4)
    state = torch.get_rng_state()
    first, again, other = (
        attack.perturb(losses, inputs, generator=seed(value)) for value in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ConfigError, match="generator"):
        attack.perturb(losses, inputs)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("attack", [PGD, RSFGSM])
def test_a_random_start_is_not_cut_at_the_bounds(attack, norm):
    seen = []

    def losses(rows):
        seen.append(rows.detach().clone())
        return rows.sum(1)

    # all pixels are black, so half of the start's entries lie below the lower bound
    moved = attack(epsilon=0.5, norm=norm).perturb(losses, torch.zeros(8, 6), generator=seed())
    assert (seen[0] < 0).float().mean() > 0.3
    assert moved.min() >= 0
    assert all(rows.min() >= 0 for rows in seen[1:])


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_long_step_is_cut_at_the_bounds_before_the_ball(norm):
    # The first pixel is white already and has the largest gradient: a projection before the cut
    # would spend nearly the whole radius on it.
    attack = PGD(epsilon=0.5, norm=norm, steps=2, step_size=10.0, random_start=False)
    weight = torch.tensor([4.0, 3.0])
    moved = attack.perturb(lambda x: x @ weight, torch.tensor([[1.0, 0.2]]))
    best = torch.tensor([[1.0, 0.7]] if norm == "l2" else [[1.0, 0.2]])
    assert torch.allclose(moved, best)


def test_epsilon_and_bounds_may_differ_by_feature():
    attack = PGD(
        epsilon=(0.0, 0.2, 3.0), bounds=((0.0, 0.0, -9.0), 1.0), steps=20, random_start=False
    )
    moved = attack.perturb(lambda x: x.sum(1) - 2 * x[:, 2], torch.tensor([[0.5, 0.9, 0.0]]))
    assert torch.allclose(moved, torch.tensor([[0.5, 1.0, -3.0]]))
    with pytest.raises(ConfigError, match="length of epsilon = 3"):
        attack.perturb(lambda x: x.sum(1), torch.zeros(1, 4))


def test_more_restarts_never_lower_the_loss_of_a_record():
    losses = cross_entropy_of(mlp(), torch.tensor([0, 1, 2, 0]))
    inputs = torch.rand(4, 12, generator=seed())
    one, five = (
        losses(
            PGD(epsilon=0.2, steps=1, step_size=0.01, restarts=n).perturb(
                losses, inputs, generator=seed(1)
            )
        )
        for n in (1, 5)
    )
    assert (five >= one).all()
    assert (five > one).any()


def test_a_random_model_is_attacked_through_averaged_gradients():
    # One pass sees a gradient whose sign is right in 70 of 100 cases, the mean of 40 in nearly all.
    draws = seed(3)

    def losses(rows):
        return rows.sum(1) * (0.5 + torch.randn(len(rows), generator=draws))

    share = [
        (
            PGD(epsilon=0.1, bounds=None, steps=1, samples=n, random_start=False).perturb(
                losses, torch.zeros(300, 2)
            )
            > 0
        )
        .float()
        .mean()
        for n in (1, 40)
    ]
    assert share[0] < 0.8
    assert share[1] > 0.98


@pytest.mark.statistical
def test_the_l1_random_start_is_uniform_in_the_ball():
    # As for l2: the share of the volume within radius r is r^3.
    attack = PGD(epsilon=1.0, norm="l1", bounds=None, steps=1, step_size=1e-9)
    points = attack.perturb(lambda x: x.sum(1), torch.zeros(4000, 3), generator=seed())
    radius = points.abs().sum(1)
    for edge in (0.3, 0.5, 0.8):
        share = (radius < edge).float().mean().item()
        assert abs(share - edge**3) < 6 * (edge**3 * (1 - edge**3) / 4000) ** 0.5
    assert points.mean(0).abs().max() < 0.04


@pytest.mark.statistical
def test_the_l2_random_start_is_uniform_in_the_ball():
    # The share of a 3-ball's volume within radius r is r^3; 4,000 draws, tolerance of six standard
    # errors.
    attack = PGD(epsilon=1.0, norm="l2", bounds=None, steps=1, step_size=1e-9)
    radius = attack.perturb(lambda x: x.sum(1), torch.zeros(4000, 3), generator=seed()).norm(dim=1)
    for edge in (0.3, 0.5, 0.8):
        share = (radius < edge).float().mean().item()
        assert abs(share - edge**3) < 6 * (edge**3 * (1 - edge**3) / 4000) ** 0.5


def test_an_attack_returns_an_empty_batch_unchanged():
    for attack in (FGSM(epsilon=0.1), PGD(epsilon=0.1, norm="l2"), PGD(epsilon=1.0, norm="l1")):
        moved = attack.perturb(lambda x: x.sum(1), torch.zeros(0, 3), generator=seed())
        assert moved.shape == (0, 3)


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.1), ("l2", 0.5)])
def test_robust_accuracy_is_lower_under_pgd_than_under_fgsm(digits, norm, epsilon):
    model, inputs, labels = digits
    settings = {"epsilon": epsilon, "norm": norm}
    left = [
        robust_accuracy(model, inputs, labels, attack, generator=seed())
        for attack in (PGD(**settings, steps=20), FGSM(**settings), FGSM(epsilon=0.0))
    ]
    assert left[0] <= left[1] < left[2] - 5


def test_fgsm_lowers_accuracy_more_than_equally_large_noise(digits):
    model, inputs, labels = digits
    noise = robust_accuracy(model, inputs, labels, Noise(epsilon=0.1), generator=seed())
    fgsm = robust_accuracy(model, inputs, labels, FGSM(epsilon=0.1), generator=seed())
    assert fgsm < noise - 5


def test_robust_accuracy_equals_accuracy_when_epsilon_is_0(digits):
    model, inputs, labels = digits
    accuracy = 100 * (model(inputs).argmax(1) == labels).float().mean().item()
    for size in (7, 512):
        left = robust_accuracy(
            model, inputs, labels, FGSM(epsilon=0.0), generator=None, batch_size=size
        )
        assert left == pytest.approx(accuracy, abs=1e-4)


def test_a_misclassified_record_is_never_robust():
    # Row 1 is wrong as it is; raising its own label's loss cannot help, but a bad attack moves it
    # across.
    class Backfiring(FGSM):
        def perturb(self, losses, inputs, *, generator=None):
            return 1 - inputs

    weight = torch.eye(2)
    inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 0])
    left = robust_accuracy(
        lambda x: x @ weight, inputs, labels, Backfiring(epsilon=1.0), generator=None
    )
    assert left == 0.0
    assert robust_accuracy(lambda x: x, inputs, labels, FGSM(epsilon=0.1), generator=None) == 50.0


@pytest.mark.parametrize("masked", [-1e9, torch.finfo(torch.float32).min, -float("inf")])
def test_masked_logits_do_not_change_robust_accuracy(digits, masked):
    model, inputs, labels = digits
    keep = labels < 5
    inputs = inputs[keep]
    labels = labels[keep]
    hidden = torch.arange(10) >= 5

    def full(rows):
        return model(rows).masked_fill(hidden, masked)

    wide, narrow = (
        robust_accuracy(predict, inputs, labels, PGD(epsilon=0.1), generator=seed())
        for predict in (full, lambda rows: model(rows)[:, :5])
    )
    assert wide == narrow
    assert 0 < wide < 100


@pytest.mark.parametrize(
    "config, field",
    [
        ({"epsilon": -0.1}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"epsilon": 0.1, "norm": "l3"}, "norm"),
        ({"epsilon": (0.1, 0.2), "norm": "l2"}, "epsilon"),
        ({"epsilon": ()}, "epsilon"),
        ({"epsilon": 0.1, "bounds": ((0.0, 1.0), 0.5)}, "bounds"),
        ({"epsilon": 0.1, "bounds": ((), ())}, "bounds"),
        ({"epsilon": 0.1, "bounds": ((0.0, 0.0), (1.0, 1.0, 1.0))}, "bounds"),
        ({"epsilon": 0.1, "steps": 1.5}, r"pgd\.steps"),
        ({"epsilon": 0.1, "steps": "10"}, r"pgd\.steps"),
        ({"epsilon": 0.1, "restarts": 0}, "restarts"),
        ({"epsilon": 0.1, "restarts": 2, "random_start": False}, "restarts"),
        ({"epsilon": 0.1, "bounds": (1.0, 0.0)}, "bounds"),
        ({"epsilon": 0.1, "steps": 0}, "steps"),
        ({"epsilon": 0.1, "step_size": 0.0}, "step_size"),
    ],
)
def test_pgd_refuses_an_invalid_value_and_names_the_field(config, field):
    with pytest.raises(ConfigError, match=f"^{field} = "):
        PGD(**config)


def test_fgsm_refuses_averaged_losses_and_integer_inputs():
    with pytest.raises(ConfigError, match="one per record"):
        FGSM(epsilon=0.1).perturb(lambda x: x.mean(), torch.rand(3, 2))
    with pytest.raises(ConfigError, match="floating-point"):
        FGSM(epsilon=0.1).perturb(lambda x: x.sum(1), torch.ones(3, 2, dtype=torch.int64))


def test_robust_accuracy_refuses_bad_inputs_and_labels():
    def measure(inputs, labels):
        return robust_accuracy(lambda x: x, inputs, labels, FGSM(epsilon=0.1), generator=None)

    with pytest.raises(ConfigError, match=r"attack\.bounds"):
        measure(torch.tensor([[-2.0, 0.5]]), torch.tensor([1]))
    with pytest.raises(ConfigError, match=r"labels\.shape"):
        measure(torch.rand(2, 2), torch.tensor([1]))
    with pytest.raises(ConfigError, match="at least one record"):
        measure(torch.rand(0, 2), torch.zeros(0, dtype=torch.int64))
