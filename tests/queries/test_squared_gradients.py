import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.module_hooks import any_hooks
from helpers.parties import opened_party
from helpers.squared_gradients import (
    BY_ROWS,
    ESCAPING,
    FAST,
    Sequence,
    Transposed,
    Twice,
    assert_same,
    batch,
    by_hand,
    fisher_terms,
    small,
    summed,
)
from perdure.contract.context import Spec
from perdure.contract.forward import Forward
from perdure.models.classifiers import mlp
from perdure.models.frozen import frozen
from perdure.privacy.clipping.clip import Clip, clipped_sum
from perdure.queries.evaluation import bounded_sum, exact_sum
from perdure.queries.per_record import rows_of
from perdure.queries.squared_gradients import AbsoluteGradient, SquaredGradient, linear_layers
from perdure.strategies import EWC


def label_terms(forward, batch):
    loss = F.cross_entropy(forward(batch.inputs), batch.labels, reduction="none")
    return loss[:, None], torch.ones(len(batch), 1)


SIZES = {SquaredGradient: torch.square, AbsoluteGradient: torch.abs}
both = pytest.mark.parametrize("kind", list(SIZES))


@pytest.mark.reference
@both
@pytest.mark.parametrize("terms", [fisher_terms, label_terms])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_squared_gradients_equal_one_backward_pass_per_record(model, terms, kind):
    module = small(model)
    query = kind(terms)
    data = batch(shape=(1, 8, 8)) if model == "cnn" else batch()
    expected = by_hand(module, terms, data, SIZES[kind])
    # what is 0 but for rounding, as before a normalisation
    atol = 1e-7 if kind is SquaredGradient else 1e-6
    assert_same(
        {name: rows.detach() for name, rows in query(Forward(module), data).items()}, expected, atol
    )
    total = {name: rows.sum(0) for name, rows in expected.items()}
    for chunk in (2, 100):
        assert_same(exact_sum(query, Forward(module), data, chunk), total, atol)
    assert_same(summed(query, module, data), total, atol)


@pytest.mark.reference
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_fisher_information_of_ewc_equals_a_written_out_loop(fisher, toy_stream, toy_model):
    """The sum is over the classes that may be predicted; it is not the squared mean gradient of the
    batch.
    """
    stream = toy_stream()
    module = toy_model(stream).eval()
    params = {name: value.detach().clone() for name, value in module.named_parameters()}
    strategy = EWC(strength=1.0, fisher=fisher)
    spec = Spec(params=params, num_classes=4, num_experiences=2, feature_size=6, scenario="class")
    _, curator = opened_party(stream, module, plan=strategy.plan(stream[0]))
    state = strategy.after_experience(curator, params, strategy.init(spec))

    records = stream[0].train
    sums = {name: torch.zeros_like(value) for name, value in params.items()}
    for x, y in zip(records.inputs, records.labels, strict=True):
        log_p = torch.log_softmax(module(x[None])[0, :2], dim=0)  # classes 0 and 1 are declared
        labels = [0, 1] if fisher == "exact" else [int(y)]
        for label in labels:
            weight = log_p[label].exp().item() if fisher == "exact" else 1.0
            gradients = torch.autograd.grad(
                log_p[label], list(module.parameters()), retain_graph=True
            )
            for name, gradient in zip(sums, gradients, strict=True):
                sums[name] += weight * gradient**2 / len(records)
    assert_same(state.group("fisher"), sums)


@both
@pytest.mark.parametrize("make", [Twice, Sequence, *BY_ROWS, *ESCAPING[:1]])
def test_unusual_layers_get_no_fast_sum_of_squared_gradients(make, kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make()
    query = kind(fisher_terms)
    data = batch()
    assert (summed(query, module, data) is None) == (make in ESCAPING)
    expected = {
        name: rows.sum(0) for name, rows in by_hand(module, fisher_terms, data, SIZES[kind]).items()
    }
    assert_same(exact_sum(query, Forward(module), data, 4), expected)


@both
@pytest.mark.parametrize("make", FAST)
def test_the_fast_sum_of_squared_gradients_includes_hooks(make, kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make()
    data = batch()
    expected = {
        name: rows.sum(0) for name, rows in by_hand(module, fisher_terms, data, SIZES[kind]).items()
    }
    assert_same(summed(kind(fisher_terms), module, data), expected)


@both
@pytest.mark.parametrize("make", [*FAST, *BY_ROWS])
def test_private_squared_sums_equal_sums_of_clipped_rows(make, kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make()
    data = batch(n=20)
    query = kind(fisher_terms)
    params = {name: value.detach() for name, value in module.named_parameters()}
    clip = Clip(norm=0.05)
    expected = clipped_sum(rows_of(query, module), params, data.tensors(), clip, 20)
    assert_same(bounded_sum(query, module, params, data.tensors(), clip), expected)


def test_two_rows_of_a_record_in_one_layer_call_are_clipped_once():
    """A layer that is called on a matrix has a gradient that is not an outer product."""

    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x):
            return self.layer(x[:, :4].reshape(-1, 2)).reshape(len(x), 2, 3).mean(1)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Pairs()
    data = batch(n=20)
    query = SquaredGradient(fisher_terms)
    params = {name: value.detach() for name, value in module.named_parameters()}
    expected = clipped_sum(rows_of(query, module), params, data.tensors(), Clip(norm=0.05), 20)
    assert summed(query, module, data, Clip(norm=0.05)) is None
    assert_same(bounded_sum(query, module, params, data.tensors(), Clip(norm=0.05)), expected)


def test_squared_gradients_with_a_global_hook_get_no_fast_sum():
    def triple(module, args, output):
        return 3 * output if isinstance(module, nn.Linear) else output

    handle = nn.modules.module.register_module_forward_hook(triple)
    try:
        assert summed(SquaredGradient(fisher_terms), small(), batch()) is None
    finally:
        handle.remove()
    assert summed(SquaredGradient(fisher_terms), small(), batch()) is not None


def test_squared_sums_work_with_frozen_parameters():
    module = small()
    data = batch()
    expected = exact_sum(SquaredGradient(fisher_terms), Forward(module), data, 100)
    module.body[1].weight.requires_grad_(False)
    assert linear_layers(module) is None
    assert_same(exact_sum(SquaredGradient(fisher_terms), Forward(module), data, 100), expected)


@both
def test_a_body_without_parameters_is_not_counted_as_a_layer(kind):
    body = nn.Sequential(nn.Flatten(), nn.Linear(5, 4), nn.Tanh())
    module = frozen(body, input_shape=(5,), num_classes=3)
    data = batch()
    assert list(linear_layers(module)) == ["head"]
    params = {name: value.detach() for name, value in module.named_parameters()}
    expected = clipped_sum(
        rows_of(kind(fisher_terms), module), params, data.tensors(), Clip(norm=0.02), 3
    )
    assert_same(
        bounded_sum(kind(fisher_terms), module, params, data.tensors(), Clip(norm=0.02)), expected
    )


def test_query_rows_are_computed_in_pieces_that_fit_memory(monkeypatch):
    module = Transposed()
    data = batch(40)
    seen = []
    expected = exact_sum(SquaredGradient(fisher_terms), Forward(module), data, 100)

    class Watched(SquaredGradient):
        def __call__(self, forward, batch):
            seen.append(len(batch))
            return super().__call__(forward, batch)

    size = sum(value.numel() for value in module.parameters())
    monkeypatch.setattr("perdure.privacy.clipping.clip.PASS_NUMBERS", 16 * size)
    assert_same(exact_sum(Watched(fisher_terms), Forward(module), data, 100), expected)
    assert seen == [16, 16, 8]


def test_squared_gradient_sums_use_the_given_parameters():
    module = small()
    other = mlp(input_shape=(5,), num_classes=3, hidden=(6, 4), seed=9, activation="tanh")
    data = batch()
    query = SquaredGradient(fisher_terms)
    params = {n: v.detach() for n, v in other.named_parameters()}
    assert_same(
        exact_sum(query, Forward(module, params), data, 3),
        exact_sum(query, Forward(other), data, 3),
    )


def test_a_failed_sum_of_squared_gradients_leaves_no_hooks():
    module = small()

    def failing(forward, batch):
        forward(batch.inputs)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        summed(SquaredGradient(failing), module, batch())
    assert not any_hooks(module)


# --------------------------------------------------------------------------- clipped


@both
@pytest.mark.parametrize("terms", [fisher_terms, label_terms])
@pytest.mark.parametrize("clip", [Clip(norm=0.02), Clip(norm=0.2), Clip(norm=0.05, per_layer=True)])
def test_the_clipped_squared_sum_equals_the_sum_of_clipped_rows(terms, clip, kind):
    module = small()
    data = batch(n=20)
    query = kind(terms)
    params = {name: value.detach() for name, value in module.named_parameters()}
    expected = clipped_sum(rows_of(query, module), params, data.tensors(), clip, 3)
    assert_same(summed(query, module, data, clip), expected)
    assert_same(bounded_sum(query, module, params, data.tensors(), clip), expected)


@both
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_a_nan_record_adds_nothing_to_squared_gradients(poison, kind):
    module = small()
    data = batch(n=9)
    query = kind(fisher_terms)
    clean = summed(query, module, data.take(slice(1, None)), Clip(norm=0.05))
    data.inputs[0] = poison
    spoilt = summed(query, module, data, Clip(norm=0.05))
    moved = (
        torch.stack([(spoilt[name] - clean[name]).square().sum() for name in clean]).sum().sqrt()
    )
    assert float(moved) <= 0.05 * (1 + 1e-4)


def test_an_absolute_gradient_has_the_norm_of_the_gradient():
    module = small()
    data = batch(n=5)
    rows = AbsoluteGradient(label_terms)(Forward(module), data)
    lengths = torch.cat([row.flatten(1) for row in rows.values()], dim=1).norm(dim=1)
    for i, length in enumerate(lengths):
        loss = label_terms(Forward(module), data.take(slice(i, i + 1)))[0].sum()
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        torch.testing.assert_close(length, torch.cat([g.flatten() for g in gradients]).norm())


def test_squared_gradient_terms_see_one_record_at_a_time():
    seen = []

    def coupled(forward, batch):
        seen.append(len(batch))
        log_p = torch.log_softmax(forward(batch.inputs - batch.inputs.mean(0)), dim=1)
        return -log_p, log_p.exp().detach()

    module = small()
    data = batch()
    whole = summed(SquaredGradient(coupled), module, data, Clip(norm=1e-3))
    fewer = summed(SquaredGradient(coupled), module, data.take(slice(1, None)), Clip(norm=1e-3))
    moved = torch.stack([(whole[name] - fewer[name]).square().sum() for name in whole]).sum().sqrt()
    assert set(seen) == {1} and float(moved) <= 1e-3 * (1 + 1e-4)
