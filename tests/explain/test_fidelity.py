"""Measures of explanations, beside brute force on small models, scipy and Quantus."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from perdure.errors import ConfigError
from perdure.explain import (
    Attribution,
    KernelSHAP,
    TokenBackground,
    deletion_area,
    faithfulness_correlation,
    insertion_area,
    max_sensitivity,
    rank_correlation,
    sparsity,
    top_overlap,
)

WEIGHT = torch.tensor([[3.0, -1.0], [0.5, 2.0], [-2.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
INPUTS = torch.tensor([[1.0, 2.0, 1.0, 0.5], [0.3, -1.0, 2.0, 1.0]], dtype=torch.float64)
BACKGROUND = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 1.0]], dtype=torch.float64)


def predict(rows):
    return torch.tanh(rows @ WEIGHT / 3) + (rows @ WEIGHT)[:, [1, 0]] / 5


def explained(values, *, every=False):
    """Return an attribution of given values (n, ...[, k])."""
    n = len(values)
    base = torch.zeros(n, values.shape[-1]) if every else torch.zeros(n)
    return Attribution(values=values, base=base, targets=base.long())


def mean_output(x, kept, target):
    """Mean output of one instance over the background, with features outside `kept` from there."""
    rows = [torch.where(torch.tensor(kept), x, row) for row in BACKGROUND]
    return float(predict(torch.stack(rows))[:, target].mean())


def area_by_hand(x, values, target, *, insert):
    order = sorted(range(4), key=lambda j: -values[j])
    heights = []
    for count in range(5):
        first = [j in order[:count] for j in range(4)]
        heights.append(mean_output(x, first if insert else [not each for each in first], target))
    return sum((a + b) / 2 for a, b in pairwise(heights)) / 4


@pytest.mark.parametrize("insert", [True, False])
def test_areas_equal_brute_force_for_all_outputs(insert):
    found = KernelSHAP().explain(predict, INPUTS, BACKGROUND, targets="all")
    measure = insertion_area if insert else deletion_area
    areas = measure(predict, INPUTS, found, BACKGROUND, steps=4)
    for i, x in enumerate(INPUTS):
        for target in range(2):
            wanted = area_by_hand(x, found.values[i, :, target].tolist(), target, insert=insert)
            assert float(areas[i, target]) == pytest.approx(wanted, abs=1e-12)


def test_an_honest_order_has_better_areas_than_its_reverse():
    found = KernelSHAP().explain(predict, INPUTS, BACKGROUND, targets=0)
    wrong = Attribution(values=-found.values, base=found.base, targets=found.targets)
    for chunk in (None, 3):
        out = [
            deletion_area(predict, INPUTS, each, BACKGROUND, chunk=chunk) for each in (found, wrong)
        ]
        into = [insertion_area(predict, INPUTS, each, BACKGROUND) for each in (found, wrong)]
        assert (out[0] < out[1]).all() and (into[0] > into[1]).all()
        assert out[0].shape == (2,)


def test_faithfulness_is_1_for_a_linear_model_and_equals_numpy():
    linear = lambda rows: rows @ WEIGHT  # noqa: E731
    found = KernelSHAP().explain(linear, INPUTS, BACKGROUND, targets="all")
    exact = faithfulness_correlation(linear, INPUTS, found, BACKGROUND, subset=2)
    assert torch.allclose(exact, torch.ones(2, 2, dtype=torch.float64))
    draws = torch.Generator().manual_seed(5)
    bent = KernelSHAP().explain(predict, INPUTS, BACKGROUND, targets=1)
    measured = faithfulness_correlation(
        predict, INPUTS, bent, BACKGROUND, subset=2, draws=7, generator=draws
    )
    order = torch.rand(7, 4, generator=torch.Generator().manual_seed(5)).argsort(1)[:, :2].tolist()
    for i, x in enumerate(INPUTS):
        full = float(predict(x[None])[0, 1])
        lost = [full - mean_output(x, [j not in each for j in range(4)], 1) for each in order]
        sums = [float(bent.values[i, each].sum()) for each in order]
        assert float(measured[i]) == pytest.approx(np.corrcoef(sums, lost)[0, 1], abs=1e-9)


def test_a_constant_model_has_the_faithfulness_0():
    found = explained(torch.rand(2, 4, dtype=torch.float64))
    constant = lambda rows: rows[:, :1] * 0 + 0.1  # noqa: E731
    assert faithfulness_correlation(constant, INPUTS, found, BACKGROUND).tolist() == [0.0, 0.0]


def test_sensitivity_is_0_for_constants_and_grows_by_radius():
    still = max_sensitivity(lambda rows: explained(torch.ones_like(rows)), INPUTS, radius=0.1)
    assert still.tolist() == [0.0, 0.0]

    def moving(rows):
        return explained(rows.clone())

    for radius in (0.1, 0.2):
        found = max_sensitivity(moving, INPUTS, radius=radius, draws=200)
        limit = radius * 2 / INPUTS.norm(dim=1)  # the corners of the box
        assert (found <= limit).all() and (found > 0.6 * limit).all()


def test_sparsity_is_the_gini_index():
    values = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, -5], [1, 2, 3, 4], [0, 0, 0, 0]])
    assert sparsity(explained(values)).tolist() == pytest.approx([0.0, 0.75, 0.25, 0.0])
    every = torch.stack([values, values.flip(0)], dim=2)
    assert torch.equal(sparsity(explained(every, every=True))[:, 0], sparsity(explained(values)))


def test_rank_correlation_is_spearmans_with_mean_ranks():
    draws = torch.Generator().manual_seed(0)
    one, other = (torch.randint(0, 5, (6, 3, 4), generator=draws).double() for _ in range(2))
    found = rank_correlation(explained(one), explained(other))
    wanted = [
        spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(one, other, strict=True)
    ]
    assert found.tolist() == pytest.approx(wanted)
    flat = torch.zeros(1, 4)
    assert rank_correlation(explained(flat), explained(flat)).tolist() == [1.0]
    assert rank_correlation(explained(flat), explained(torch.rand(1, 4))).tolist() == [0.0]


def test_top_overlap_counts_the_largest_absolute_values():
    one = explained(torch.tensor([[5.0, -4.0, 1.0, 0.0]]))
    other = explained(torch.tensor([[0.0, 4.0, 1.0, -5.0]]))
    assert top_overlap(one, other, count=2).tolist() == [0.5]
    assert top_overlap(one, one).tolist() == [1.0]


@pytest.mark.parametrize(
    ("measure", "field"),
    [
        (lambda f: deletion_area(predict, INPUTS, f, BACKGROUND, steps=0), "steps = 0"),
        (lambda f: deletion_area(predict, INPUTS[:, :3], f, BACKGROUND), "found.values.shape"),
        (lambda f: faithfulness_correlation(predict, INPUTS, f, BACKGROUND, draws=1), "draws = 1"),
        (
            lambda f: faithfulness_correlation(predict, INPUTS, f, BACKGROUND, subset=9),
            "subset = 9",
        ),
        (lambda f: max_sensitivity(lambda _: f, INPUTS, radius=0), "radius = 0"),
        (lambda f: max_sensitivity(lambda _: f, INPUTS.long(), radius=1), "inputs.dtype"),
        (lambda f: top_overlap(f, f, count=5), "count = 5"),
        (lambda f: rank_correlation(f, explained(torch.zeros(2, 3))), "other.values.shape"),
    ],
)
def test_a_measure_refuses_what_does_not_fit_and_names_it(measure, field):
    with pytest.raises(ConfigError, match=f"^{field}"):
        measure(explained(torch.rand(2, 4, dtype=torch.float64)))


@pytest.mark.reference
def test_measures_agree_with_quantus():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import quantus

        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(36, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        )
        x = torch.rand(3, 1, 6, 6)
        model.eval()[1].weight.data *= 6  # bent enough that the correlation is far from 1
        labels = torch.tensor([0, 2, 1])
        found = KernelSHAP(samples=200).explain(model, x, torch.zeros(1, 1, 6, 6), targets=labels)
        asked = {
            "model": model,
            "x_batch": x.numpy(),
            "y_batch": labels.numpy(),
            "a_batch": found.values.numpy(),
            "device": "cpu",
        }
        plain = {"disable_warnings": True, "normalise": False, "abs": False}
        gini = quantus.Sparseness(**(plain | {"abs": True}))(**asked)
        np.random.seed(0)  # the only seed that quantus has
        theirs = quantus.FaithfulnessCorrelation(
            nr_runs=400, subset_size=7, perturb_baseline="black", return_aggregate=False, **plain
        )(**asked)
    mine = faithfulness_correlation(model, x, found, torch.zeros(1, 1, 6, 6), subset=7, draws=2000)
    assert sparsity(found).tolist() == pytest.approx(
        gini, abs=1e-5
    )  # quantus adds 1e-8 to every value
    # theirs has a standard error of 0.02 at 400 sets, for a correlation of 0.8
    assert mine.tolist() == pytest.approx(theirs, abs=0.08)
    assert mine.min() > 0.5


WORDS = torch.tensor([[7, 1, 3, 1], [1, 3, 7, 3]])
FRAMED = TokenBackground(baseline=0, kept=(7,))


def read(tokens):
    """A model of token numbers, with outputs (n, 2)."""
    if tokens.is_floating_point():
        raise TypeError("tokens are whole numbers")
    weights = torch.tensor([[1.0, 2], [3, -1], [-2, 1], [1, 1]], dtype=torch.float64)
    return (tokens.double() @ weights).square()


@pytest.mark.parametrize("measure", [deletion_area, insertion_area])
def test_areas_never_remove_kept_tokens(measure):
    found = KernelSHAP().explain(read, WORDS, FRAMED, targets=1)
    areas = measure(read, WORDS, found, FRAMED, steps=4)
    for i, words in enumerate(WORDS):
        order = found.values[i].argsort(descending=True, stable=True).tolist()
        heights = []
        for count in range(5):
            first = torch.tensor([place in order[:count] for place in range(4)])
            present = first if measure is insertion_area else ~first
            row = torch.where(present | (words == 7), words, 0)
            heights.append(float(read(row[None])[0, 1]))
        wanted = sum((a + b) / 2 for a, b in pairwise(heights)) / 4
        assert areas[i].item() == pytest.approx(wanted)


def test_faithfulness_never_removes_kept_tokens():
    rows = []

    def noted(tokens):
        rows.append(tokens)
        return read(tokens)

    found = KernelSHAP().explain(read, WORDS[:1], FRAMED, targets=1)
    rows.clear()
    faithfulness_correlation(noted, WORDS[:1], found, FRAMED, subset=2)
    seen = torch.cat([each for each in rows if not each.is_floating_point()])
    changed = seen[(seen != 0).any(1)]  # the background alone is all 0
    assert len(changed) > 90 and (changed[:, 0] == 7).all()
    assert (changed[:, 1:] == 0).any()
