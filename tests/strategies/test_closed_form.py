"""Closed-form heads: sums in float64, comparisons with scikit-learn and brute force, and noise."""

import math

import pytest
import torch

from helpers.order_invariance import accuracy, stream_of
from perdure.contract.forward import Forward
from perdure.data.records import Batch, Records
from perdure.errors import StrategyError
from perdure.learner.learner import Learner
from perdure.models.frozen import frozen
from perdure.models.random_convolutions import RandomConvolutions
from perdure.privacy.clipping.clip import Clip
from perdure.privacy.settings import Privacy
from perdure.queries.evaluation import bounded_sum, exact_sum
from perdure.queries.gram import Gram, unsvec
from perdure.strategies import NCM, SLDA, RanPAC
from perdure.strategies._closed_form import (
    BLOCK,
    ClassSums,
    Float64Gram,
    absent,
    class_means,
    denoised,
    discriminant_head,
    mirrored,
    ridge_head,
    shrunk,
    unit,
    within_covariance,
)


def rows(n=60, d=5, classes=3, seed=0):
    """Return (features, labels) with correlated features."""
    place = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, d, generator=place) @ torch.randn(d, d, generator=place)
    labels = torch.arange(n) % classes
    return mixed + labels[:, None], labels


def batch_of(features, labels):
    return Batch.current(Records(inputs=features, labels=labels), 0)


def asked(kind, classes=3, **weights):
    return kind(
        lambda forward, batch: batch.inputs,
        lambda forward, batch: (batch.labels[:, None] == torch.arange(classes)).float(),
        **weights,
    )


MODULE = torch.nn.Identity()

# --------------------------------------------------------------------------- sums


@pytest.mark.parametrize("d", [5, BLOCK - 1, BLOCK, BLOCK + 3])
def test_float64_gram_sums_equal_gram_sums(d):
    f, y = rows(n=40, d=d)
    found = exact_sum(asked(Float64Gram), Forward(MODULE), batch_of(f, y), 7)
    assert {value.dtype for value in found.values()} == {torch.float64}
    wide = f.double()
    targets = torch.eye(3, dtype=torch.float64)[y]
    expected = {"gram": wide.T @ wide, "cross": wide.T @ targets, "totals": targets.sum(0)}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
    assert torch.equal(found["gram"], found["gram"].T)


def test_float64_gram_sums_do_not_depend_on_the_record_order():
    f, y = rows(n=3000, d=8)
    order = torch.randperm(len(f), generator=torch.Generator().manual_seed(1))

    def gap(kind):
        here, there = (
            exact_sum(asked(kind), Forward(MODULE), b, 100)
            for b in (batch_of(f, y), batch_of(f[order], y[order]))
        )
        return float((here["gram"] - there["gram"]).abs().max() / here["gram"].abs().max())

    assert gap(Float64Gram) < 1e-14 < 1e-8 < gap(Gram)


def test_class_sums_equal_gram_sums_without_the_matrix():
    f, y = rows()
    narrow = asked(ClassSums, weight=0.5, totals=0.25)
    found = exact_sum(narrow, Forward(MODULE), batch_of(f, y), 7)
    expected = exact_sum(asked(Float64Gram), Forward(MODULE), batch_of(f, y), 7)
    expected.pop("gram")
    assert found.keys() == expected.keys() == narrow.shapes(Forward(MODULE), batch_of(f, y)).keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    bound = 1.5
    lengths = (0.25 * f.square().sum(1) + 0.0625).sqrt()
    factors = (bound / lengths).clamp(max=1.0)
    assert int((factors < 1).sum()) > 5 and narrow.norm(2.0) == pytest.approx(math.sqrt(1 + 0.0625))
    clipped = bounded_sum(narrow, MODULE, {}, batch_of(f, y).tensors(), Clip(norm=bound))
    targets = torch.eye(3)[y]
    torch.testing.assert_close(clipped["cross"], 0.5 * (f * factors[:, None]).T @ targets)
    torch.testing.assert_close(narrow.unpacked(clipped)["totals"], factors @ targets)


def test_one_record_changes_class_sums_by_at_most_clip_norm():
    f, y = rows()
    narrow = asked(ClassSums, totals=0.5)

    def clipped(keep):
        return bounded_sum(narrow, MODULE, {}, batch_of(f[keep], y[keep]).tensors(), Clip(norm=1.0))

    everyone = torch.ones(len(f), dtype=torch.bool)
    for dropped in range(0, len(f), 6):
        keep = everyone.clone()
        keep[dropped] = False
        here = clipped(everyone)
        there = clipped(keep)
        moved = torch.cat([(here[name] - there[name]).flatten() for name in here]).norm()
        assert 0.9 < float(moved) <= 1 + 1e-4


def test_mirrored_copies_the_upper_triangle_of_a_matrix():
    assert mirrored(torch.tensor([[1.0, 2.0], [9.0, 3.0]])).tolist() == [[1.0, 2.0], [2.0, 3.0]]


# --------------------------------------------------------------------------- heads


@pytest.mark.reference
def test_the_ridge_head_equals_ridge_of_scikit_learn():
    from sklearn.linear_model import Ridge

    f, y = (value.double() for value in rows())
    targets = torch.eye(3, dtype=torch.float64)[y.long()]
    reference = Ridge(alpha=0.3, fit_intercept=False).fit(f.numpy(), targets.numpy())
    torch.testing.assert_close(
        ridge_head(f.T @ f, f.T @ targets, 0.3), torch.from_numpy(reference.coef_.T)
    )


def test_a_singular_gram_matrix_is_refused_naming_the_ridge():
    with pytest.raises(StrategyError, match="width 3 with ridge = 0 is singular"):
        ridge_head(torch.zeros(3, 3), torch.zeros(3, 2), 0.0)


def test_the_covariance_is_computed_around_the_class_means():
    f, y = rows()
    f = f.double()
    targets = torch.eye(3, dtype=torch.float64)[y]
    means = torch.stack([f[y == c].mean(0) for c in range(3)])
    found = within_covariance(f.T @ f, f.T @ targets, targets.sum(0))
    around = f - means[y]
    torch.testing.assert_close(found, around.T @ around / len(f))
    torch.testing.assert_close(class_means(f.T @ targets, targets.sum(0)), means.T)


@pytest.mark.reference
@pytest.mark.parametrize("shrinkage", [0.05, 1.0])
def test_covariance_shrinkage_equals_scikit_learn(shrinkage):
    from sklearn.covariance import shrunk_covariance

    matrix = torch.cov(rows()[0].T).double()
    expected = torch.from_numpy(shrunk_covariance(matrix.numpy(), shrinkage))
    torch.testing.assert_close(shrunk(matrix, shrinkage, scaled=True), expected)
    towards_one = shrunk(matrix, shrinkage, scaled=False)
    torch.testing.assert_close(
        towards_one, (1 - shrinkage) * matrix + shrinkage * torch.eye(5, dtype=torch.float64)
    )


def test_a_closed_form_head_without_records_is_zero():
    """A federation derives the head before the first record."""
    empty = within_covariance(torch.zeros(3, 3), torch.zeros(3, 2), torch.zeros(2))
    weight, bias = discriminant_head(
        shrunk(empty, 0.1, scaled=True), class_means(torch.zeros(3, 2), torch.zeros(2))
    )
    assert torch.equal(weight, torch.zeros(3, 2)) and torch.equal(bias, torch.zeros(2))
    assert float(absent(torch.zeros(2)).max()) < -1e8


@pytest.mark.reference
def test_the_discriminant_head_gives_the_gaussian_log_density():
    f, _ = rows()
    covariance = torch.cov(f.T) + torch.eye(5)
    means = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    weight, bias = discriminant_head(covariance, means)
    logs = torch.stack(
        [torch.distributions.MultivariateNormal(m, covariance).log_prob(f) for m in means.T], 1
    )
    gap = f @ weight + bias - logs
    torch.testing.assert_close(gap, gap[:, :1].expand_as(gap), rtol=1e-3, atol=1e-3)


def test_normalised_rows_have_norm_1_and_zero_rows_stay_0():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(unit(x), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


# --------------------------------------------------------------------------- noise


def noise(d, scale, seed):
    """Return noise as in a release of `Gram`: `scale` on the diagonal, scale / sqrt(2) off it."""
    drawn = torch.randn(
        d * (d + 1) // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return unsvec(scale * drawn)


def test_denoising_keeps_a_matrix_without_negative_eigenvalues():
    f = rows()[0].double()
    torch.testing.assert_close(denoised(f.T @ f), f.T @ f)


@pytest.mark.statistical
@pytest.mark.parametrize("seed", range(3))
def test_denoising_adds_the_noise_level_of_weak_directions(seed):
    """By Wigner's law the least eigenvalue is near -s sqrt(2 d); at d = 200 within 5 % except for
    one matrix in a million.
    """
    strong = torch.zeros(200, 200, dtype=torch.float64)
    strong[:3, :3] = 1e4 * torch.eye(3)
    found = torch.linalg.eigvalsh(denoised(strong + noise(200, 2.0, seed), share=1.0))
    assert float(found[0]) == pytest.approx(2.0 * math.sqrt(400), rel=0.05)


@pytest.mark.statistical
def test_denoising_improves_the_accuracy_of_a_noisy_head():
    """The squared error of the ridge head is compared over ten draws; the worse head is off by
    orders of magnitude.
    """
    f = torch.randn(2000, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    f[:, 10:] *= 0.01
    truth = torch.randn(40, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth[10:] = 0
    gram = f.T @ f

    def error(share, seed):
        noisy = gram + noise(40, 20.0, seed)
        used = denoised(noisy, share=share) if share else noisy
        return float(
            (torch.linalg.solve(used + 1e-3 * torch.eye(40), gram @ truth) - truth).square().sum()
        )

    better = [error(0.5, seed) < 0.5 * error(0.0, seed) for seed in range(10)]
    assert sum(better) >= 8


# ------------------------------------------------------------------------- features of any length


class Scaled(torch.nn.Module):
    """Frozen features of norm k at most."""

    def __init__(self, inner, k):
        super().__init__()
        self.inner = inner
        self.k = k
        self.feature_size = inner.feature_size

    def features(self, x):
        f = self.inner.features(x)
        return self.k * f / f.norm(dim=1, keepdim=True).clamp(min=1e-12)

    def forward(self, x):
        return self.inner(x)


BOUNDED = {
    "RanPAC": lambda k: RanPAC(normalise=False, bound=k, projection=0, ridge=1e-6),
    "RanPAC with a bias": lambda k: RanPAC(normalise=False, bound=k, ridge=1e-6, bias=0.5 * k),
    "SLDA": lambda k: SLDA(normalise=False, bound=k, shrinkage=0.01),
    "NCM": lambda k: NCM(normalise=False, bound=k),
}


def accuracy_of(strategy, k, privacy):
    inner = frozen(
        RandomConvolutions(filters=6, size=3, pool=4), input_shape=(1, 8, 8), num_classes=10
    )
    learner = Learner(
        model=Scaled(inner, k),
        strategy=strategy,
        optimizer=torch.optim.SGD,
        iterations=1,
        privacy=privacy,
    )
    learner.fit(stream_of(experiences=2))
    return accuracy(learner), learner


@pytest.mark.parametrize("name", BOUNDED)
def test_private_accuracy_does_not_depend_on_the_feature_scale(name):
    """A power of 2 changes no digit, so the noise is the same in units of the bound."""
    privacy = Privacy(noise_multiplier=0.5, release_noise=1.0, seed=1)
    base, plain = accuracy_of(BOUNDED[name](1.0), 1.0, privacy)
    assert base > 0.4
    for k in (1 / 16, 16.0):
        found, learner = accuracy_of(BOUNDED[name](k), k, privacy)
        assert abs(found - base) < 0.02
        torch.testing.assert_close(learner.state["cross"] / k, plain.state["cross"])
        norms = {entry.clip_norm for entry in learner.private_sum.ledger.entries}
        assert norms == {entry.clip_norm for entry in plain.private_sum.ledger.entries}
