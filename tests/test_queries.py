import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perdure.models import cnn, mlp
from perdure.queries import SquaredGradient, as_params, exact_sum, gradient_rows, linear_layers, rows_of
from perdure.records import Batch, Records
from perdure.strategies import EWC
from perdure.strategy import Forward, Spec


def batch(n=7, shape=(5,), classes=3):
    place = torch.Generator().manual_seed(1)
    labels = torch.randint(0, classes, (n,), generator=place)
    return Batch.current(Records(inputs=torch.rand(n, *shape, generator=place), labels=labels), 0)


def fisher_terms(forward, batch):
    log_p = torch.log_softmax(forward(batch.inputs), dim=1)
    return -log_p, log_p.exp().detach()


def label_terms(forward, batch):
    loss = F.cross_entropy(forward(batch.inputs), batch.labels, reduction="none")
    return loss[:, None], torch.ones(len(batch), 1)


def small(model="mlp"):
    if model == "cnn":
        return cnn(input_shape=(1, 8, 8), num_classes=3, seed=2, width=4).eval()
    return mlp(input_shape=(5,), num_classes=3, hidden=(6, 4), seed=2, activation="tanh").eval()


def by_hand(module, terms, batch):
    """(n, *parameter) rows, one backward pass for every record and term."""
    rows = {name: [] for name, _ in module.named_parameters()}
    for i in range(len(batch)):
        losses, weights = terms(Forward(module), batch.take(slice(i, i + 1)))
        sums = [torch.zeros_like(value) for value in module.parameters()]
        for loss, weight in zip(losses[0], weights[0], strict=True):
            gradients = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
            sums = [total + weight * gradient**2 for total, gradient in zip(sums, gradients, strict=True)]
        for name, total in zip(rows, sums, strict=True):
            rows[name].append(total)
    return {name: torch.stack(values) for name, values in rows.items()}


def close(mine, theirs):
    assert list(mine) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-7)


@pytest.mark.reference
@pytest.mark.parametrize("terms", [fisher_terms, label_terms])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_squared_gradients_equal_one_backward_pass_a_record_and_term(model, terms):
    module, query = small(model), SquaredGradient(terms)
    data = batch(shape=(1, 8, 8)) if model == "cnn" else batch()
    expected = by_hand(module, terms, data)
    close({name: rows.detach() for name, rows in query(Forward(module), data).items()}, expected)
    total = {name: rows.sum(0) for name, rows in expected.items()}
    for chunk in (2, 100):
        close(exact_sum(query, Forward(module), data, chunk), total)
    fast = query.total(Forward(module), data)
    assert (fast is not None) == (model == "mlp")
    if fast:
        close(fast, total)


@pytest.mark.reference
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_the_fisher_information_of_ewc_equals_a_hand_written_loop(fisher, toy_stream, toy_model):
    """Over the classes that may be predicted; not the square of the batch's mean gradient."""
    from perdure.curator import Curator
    from perdure.facts import contexts

    stream = toy_stream()
    module = toy_model(stream).eval()
    params = {name: value.detach().clone() for name, value in module.named_parameters()}
    strategy = EWC(strength=1.0, fisher=fisher)
    spec = Spec(params=params, num_classes=4, num_experiences=2, feature_size=6, scenario="class")
    curator = Curator(seed=0, batch_size=8)
    curator.open(stream.experiences[:1], strategy.plan(stream[0]), contexts(stream, "cpu")(0), Forward(module))
    state = strategy.after_experience(curator, params, strategy.init(spec))

    records, sums = stream[0].train, {name: torch.zeros_like(value) for name, value in params.items()}
    for x, y in zip(records.inputs, records.labels, strict=True):
        log_p = torch.log_softmax(module(x[None])[0, :2], dim=0)  # classes 0 and 1 are declared
        labels = [0, 1] if fisher == "exact" else [int(y)]
        for label in labels:
            weight = log_p[label].exp().item() if fisher == "exact" else 1.0
            gradients = torch.autograd.grad(log_p[label], list(module.parameters()), retain_graph=True)
            for name, gradient in zip(sums, gradients, strict=True):
                sums[name] += weight * gradient**2 / len(records)
    close(state.group("fisher"), sums)


# --------------------------------------------------------------------------- when the fast total must not be used


class Twice(nn.Module):
    """Calls one layer twice, so that its gradient is the sum of two outer products."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Sequence(nn.Module):
    """A linear layer at several positions of one record."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 3)

    def forward(self, x):
        return self.layer(x[:, :, None]).mean(1)


def tied():
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("make", [Twice, Sequence, tied])
def test_the_fast_total_steps_back_where_it_would_be_wrong(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make()
    query, data = SquaredGradient(fisher_terms), batch()
    assert query.total(Forward(module), data) is None
    expected = {name: rows.sum(0) for name, rows in by_hand(module, fisher_terms, data).items()}
    close(exact_sum(query, Forward(module), data, 4), expected)


def test_frozen_parameters_do_not_stop_the_sum():
    module, data = small(), batch()
    expected = exact_sum(SquaredGradient(fisher_terms), Forward(module), data, 100)
    module.body[1].weight.requires_grad_(False)
    assert linear_layers(module) is None
    close(exact_sum(SquaredGradient(fisher_terms), Forward(module), data, 100), expected)


def test_given_parameters_are_the_ones_that_count():
    module, other, data = (
        small(),
        mlp(input_shape=(5,), num_classes=3, hidden=(6, 4), seed=9, activation="tanh"),
        batch(),
    )
    query, params = SquaredGradient(fisher_terms), {n: v.detach() for n, v in other.named_parameters()}
    assert query.total(Forward(module, params), data) is None
    close(exact_sum(query, Forward(module, params), data, 3), exact_sum(query, Forward(other), data, 3))


# --------------------------------------------------------------------------- each record alone


def test_rows_are_evaluated_on_each_record_alone():
    lengths = []

    def coupled(forward, batch):
        lengths.append(len(batch))
        return batch.inputs - batch.inputs.mean(0, keepdim=True)

    data, module = batch(), small()
    rows = rows_of(coupled, module)
    answer = torch.func.vmap(rows, in_dims=(None, 0))({}, data.tensors())
    assert lengths == [1] and answer["value"].abs().max() == 0  # its own mean: others play no part
    assert coupled(Forward(module), data).abs().max() > 0.1


def test_gradient_rows_are_evaluated_on_each_record_alone():
    def coupled(forward, batch):
        losses = F.cross_entropy(forward(batch.inputs), batch.labels, reduction="none")
        return losses / losses.detach().sum()

    data, module = batch(), small()
    params = {name: value.detach() for name, value in module.named_parameters()}
    rows = torch.func.vmap(gradient_rows(coupled, module), in_dims=(None, 0))(params, data.tensors())
    for i in range(len(data)):
        one = coupled(Forward(module), data.take(slice(i, i + 1))).sum()
        for name, gradient in zip(params, torch.autograd.grad(one, list(module.parameters())), strict=True):
            torch.testing.assert_close(rows[name][i], gradient, rtol=1e-4, atol=1e-6)


def test_a_bare_tensor_is_called_value_and_may_be_one_number_a_record():
    data, module = batch(), small()
    assert list(as_params(torch.zeros(3))) == ["value"]
    count = exact_sum(lambda forward, batch: (batch.labels == 1).float(), Forward(module), data, 2)
    assert float(count["value"]) == int((data.labels == 1).sum())
    rows = torch.func.vmap(rows_of(lambda _, b: b.labels.float(), module), in_dims=(None, 0))({}, data.tensors())
    assert torch.equal(rows["value"], data.labels.float())


def test_hooks_do_not_outlive_the_fast_total():
    module = small()

    def failing(forward, batch):
        forward(batch.inputs)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        SquaredGradient(failing).total(Forward(module), batch())
    assert not any(layer._forward_hooks for layer in module.modules())
