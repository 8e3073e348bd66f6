"""LSTM, GRU and decoder: equal to torch, causal, and trained by every hook."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from perdure import Learner, Privacy
from perdure.data import Dataset, InputDomain, Records, split
from perdure.errors import ConfigError
from perdure.models import decoder, gru, lstm
from perdure.models.gru import GRULayer
from perdure.models.lstm import LSTMLayer
from perdure.privacy.guard import independence
from perdure.strategies import EWC

VOCABULARY = 7
LENGTH = 6
MAKERS = {
    "lstm": partial(lstm, embedding=4, hidden=6),
    "gru": partial(gru, embedding=4, hidden=6, layers=2),
    "decoder": partial(decoder, width=8, depth=1, heads=2),
}
every_maker = pytest.mark.parametrize("name", MAKERS)


def made(name, **settings):
    shape = {"input_shape": (LENGTH,), "vocabulary": VOCABULARY, "num_classes": 3, "seed": 0}
    return MAKERS[name](**(shape | settings))


def tokens(n=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, VOCABULARY, (n, LENGTH), generator=generator)


@pytest.mark.parametrize(("kind", "theirs"), [(LSTMLayer, nn.LSTM), (GRULayer, nn.GRU)])
def test_a_recurrent_layer_equals_the_layer_of_torch(kind, theirs):
    torch.manual_seed(0)
    own = kind(3, 4)
    reference = theirs(3, 4, batch_first=True)
    pairs = {
        "weight_ih_l0": own.inputs.weight,
        "bias_ih_l0": own.inputs.bias,
        "weight_hh_l0": own.state.weight,
        "bias_hh_l0": own.state.bias,
    }
    reference.load_state_dict(pairs)
    x = torch.randn(2, 5, 3)
    answers = own(x), reference(x)[0]
    torch.testing.assert_close(*answers)
    for answer in answers:
        answer.square().sum().backward()
    for name, value in pairs.items():
        torch.testing.assert_close(value.grad, getattr(reference, name).grad)


@every_maker
def test_sequence_outputs_do_not_depend_on_later_tokens(name):
    model = made(name, num_classes=VOCABULARY, every_position=True)
    x = tokens()
    later = x.clone()
    later[:, 4:] = 1
    one, other = model(x), model(later)
    assert one.shape == (5, LENGTH, VOCABULARY) and model.features(x).shape[:2] == (5, LENGTH)
    torch.testing.assert_close(one[:, :4], other[:, :4])
    assert not torch.allclose(one[:, 4:], other[:, 4:])


@every_maker
def test_padding_at_the_end_does_not_change_sequence_outputs(name):
    model = made(name, padding=0)
    x = tokens()
    padded = x.clone()
    padded[:, 4:] = 0
    torch.testing.assert_close(model(padded), model(x[:, :4]))


@every_maker
def test_sequence_models_depend_only_on_the_seed(name):
    assert torch.equal(made(name)(tokens()), made(name)(tokens()))
    assert not torch.equal(made(name)(tokens()), made(name, seed=1)(tokens()))


@every_maker
def test_sequence_models_keep_records_independent(name):
    domain = InputDomain(shape=(LENGTH,), dtype=torch.int64, vocabulary=VOCABULARY)
    assert independence(made(name, padding=0), domain) == "by construction"


@pytest.mark.parametrize("privacy", [None, Privacy(noise_multiplier=0.3, clip_norm=2.0, seed=0)])
@every_maker
def test_a_strategy_trains_every_sequence_model(name, privacy):
    labels = torch.arange(60) % 3
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(1, VOCABULARY, (60, LENGTH), generator=generator)
    inputs[:, 3] = labels + 1
    inputs[::2, 5] = 0
    domain = InputDomain(
        shape=(LENGTH,), dtype=torch.int64, vocabulary=VOCABULARY, padding=0, sequence_axes=(0,)
    )
    records = Records(inputs=inputs, labels=labels, domain=domain, ids=torch.arange(60))
    data = Dataset(
        name="words",
        train=records,
        test=replace(records, inputs=inputs.clone(), ids=records.ids + 100),
        num_classes=3,
        input_shape=(LENGTH,),
    )
    model = made(name, padding=0)
    learner = Learner(
        model=model,
        strategy=EWC(strength=0.1),
        optimizer=partial(torch.optim.Adam, lr=0.05),
        epochs=8 if privacy is None else 1,
        batch_size=20,
        privacy=privacy,
    )
    matrix = learner.fit(split(data, scenario="class", experiences=3))
    assert torch.isfinite(matrix).all() and (privacy or matrix[0, 0] == 100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocabulary": 0}, "vocabulary = 0 .*whole numbers from 1"),
        ({"padding": 7}, "padding = 7 .*a token id, 0 .. 6, or None"),
        ({"input_shape": (6, 2)}, r"input_shape = \(6, 2\) .*\(length,\) for tokens"),
        ({"num_classes": 2.0}, "num_classes = 2.0 .*whole numbers from 1"),
    ],
)
@every_maker
def test_sequence_models_refuse_invalid_sizes(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        made(name, **settings)


def test_sequence_models_refuse_vectors_without_a_length():
    with pytest.raises(ConfigError, match=r"\(length, features\), or \(length,\) with vocabulary"):
        lstm(input_shape=(6,), num_classes=2, seed=0)
    with pytest.raises(ConfigError, match=r"padding = 0 .*None if inputs are vectors"):
        gru(input_shape=(6, 2), num_classes=2, padding=0, seed=0)
    with pytest.raises(ConfigError, match=r"heads = 3 .*divisors of the width 8"):
        decoder(input_shape=(6,), vocabulary=7, num_classes=2, width=8, heads=3, seed=0)
