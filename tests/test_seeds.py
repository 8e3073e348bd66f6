"""Numbers that are a function of where they are used: normal, independent, and the same in any company."""

import math

import pytest
import torch
from torch.func import vmap

from perdure.seeds import GOLDEN, normals, scrambled, shifted

N = 200_000
BAND = 4.5
"""Standard errors allowed. Nothing here is random: a check that holds once holds always, up to rounding."""


def standard(x):
    """Whether numbers have the first four moments and the tails of a standard normal, each within its error."""
    x = x.double().flatten()
    n = len(x)
    errors = {"mean": 1.0, "square": math.sqrt(2), "cube": math.sqrt(15), "fourth": math.sqrt(96)}
    moments = {"mean": x.mean(), "square": (x**2).mean() - 1, "cube": (x**3).mean(), "fourth": (x**4).mean() - 3}
    beyond = {cut: 1 - math.erf(cut / math.sqrt(2)) for cut in (0.1, 1.0, 2.0, 3.0)}
    tails = [abs((x.abs() > cut).double().mean() - p) / math.sqrt(p * (1 - p) / n) for cut, p in beyond.items()]
    return all(abs(moments[k]) < BAND * errors[k] / math.sqrt(n) for k in errors) and all(t < BAND for t in tails)


def unrelated(x, y):
    """Whether two draws, their squares, and each with the other's square have no correlation."""
    pairs = [(x, y), (x**2, y**2), (x, y**2), (x**2, y)]
    corr = [torch.corrcoef(torch.stack([a.double().flatten(), b.double().flatten()]))[0, 1].abs() for a, b in pairs]
    return all(c < BAND / math.sqrt(x.numel()) for c in corr)


def at(ids, step=0, count=1, seed=0):
    return normals(ids, torch.tensor(step), count, seed=seed)


@pytest.mark.reference
def test_the_hash_is_splitmix64():
    """The first numbers of the published generator from the state 0."""
    counters = GOLDEN * torch.arange(1, 4)
    unsigned = [value % 2**64 for value in scrambled(counters).tolist()]
    assert unsigned == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    values = torch.tensor([-1, -(2**63), 5, 0])
    assert shifted(values, 30).tolist() == [(v % 2**64) >> 30 for v in values.tolist()]


@pytest.mark.statistical
def test_they_are_normal_over_records_steps_coordinates_and_seeds():
    ids = torch.arange(N)
    assert standard(at(ids)) and standard(at(torch.tensor([7]), count=N))
    assert standard(torch.cat([at(torch.tensor([7]), step=k, count=1) for k in range(4000)]))
    assert standard(torch.cat([at(torch.tensor([7]), seed=k, count=1) for k in range(4000)]))
    assert standard(at(ids * 2**20)) and standard(at(-ids)), "ids need not be small or dense"


@pytest.mark.statistical
def test_the_checks_find_numbers_that_are_not_normal():
    drawn = at(torch.arange(N))
    assert not standard(1.02 * drawn) and not standard(drawn + 0.02) and not standard(drawn.clamp(-2.5, 2.5))
    assert not standard(math.sqrt(12) * (torch.rand(N, generator=torch.Generator().manual_seed(0)) - 0.5))
    other = at(torch.arange(N), step=1)
    assert not unrelated(drawn, other + 0.02 * drawn) and not unrelated(drawn, other * (1 + 0.05 * drawn.abs()))


@pytest.mark.statistical
def test_near_places_have_nothing_in_common():
    ids = torch.arange(N)
    drawn = at(ids, step=3, count=3)
    first = drawn[:, 0]
    assert unrelated(first, drawn[:, 1]) and unrelated(first, drawn[:, 2])
    assert unrelated(first[1:], first[:-1]) and unrelated(first[:-1], drawn[1:, 1])
    for other in (at(ids, step=4), at(ids, step=3, seed=1), at(ids + 1, step=2), at(ids + 2**32, step=3)):
        assert unrelated(first, other[:, 0])


def test_no_two_places_draw_the_same_and_none_is_infinite():
    drawn = at(torch.arange(2000), step=5, count=50)
    assert drawn.dtype == torch.float32 and drawn.shape == (2000, 50) and drawn.isfinite().all()
    assert len(drawn.unique(dim=0)) == 2000 and (drawn != 0).all()
    rows = [at(torch.tensor([9]), step, 50, seed) for step in range(20) for seed in range(20)]
    assert len(torch.cat(rows).unique(dim=0)) == 400


def test_a_row_is_the_same_alone_in_any_company_and_under_vmap():
    ids = torch.tensor([5, 900, 3, 5, 2**40])
    whole = at(ids, step=2, count=4)
    torch.testing.assert_close(whole[0], whole[3])
    for i in range(len(ids)):
        torch.testing.assert_close(at(ids[i : i + 1], step=2, count=4)[0], whole[i])
    torch.testing.assert_close(vmap(lambda one: at(one[None], step=2, count=4)[0])(ids), whole)
    steps = vmap(lambda step: normals(ids, step, 4))(torch.arange(3))
    torch.testing.assert_close(steps[2], whole)
    assert (steps[1] - whole).abs().min() > 1e-4
    torch.testing.assert_close(at(ids, step=2, count=2), whole[:, :2])


def test_the_global_generator_is_neither_asked_nor_moved():
    torch.manual_seed(1)
    first, state = at(torch.arange(4)), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(at(torch.arange(4)), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
