"""Arguments that every explainer takes or refuses: kinds of models, dtypes, shapes, targets."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from perdure.errors import ConfigError
from perdure.explain import LIME, ExactShapley, KernelSHAP, find, names

WITHOUT_GRADIENTS = [name for name in names() if not find(name).NEEDS_GRADIENTS]
every = pytest.mark.parametrize("name", WITHOUT_GRADIENTS)
WEIGHT = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
INPUTS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
BACKGROUND = torch.tensor([[0, 1, 0, 2]])
EXPECTED = (INPUTS - BACKGROUND)[:, :, None] * WEIGHT
SLOPES = WEIGHT.expand(2, 4, 3)


def network():
    model = nn.Linear(4, 3, bias=False)
    model.weight = nn.Parameter(WEIGHT.T.clone())
    return model


def values(name, model=None, inputs=INPUTS, background=BACKGROUND, **options):
    explainer = find(name)(ridge=1e-6) if name == "lime" else find(name)()
    found = explainer.explain(model or network(), inputs, background, **options)
    return found.values


def expected(name):
    return SLOPES if name == "lime" else EXPECTED


def close(found, wanted):
    return torch.allclose(found.double(), wanted.double(), atol=1e-4)


@every
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float64, torch.float16])
def test_inputs_of_every_dtype_are_explained(name, dtype):
    found = values(name, inputs=INPUTS.to(dtype), targets="all")
    assert found.dtype == (dtype if dtype.is_floating_point else torch.float32)
    assert (found - expected(name)).abs().max() < (0.02 if dtype == torch.float16 else 1e-4)


def test_booleans_are_explained_as_numbers():
    inputs = torch.tensor([[True, False, True, True]])
    found = values("kernel_shap", inputs=inputs, background=torch.zeros(1, 4), targets="all")
    assert close(found, inputs[:, :, None] * WEIGHT)


@every
def test_numpy_arrays_are_explained(name):
    arrays = INPUTS.numpy(), BACKGROUND.numpy()
    assert close(values(name, None, *arrays, targets="all"), expected(name))

    def model(rows):
        assert isinstance(rows, np.ndarray)
        return rows.astype(np.float64) @ WEIGHT.double().numpy()

    assert close(values(name, model, *arrays, targets="all"), expected(name))
    tensors = INPUTS.double(), BACKGROUND
    assert close(values(name, model, *tensors, targets="all"), expected(name))


@pytest.mark.reference
def test_models_of_scikit_learn_are_explained():
    from sklearn.linear_model import LinearRegression, LogisticRegression

    rows = torch.randn(40, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    classifier = LogisticRegression().fit(rows, (rows[:, 0] > 0).long())
    found = KernelSHAP(link="logit").explain(classifier, rows[:3], rows[:1], targets=1)
    slopes = torch.as_tensor(classifier.coef_)
    assert close(found.values, (rows[:3] - rows[:1]) * slopes)
    regression = LinearRegression().fit(rows, rows @ torch.ones(4, dtype=torch.float64))
    assert close(values("kernel_shap", regression, rows[:3], rows[:1]), rows[:3] - rows[:1])
    assert close(values("lime", regression.predict, rows[:3], rows[:1]), torch.ones(3, 4))


@every
def test_a_model_with_one_dimensional_outputs_is_explained(name):
    found = values(name, lambda rows: rows.float() @ WEIGHT[:, 1])
    assert close(found, expected(name)[:, :, 1])


def test_token_numbers_of_an_embedding_are_explained_as_they_are():
    model = nn.Sequential(nn.Embedding(10, 2), nn.Flatten(), nn.Linear(8, 3)).requires_grad_(False)
    found = KernelSHAP().explain(model, INPUTS, BACKGROUND, targets="all")
    assert close(
        found.values, ExactShapley().explain(model, INPUTS, BACKGROUND, targets="all").values
    )
    assert found.values[:, :, 0].abs().sum(1).min() > 0.1
    assert found.additivity_gap.abs().max() < 1e-5
    model = nn.Sequential(nn.Embedding(10, 1), nn.Flatten(), nn.Linear(4, 2)).requires_grad_(False)
    present = LIME(ridge=1e-9).explain(model, INPUTS, BACKGROUND, targets="all")
    assert close(
        present.values, KernelSHAP().explain(model, INPUTS, BACKGROUND, targets="all").values
    )
    assert close(present.fidelity, torch.ones(2, 2))


def test_a_background_that_a_cast_would_change_is_refused():
    model = nn.Sequential(nn.Embedding(10, 2), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(ConfigError, match=r"^background = torch.float32"):
        ExactShapley().explain(model, INPUTS, BACKGROUND + 0.9)
    values = ExactShapley().explain(model, INPUTS, BACKGROUND.float()).values
    assert torch.equal(values, ExactShapley().explain(model, INPUTS, BACKGROUND).values)


@every
def test_a_module_is_explained_in_evaluation_mode_and_left_alone(name):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, second = (values(name, model, inputs=INPUTS.float()) for _ in range(2))
    assert torch.equal(first, second)
    assert all(part.training for part in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@every
def test_all_outputs_in_one_pass_equal_one_after_the_other(name):
    def bent(rows):
        return torch.tanh(rows.float() / 9 @ WEIGHT)

    together = values(name, bent, targets="all")
    for target in range(3):
        assert close(together[..., target], values(name, bent, targets=target))
        assert close(together[..., target], values(name, bent, targets=[target, target]))


@every
@pytest.mark.parametrize(
    "change, message",
    [
        ({"targets": 3}, r"^targets = 3 .*0 to 2, because the model has 3 outputs"),
        ({"targets": [0, -1]}, r"^targets = -1 .*0 to 2"),
        ({"targets": "largest"}, r'^targets = \'largest\' .*"all"'),
        ({"targets": 1.0}, r"^targets = .*an integer"),
        ({"targets": [True, False]}, r"^targets = .*an integer"),
        ({"inputs": INPUTS[:0]}, r"^inputs.shape = \(0, 4\) .*at least one"),
        ({"inputs": INPUTS[0]}, r"^inputs.shape = \(4,\) .*row\[None\]"),
        ({"inputs": [[1.0]]}, r"^inputs = 'list' .*a tensor or a numpy array"),
        ({"inputs": np.array([["a"]])}, r"^inputs.dtype = '<U1' .*numbers"),
        ({"inputs": INPUTS + 0j}, r"^inputs.dtype = 'torch.complex64' "),
        ({"inputs": INPUTS[:, :3]}, r"^predict fails on inputs of shape \(2, 3\) .*mat1 and mat2"),
        ({"model": lambda rows: rows[:1]}, r"^predict\(inputs\).shape = \(1, 4\)"),
        ({"model": lambda rows: None}, r"^predict fails on inputs"),
        ({"model": 3}, r"^predict = 3 .*predict_proba"),
        ({"model": lambda rows: rows + math.nan}, r"NaN or infinite"),
    ],
)
def test_every_explainer_refuses_the_same_arguments_in_one_line(name, change, message):
    given = {"background": INPUTS[:1, :3]} if change.get("inputs") is not None else {}
    if isinstance(change.get("inputs"), torch.Tensor) and change["inputs"].is_complex():
        given = {}
    if message.startswith("^inputs.shape"):
        given = {}
    with pytest.raises(ConfigError, match=message) as caught:
        values(name, **(given | change))
    assert "\n" not in str(caught.value)


def test_an_excluded_class_is_refused_only_where_it_is_explained():
    def masked(rows):
        outputs = rows.float() @ WEIGHT
        return torch.cat([outputs[:, :2], torch.full_like(outputs[:, :1], -math.inf)], 1)

    assert torch.isfinite(values("kernel_shap", masked, targets=1)).all()
    with pytest.raises(ConfigError, match="explained outputs of the model are infinite for 2 of 2"):
        values("kernel_shap", masked, targets="all")


@pytest.mark.parametrize("chunk", [7, 512])
@every
def test_the_chunk_changes_values_by_rounding_only(name, chunk):
    def bent(rows):
        return torch.tanh(rows / 9 @ WEIGHT.double())

    whole = find(name)().explain(bent, INPUTS.double(), BACKGROUND)
    cut = find(name)(chunk=chunk).explain(bent, INPUTS.double(), BACKGROUND)
    assert torch.allclose(whole.values, cut.values, rtol=0, atol=1e-12)


def test_large_rows_are_passed_in_small_chunks_by_default():
    sizes = []

    def picture(rows):
        sizes.append(rows.nbytes)
        return rows.flatten(1)[:, :2]

    KernelSHAP(cells=2).explain(picture, torch.ones(40, 3, 32, 32), torch.zeros(3, 3, 32, 32))
    assert 2**19 < max(sizes) <= 2**20
