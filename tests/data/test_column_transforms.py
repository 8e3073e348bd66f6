"""Scaling, selection and projection of columns by constants of public records."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.feature_selection import mutual_info_classif

from perdure.data import Records, best_columns, column_scaling, principal_components, split
from perdure.errors import ConfigError, GuardError
from perdure.experiment import parse
from perdure.learner import Learner
from perdure.models import mlp
from perdure.privacy import Privacy
from perdure.strategies import Naive


@pytest.fixture(scope="module")
def public():
    place = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    inputs = torch.randn(40, 2, 3, generator=place) * torch.tensor([1.0, 5.0, 0.0]) + 3
    inputs[:, 1, 1] = 10.0 * labels + torch.rand(40, generator=place)
    return Records(inputs=inputs, labels=labels, ids=torch.arange(40) + 1000)


def test_columns_are_scaled_by_the_public_records(public):
    scaled = column_scaling(public).records(public).inputs
    assert scaled.shape == public.inputs.shape
    torch.testing.assert_close(scaled.mean(0), torch.zeros(2, 3), atol=1e-5, rtol=0)
    deviation = scaled.std(0, correction=0)
    varying = public.inputs.std(0) > 0
    torch.testing.assert_close(deviation[varying], torch.ones(4))


def test_gaps_are_filled_with_the_public_median(public):
    gap = public.inputs.clone()
    gap[4, 0, 1] = torch.nan
    holed = replace(public, inputs=gap)
    with pytest.raises(ConfigError, match="column_scaling fills gaps"):
        column_scaling(holed)
    transform = column_scaling(holed, impute="median")
    middle = gap[:, 0, 1].nanquantile(0.5)
    expected = (middle - transform.shift[1]) / transform.scale[1]
    torch.testing.assert_close(transform.records(holed).inputs[4, 0, 1].double(), expected.double())


@pytest.mark.reference
@pytest.mark.parametrize("whiten", [False, True])
def test_principal_components_are_those_of_scikit_learn(public, whiten):
    found = principal_components(public, count=2, whiten=whiten).records(public)
    rows = public.inputs.flatten(1).double().numpy()
    expected = PCA(2, whiten=whiten).fit_transform(rows)
    torch.testing.assert_close(found.inputs, torch.from_numpy(expected).float(), atol=1e-4, rtol=0)
    assert torch.equal(found.ids, public.ids)


def test_the_column_that_tells_the_label_is_kept(public):
    for score in ("f_classif", partial(mutual_info_classif, random_state=0)):
        transform = best_columns(public, count=1, score=score)
        assert transform.chosen.tolist() == [4]
        kept = transform.records(public).inputs
        assert torch.equal(kept, public.inputs.flatten(1)[:, [4]])


def test_more_columns_than_there_are_are_refused(public):
    with pytest.raises(ConfigError, match=r"count = 5 .*1 to 4"):
        best_columns(public, count=5)
    with pytest.raises(ConfigError, match=r"count = 7 .*1 to 6"):
        principal_components(public, count=7)


@pytest.mark.parametrize("own", [False, True])
def test_a_private_learner_refuses_constants_of_its_own_records(toy_data, own):
    transform = principal_components(toy_data.train if own else toy_data.test, count=2)
    stream = split(transform.dataset(toy_data), scenario="class", experiences=2)
    assert stream.input_shape == (2,)
    learner = Learner(
        model=mlp(input_shape=(2,), num_classes=4, hidden=(), seed=0),
        strategy=Naive(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        iterations=1,
        privacy=Privacy(noise_multiplier=1.0, seed=0),
    )
    if own:
        with pytest.raises(GuardError, match=r"made by principal_components\(count=2\)"):
            learner.fit(stream)
    else:
        assert learner.fit(stream).shape == (2, 2)


def test_positions_in_another_table_are_other_records(public):
    def table(inputs, name):
        return Records(inputs=inputs, labels=public.labels[: len(inputs)], partition=name)

    scaling = column_scaling(table(public.inputs, "public"))
    other = scaling.records(table(public.inputs + 1, "own"))
    assert other.coupled_by == ""
    shared = torch.cat([public.inputs[:20] + 1, public.inputs[5:6].clone()])
    for inputs, name in ((shared, "own"), (public.inputs + 1, "public")):
        found = scaling.records(table(inputs, name))
        assert found.coupled_by.startswith("column_scaling(impute=None) of records without ids in")


def test_a_config_changes_the_columns():
    table = '[data]\nname = "breast_cancer"\nexperiences = 1\nscale = true\nimpute = "mean"\n'
    rest = '[training]\niterations = 1\n[[arms]]\nstrategy = "naive"\n'
    text = f'name = "columns"\n{table}columns = 8\ncomponents = 3\n{rest}'
    (experience,) = parse(text).data.open(seed=0, private=False)
    assert experience.train.inputs.shape[1:] == experience.test.inputs.shape[1:] == (3,)
    private = text + "private = true\n[privacy]\nepsilon = 1.0\n"
    with pytest.raises(ConfigError, match=r"data\.fit_on = 'train' .*\"test\" with \[privacy\]"):
        parse(private)
    config = parse(private.replace("columns = 8", 'columns = 8\nfit_on = "test"'))
    assert config.data.open(seed=0, private=True)[0].train.coupled_by == ""
