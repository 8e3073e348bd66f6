"""Over- and undersampling of public records."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from perdure.data import Records, resampled, split
from perdure.errors import ConfigError, GuardError
from perdure.experiment import parse
from perdure.learner import Learner
from perdure.privacy import Privacy
from perdure.strategies import Naive

COUNTS = (12, 8, 3)


@pytest.fixture(scope="module")
def rare():
    place = torch.Generator().manual_seed(0)
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))
    inputs = torch.rand(len(labels), 1, 2, 2, generator=place) + labels.view(-1, 1, 1, 1)
    return Records(inputs=inputs, labels=labels, ids=torch.arange(len(labels)) + 40)


@pytest.mark.parametrize(
    ("method", "counts"),
    [("oversample", [12, 12, 12]), ("undersample", [3, 3, 3]), ("smote", [12, 12, 12])],
)
def test_resampled_classes_have_equally_many_records(rare, method, counts):
    first, again = (resampled(rare, method=method, seed=2) for _ in range(2))
    assert torch.bincount(first.labels).tolist() == counts
    assert torch.equal(first.inputs, again.inputs) and torch.equal(first.ids, again.ids)
    assert first.declared_size == sum(counts)


def test_copies_keep_the_id_of_their_record(rare):
    found = resampled(rare, method="oversample")
    rows = found.ids - 40
    assert torch.equal(found.inputs, rare.inputs[rows])
    assert torch.equal(found.labels, rare.labels[rows])


def test_synthetic_records_lie_between_records_of_their_class(rare):
    found = resampled(rare, method="smote", seed=1)
    assert torch.equal(found.inputs[: len(rare)], rare.inputs)
    assert torch.equal(found.ids[: len(rare)], rare.ids)
    assert len(torch.unique(found.ids)) == len(found)
    for label in (1, 2):
        real = rare.inputs[rare.labels == label]
        made = found.inputs[len(rare) :][found.labels[len(rare) :] == label]
        assert (made >= real.amin(0)).all() and (made <= real.amax(0)).all()


def test_resampling_refuses_what_it_cannot_balance(rare):
    alone = rare.take(torch.arange(len(rare)) < 21)
    with pytest.raises(ConfigError, match="a class with 1 record"):
        resampled(alone, method="smote")
    assert torch.bincount(resampled(alone, method="oversample").labels).tolist() == [12, 12, 12]
    tokens = replace(rare, inputs=rare.inputs.long())
    with pytest.raises(ConfigError, match=r"inputs in torch\.int64"):
        resampled(tokens, method="smote")
    timed = replace(rare, attributes={"time": torch.arange(len(rare))})
    with pytest.raises(ConfigError, match="attributes time"):
        resampled(timed, method="adasyn")


def test_a_private_learner_refuses_resampled_records(toy_data, toy_model):
    data = replace(toy_data, train=resampled(toy_data.train.take(slice(3, None))))
    stream = split(data, scenario="class", experiences=2)
    learner = Learner(
        model=toy_model(stream),
        strategy=Naive(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        iterations=1,
        privacy=Privacy(noise_multiplier=1.0, seed=0),
    )
    with pytest.raises(GuardError, match=r"made by resampled\(method='smote'\)"):
        learner.fit(stream)


def test_a_config_balances_the_training_records():
    text = '[data]\nname = "breast_cancer"\nresample = "undersample"\nexperiences = 1\n'
    rest = '[training]\niterations = 1\n[[arms]]\nstrategy = "naive"\n'
    config = parse('name = "balanced"\n' + text + rest)
    (experience,) = config.data.open(seed=0, private=False)
    plain = parse('name = "plain"\n' + text.replace('resample = "undersample"', "") + rest)
    counts = torch.bincount(plain.data.open(seed=0, private=False)[0].train.labels)
    assert torch.bincount(experience.train.labels).tolist() == [int(counts.min())] * 2
    with pytest.raises(ConfigError, match=r"data\.resample .*none with \[privacy\]"):
        parse('name = "private"\n' + text + rest + "private = true\n[privacy]\nepsilon = 1.0\n")
