import torch
import torch.nn.functional as F

from perdure.contract.forward import Forward
from perdure.data.records import Batch, Records
from perdure.models.classifiers import mlp
from perdure.queries.evaluation import exact_sum
from perdure.queries.per_record import as_params, gradient_rows, rows_of


def batch(n=7, shape=(5,), classes=3):
    place = torch.Generator().manual_seed(1)
    labels = torch.randint(0, classes, (n,), generator=place)
    return Batch.current(Records(inputs=torch.rand(n, *shape, generator=place), labels=labels), 0)


def small():
    return mlp(input_shape=(5,), num_classes=3, hidden=(6, 4), seed=2, activation="tanh").eval()


# --------------------------------------------------------------------------- each record alone


def test_a_query_computes_its_rows_on_each_record_alone():
    lengths = []

    def coupled(forward, batch):
        lengths.append(len(batch))
        return batch.inputs - batch.inputs.mean(0, keepdim=True)

    data = batch()
    module = small()
    rows = rows_of(coupled, module)
    answer = torch.func.vmap(rows, in_dims=(None, 0))({}, data.tensors())
    assert lengths == [1] and answer["value"].abs().max() == 0  # its own mean: others play no part
    assert coupled(Forward(module), data).abs().max() > 0.1


def test_a_gradient_query_computes_rows_on_each_record_alone():
    def coupled(forward, batch):
        losses = F.cross_entropy(forward(batch.inputs), batch.labels, reduction="none")
        return losses / losses.detach().sum()

    data = batch()
    module = small()
    params = {name: value.detach() for name, value in module.named_parameters()}
    rows = torch.func.vmap(gradient_rows(coupled, module), in_dims=(None, 0))(
        params, data.tensors()
    )
    for i in range(len(data)):
        one = coupled(Forward(module), data.take(slice(i, i + 1))).sum()
        for name, gradient in zip(
            params, torch.autograd.grad(one, list(module.parameters())), strict=True
        ):
            torch.testing.assert_close(rows[name][i], gradient, rtol=1e-4, atol=1e-6)


def test_a_query_result_of_one_tensor_is_named_value():
    data = batch()
    module = small()
    assert list(as_params(torch.zeros(3))) == ["value"]
    count = exact_sum(lambda forward, batch: (batch.labels == 1).float(), Forward(module), data, 2)
    assert float(count["value"]) == int((data.labels == 1).sum())
    rows = torch.func.vmap(rows_of(lambda _, b: b.labels.float(), module), in_dims=(None, 0))(
        {}, data.tensors()
    )
    assert torch.equal(rows["value"], data.labels.float())
