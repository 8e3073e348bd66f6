import pytest
import torch

from helpers.squared_gradients import (
    BY_ROWS,
    FAST,
    Sequence,
    Twice,
    assert_same,
    batch,
    fisher_terms,
    small,
    summed,
    tied,
)
from perdure.contract.forward import Forward
from perdure.privacy.clipping.clip import Clip, clipped_sum
from perdure.queries.evaluation import bounded_sum, exact_sum, shapes_of
from perdure.queries.grouped_gradients import GroupedGradient
from perdure.queries.per_record import rows_of


def logit(forward, rows):
    chosen = forward(rows.inputs).gather(1, rows.labels[:, None])
    return chosen, torch.ones_like(chosen)


def by_label(rows):
    return rows.labels


def query_of(terms=logit, group=by_label, groups=3):
    return GroupedGradient(terms=terms, group=group, groups=groups)


def by_hand(module, terms, data, group, groups):
    """Return (n, groups, *parameter) rows, with one backward pass per record."""
    rows = {
        name: value.new_zeros(len(data), groups, *value.shape)
        for name, value in module.named_parameters()
    }
    for i, number in enumerate(group(data).tolist()):
        losses, weights = terms(Forward(module), data.take(slice(i, i + 1)))
        gradients = torch.autograd.grad((losses * weights).sum(), list(module.parameters()))
        for name, gradient in zip(rows, gradients, strict=True):
            if 0 <= number < groups:
                rows[name][i, number] = gradient
    return {name: value.detach() for name, value in rows.items()}


def problem(model, n=20):
    return small(model), batch(n=n, shape=(1, 8, 8) if model == "cnn" else (5,))


@pytest.mark.reference
@pytest.mark.parametrize("terms", [logit, fisher_terms])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_grouped_gradients_equal_one_backward_pass_per_record(model, terms):
    module, data = problem(model)
    query = query_of(terms)
    expected = by_hand(module, terms, data, by_label, 3)
    assert_same(
        {name: rows.detach() for name, rows in query(Forward(module), data).items()}, expected, 1e-6
    )
    total = {name: rows.sum(0) for name, rows in expected.items()}
    assert_same(summed(query, module, data), total, 1e-5)
    assert_same(exact_sum(query, Forward(module), data, 3), total, 1e-5)
    assert all(bool(value.any(dim=0).any()) for value in total.values())


@pytest.mark.parametrize("make", [Twice, Sequence, tied, *FAST, *BY_ROWS])
def test_grouped_sums_with_reused_layers_equal_a_record_loop(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make()
    data = batch()
    expected = {
        name: rows.sum(0) for name, rows in by_hand(module, logit, data, by_label, 3).items()
    }
    assert_same(summed(query_of(), module, data), expected, 1e-6)


@pytest.mark.parametrize("clip", [Clip(norm=0.3), Clip(norm=3.0), Clip(norm=0.5, per_layer=True)])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_the_clipped_grouped_sum_equals_the_sum_of_clipped_rows(model, clip):
    module, data = problem(model)
    query = query_of()
    params = {name: value.detach() for name, value in module.named_parameters()}
    expected = clipped_sum(rows_of(query, module), params, data.tensors(), clip, 3)
    assert_same(bounded_sum(query, module, params, data.tensors(), clip), expected, 1e-5)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_one_record_changes_a_grouped_sum_by_at_most_clip_norm(model):
    module, data = problem(model)
    query = query_of()
    bound = 0.3
    whole = summed(query, module, data, Clip(norm=bound))
    moved = []
    for i in range(0, len(data), 4):
        fewer = summed(query, module, data.take(torch.arange(len(data)) != i), Clip(norm=bound))
        moved.append(
            float(torch.stack([(whole[n] - fewer[n]).square().sum() for n in whole]).sum().sqrt())
        )
    assert 0.99 * bound < max(moved) <= bound * (1 + 1e-4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_record_with_nan_adds_nothing_to_its_group(model, poison):
    module, data = problem(model, 9)
    query = query_of(fisher_terms)
    clip = Clip(norm=0.05)
    clean = summed(query, module, data.take(slice(1, None)), clip)
    data.inputs[0] = poison
    spoilt = summed(query, module, data, clip)
    moved = (
        torch.stack([(spoilt[name] - clean[name]).square().sum() for name in clean]).sum().sqrt()
    )
    assert float(moved) <= 0.05 * (1 + 1e-4)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_record_without_a_group_adds_nothing(model):
    module, data = problem(model)
    shifted = lambda rows: 2 * rows.labels - 1  # noqa: E731  # -1, 1 and 3, of 3 groups
    found = summed(query_of(group=shifted), module, data)
    only = summed(query_of(), module, data.take(data.labels == 1))
    for name, value in found.items():
        torch.testing.assert_close(value[1], only[name][1], rtol=1e-4, atol=1e-6)
        assert not value[0].any() and not value[2].any()


def test_a_grouped_release_of_no_records_keeps_its_shape():
    module, data = problem("mlp")
    none = data.take(slice(0, 0))
    assert summed(query_of(), module, none) is None
    assert shapes_of(query_of(groups=7), Forward(module), none.tensors())["head.bias"] == (7, 3)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_grouped_gradients_form_no_rows_for_all_groups(model, monkeypatch):
    """The rows would take 20 x 100,000 gradients."""
    module, data = problem(model)
    params = {name: value.detach() for name, value in module.named_parameters()}
    monkeypatch.setattr(GroupedGradient, "__call__", None)
    query = query_of(groups=1000)
    assert bounded_sum(query, module, params, data.tensors(), Clip(norm=0.3))[
        "head.bias"
    ].shape == (1000, 3)
    assert exact_sum(query, Forward(module), data, 2)["head.bias"].shape == (1000, 3)


class Cheating(GroupedGradient):
    def summed(self, module, params, tensors, clip=None):
        return {
            name: 1e6 * value
            for name, value in super().summed(module, params, tensors, clip).items()
        }

    clipped_sum = summed


def test_a_users_grouped_query_cannot_change_the_clipping():
    module, data = problem("mlp")
    params = {name: value.detach() for name, value in module.named_parameters()}
    honest = bounded_sum(query_of(), module, params, data.tensors(), Clip(norm=0.3))
    cheating = Cheating(terms=logit, group=by_label, groups=3)
    assert_same(bounded_sum(cheating, module, params, data.tensors(), Clip(norm=0.3)), honest, 1e-5)
