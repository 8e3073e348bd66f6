"""Measured robustness: saturated logits, modes of the model, cards, and a reference."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perdure.adversarial import (
    FGSM,
    PGD,
    AutoAttack,
    margin,
    measure_robustness,
    rescaled_cross_entropy,
    robust_accuracy,
    towards,
)
from perdure.errors import ConfigError, NonFiniteError


def seed(value=0):
    return torch.Generator().manual_seed(value)


@pytest.fixture(scope="module")
def digits():
    """Return a trained model and 200 test images."""
    from sklearn.datasets import load_digits

    data = load_digits()
    inputs = torch.tensor(data.data / 16, dtype=torch.float32)
    labels = torch.tensor(data.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[:1200]), labels[:1200]).backward()
        optimizer.step()
    return model, inputs[1200:1400], labels[1200:1400]


@pytest.mark.parametrize("attack", [PGD(epsilon=0.1), PGD(epsilon=0.6, norm="l2")])
def test_logits_100_times_as_large_do_not_look_robust(digits, attack):
    model, inputs, labels = digits
    plain, scaled = (
        measure_robustness(
            lambda rows, factor=factor: factor * model(rows),
            inputs,
            labels,
            attack,
            generator=seed(),
        )
        for factor in (1, 100)
    )
    assert abs(plain.robust_accuracy - scaled.robust_accuracy) <= 1
    assert plain.zero_gradients < 5 < 50 < scaled.zero_gradients
    hidden = robust_accuracy(
        lambda rows: 100 * model(rows),
        inputs,
        labels,
        attack,
        generator=seed(),
        objectives=["cross_entropy"],
    )
    assert hidden > scaled.robust_accuracy + 20


def test_a_record_must_survive_every_objective(digits):
    model, inputs, labels = digits

    def measured(*objectives):
        return robust_accuracy(
            model, inputs, labels, FGSM(epsilon=0.05), generator=None, objectives=objectives
        )

    both = measured("margin", "rescaled_cross_entropy")
    assert both <= min(measured("margin"), measured("rescaled_cross_entropy"))


def test_objectives_equal_their_formulas():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]])
    labels = torch.tensor([0, 2])
    assert margin(logits, labels).tolist() == [-1.0, 4.0]
    expected = F.cross_entropy(logits / torch.tensor([[1.0], [4.0]]), labels, reduction="none")
    assert torch.allclose(rescaled_cross_entropy(logits, labels), expected)
    assert torch.allclose(rescaled_cross_entropy(1000 * logits, labels), expected)


def test_a_targeted_attack_ends_in_the_target_class(digits):
    model, inputs, labels = digits
    target = (labels + 1) % 10
    loss = towards(target)
    moved = PGD(epsilon=0.3, steps=20).perturb(
        lambda rows: loss(model(rows)), inputs, generator=seed()
    )
    assert (model(moved).argmax(1) == target).float().mean() > 0.9


def test_an_evaluation_leaves_a_module_in_its_mode_and_unchanged():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model[1].eval()  # modes that differ by layer
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    inputs = torch.rand(20, 6, generator=seed())
    labels = torch.randint(0, 3, (20,), generator=seed())
    found = {
        size: robust_accuracy(
            model, inputs, labels, FGSM(epsilon=0.1), generator=None, batch_size=size
        )
        for size in (3, 20)
    }
    assert found[3] == found[20]
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_card_has_the_threat_model_and_is_valid_json(digits):
    model, inputs, labels = digits
    attack = PGD(epsilon=0.1, norm="l2", steps=4, restarts=2)
    card = measure_robustness(model, inputs, labels, attack, generator=seed())
    clean = 100 * (model(inputs).argmax(1) == labels).float().mean().item()
    assert card.clean_accuracy == pytest.approx(clean)
    assert card.settings["steps"] == 4
    assert 0.09 < card.largest_change <= 0.1 + 1e-6
    assert json.loads(json.dumps(card.row()))["objectives"] == ["rescaled_cross_entropy", "margin"]
    for word in ("robust", "clean", "l2 0.1", "restarts 2", "margin", "200 records"):
        assert word in str(card)


def test_unknown_objectives_are_refused_by_name(digits):
    model, inputs, labels = digits
    for objectives in ([], ["dlr"], "margin"):
        with pytest.raises(ConfigError, match=r"^objectives = "):
            robust_accuracy(
                model, inputs, labels, FGSM(epsilon=0.1), generator=None, objectives=objectives
            )


@pytest.mark.reference
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_pgd_equals_the_adversarial_robustness_toolbox(digits, norm):
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    model, inputs, labels = digits
    # In l1 both stay inside the ball: the toolbox shortens a point that leaves it, where the
    # nearest point of the ball is another one.
    size = {"linf": 0.03, "l2": 0.1, "l1": 0.1}[norm]
    epsilon = {"linf": 0.1, "l2": 0.35, "l1": 0.5}[norm]
    theirs = ProjectedGradientDescent(
        PyTorchClassifier(model, nn.CrossEntropyLoss(), (64,), 10, clip_values=(0.0, 1.0)),
        norm={"linf": np.inf, "l2": 2, "l1": 1}[norm],
        eps=epsilon,
        eps_step=size,
        max_iter=5,
        verbose=False,
    )
    expected = theirs.generate(inputs.numpy(), F.one_hot(labels, 10).numpy())
    ours = PGD(epsilon=epsilon, norm=norm, steps=5, step_size=size, random_start=False)
    moved = ours.perturb(
        lambda rows: F.cross_entropy(model(rows), labels, reduction="none"), inputs
    )
    assert np.abs(moved.numpy() - expected).max() < 1e-6


@pytest.mark.reference
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_fgsm_equals_the_adversarial_robustness_toolbox(digits, norm):
    from art.attacks.evasion import FastGradientMethod
    from art.estimators.classification import PyTorchClassifier

    model, inputs, labels = digits
    epsilon = {"linf": 0.1, "l2": 0.35, "l1": 0.5}[norm]
    theirs = FastGradientMethod(
        PyTorchClassifier(model, nn.CrossEntropyLoss(), (64,), 10, clip_values=(0.0, 1.0)),
        norm={"linf": np.inf, "l2": 2, "l1": 1}[norm],
        eps=epsilon,
    )
    expected = theirs.generate(inputs.numpy(), F.one_hot(labels, 10).numpy())
    moved = FGSM(epsilon=epsilon, norm=norm).perturb(
        lambda rows: F.cross_entropy(model(rows), labels, reduction="none"), inputs
    )
    assert np.abs(moved.numpy() - expected).max() < 1e-6


def test_gradients_that_are_not_finite_do_not_look_robust(digits):
    model, inputs, labels = digits

    def imputing(rows):
        # a distance of 0 has the gradient NaN, and a step along it is repaired by the model
        rows = rows.nan_to_num(0.5)
        return model(rows) + torch.sqrt((rows[:, :1] - rows[:, :1]).square())

    attack = PGD(epsilon=0.1, random_start=False)
    honest, hidden = (
        measure_robustness(predict, inputs, labels, attack, generator=None)
        for predict in (model, imputing)
    )
    assert honest.zero_gradients < 5
    assert hidden.zero_gradients == 100
    assert hidden.largest_change <= 0.1 + 1e-6
    # the entry with the hidden gradient stays where it is, all others are attacked
    assert abs(hidden.robust_accuracy - honest.robust_accuracy) <= 5


def test_an_attack_that_makes_nan_is_refused_with_its_name(digits):
    model, inputs, labels = digits

    class Broken(FGSM):
        def perturb(self, losses, inputs, *, generator=None):
            return inputs / 0.0

    with pytest.raises(NonFiniteError, match="Broken made NaN"):
        robust_accuracy(
            lambda rows: model(rows.nan_to_num(0.0)),
            inputs,
            labels,
            Broken(epsilon=0.1),
            generator=None,
        )


def test_labels_of_another_dtype_are_refused_by_name(digits):
    model, inputs, labels = digits
    with pytest.raises(ConfigError, match=r"^labels\.dtype = torch.int32"):
        robust_accuracy(model, inputs, labels.int(), FGSM(epsilon=0.1), generator=None)


@pytest.fixture(scope="module")
def images():
    """Return a small model of images with four classes, and images from -1 to 3."""
    draws = seed(5)
    weight = torch.randn(16, 4, generator=draws)
    inputs = 4 * torch.rand(8, 1, 4, 4, generator=draws) - 1
    return lambda rows: rows.flatten(1) @ weight, inputs, (inputs.flatten(1) @ weight).argmax(1)


def test_auto_attack_breaks_images_with_a_large_epsilon(images):
    model, inputs, labels = images
    attack = AutoAttack(epsilon=3.5, bounds=(-1.0, 3.0))
    card = measure_robustness(model, inputs, labels, attack, generator=seed())
    assert card.robust_accuracy == 0
    assert card.clean_accuracy == 100
    assert card.largest_change <= 3.5 + 1e-5
    assert card.objectives == ()


@pytest.mark.slow
def test_auto_attack_sees_through_masked_classes_and_beats_pgd(images):
    model, inputs, labels = images
    inputs = inputs.flatten(1)  # no images, so without Square, which takes seconds
    limits = {"epsilon": 0.3, "bounds": (-1.0, 3.0)}
    state = torch.get_rng_state()
    auto = robust_accuracy(
        lambda rows: F.pad(model(rows), (2, 3), value=-1e9),
        inputs,
        labels + 2,
        AutoAttack(**limits),
        generator=seed(),
    )
    pgd = robust_accuracy(model, inputs, labels, PGD(**limits, steps=20), generator=seed())
    assert 0 < auto <= pgd < 100
    assert torch.equal(torch.get_rng_state(), state)


def test_auto_attack_is_refused_in_training_and_without_bounds():
    attack = AutoAttack(epsilon=0.1)
    with pytest.raises(ConfigError, match="AutoAttack evaluates only"):
        attack.perturb(lambda rows: rows.sum(1), torch.rand(2, 3), generator=seed())
    for wrong in ({"epsilon": 0.0}, {"epsilon": 0.1, "bounds": None}):
        with pytest.raises(ConfigError):
            AutoAttack(**wrong)
