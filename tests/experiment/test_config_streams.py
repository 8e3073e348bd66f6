"""Streams of a config: every stream of Python, with the same arguments and the same experiences."""

import inspect

import pytest

from helpers import own_data
from helpers.config_errors import ARM, HEAD, refusal
from perdure.data import blurry, by_domain, by_time, joint, online, permuted, repetition, rotated
from perdure.data import split as split_classes
from perdure.errors import ConfigError
from perdure.experiment.arm import open_stream
from perdure.experiment.config import parse
from perdure.experiment.data_config import OF_STREAMS, STREAMS, DataConfig

BY_TABLE = {
    "split": ("experiences = 2", lambda data: split_classes(data, scenario="class", experiences=2)),
    "permuted": (
        "experiences = 2\nfirst_identity = false",
        lambda data: permuted(data, experiences=2, seed=3, first_identity=False),
    ),
    "rotated": ("angles = [0, 90]", lambda data: rotated(data, angles=(0.0, 90.0))),
    "blurry": (
        "experiences = 2\nblurry_share = 0.5",
        lambda data: blurry(data, experiences=2, blurry_share=0.5, seed=3),
    ),
    "repetition": (
        "experiences = 4\nrepeat_probability = 0.5",
        lambda data: repetition(data, experiences=4, repeat_probability=0.5, seed=3),
    ),
    "by_time": ("boundaries = [2.0, 5.0]", lambda data: by_time(data, boundaries=(2.0, 5.0))),
    "by_domain": ("order = [1, 0]", lambda data: by_domain(data, order=(1, 0))),
    "joint": ("", joint),
}


def opened(keys, seed=3):
    """The stream of a config with these keys in [data]."""
    table = f'[data]\nname = "helpers.own_data:blobs"\n{keys}\n'
    return open_stream(parse(f"{HEAD}seed = {seed}\n{table}{ARM}"))


def facts(stream):
    """What tells streams apart: name, scenario, classes and inputs of every experience."""
    parts = [(e.classes, e.train.ids.tolist(), e.train.inputs.tolist()) for e in stream]
    return stream.name, stream.scenario, parts


@pytest.mark.parametrize("name", STREAMS)
def test_a_config_makes_the_same_stream_as_the_python_call(name):
    keys, make = BY_TABLE[name]
    assert facts(opened(f'stream = "{name}"\n{keys}')) == facts(make(own_data.blobs()))


def test_the_data_table_has_every_parameter_of_the_stream_makers():
    own = {"data", "seed"}
    known = {p for make in STREAMS.values() for p in inspect.signature(make).parameters}
    assert known - own == set(OF_STREAMS.values())
    assert set(OF_STREAMS) <= set(DataConfig.__dataclass_fields__)
    assert set(inspect.signature(online).parameters) == {"stream", "chunk", "seed", "exact"}


def test_chunk_in_a_config_makes_the_same_pieces_as_online():
    whole = split_classes(own_data.blobs(), scenario="class", experiences=2)
    expected = online(whole, chunk=5, seed=3, exact=False)
    assert facts(opened("experiences = 2\nchunk = 5\nexact = false")) == facts(expected)


def test_the_seed_of_the_data_table_replaces_the_run_seed():
    keys = 'stream = "permuted"\nexperiences = 2\n'
    assert facts(opened(keys + "seed = 5", seed=1)) == facts(opened(keys + "seed = 5", seed=2))
    assert facts(opened(keys, seed=1)) != facts(opened(keys, seed=2))


def test_data_options_are_passed_to_the_data_set():
    inputs = opened("options = {spread = 0.0}\nstream = 'joint'")[0].train.inputs
    assert inputs[0].flatten().tolist() == [2.0, 0.0, 0.0, 0.0]


def test_a_key_of_another_stream_is_refused_with_allowed_keys():
    told = refusal(f'{HEAD}[data]\nstream = "rotated"\nblurry_share = 0.5\n{ARM}')
    assert told == (
        'data.blurry_share = 0.5 is not allowed; allowed: with stream = "rotated", '
        "only the keys angles"
    )


def test_the_error_of_an_impossible_stream_names_the_data_key():
    with pytest.raises(ConfigError, match=r"^data\.experiences = 3 is not allowed"):
        opened("experiences = 3")
