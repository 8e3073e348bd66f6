"""Attributes of records from every door, and arguments that are given by position."""

import inspect

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import perdure.data
from perdure.data import (
    by_domain,
    by_time,
    digits,
    from_folder,
    from_huggingface,
    from_torch,
    split,
)
from perdure.errors import ConfigError

POINTS = TensorDataset(torch.rand(20, 3), torch.arange(20) % 2)
WARDS = np.arange(20) // 10


def test_from_torch_keeps_the_given_attributes():
    tests = TensorDataset(torch.rand(4, 3), torch.arange(4) % 2)
    data = from_torch(
        POINTS, test=tests, attributes={"domain": WARDS}, test_attributes={"domain": [0, 1] * 2}
    )
    assert data.train.attributes["domain"].tolist() == WARDS.tolist()
    assert [len(each.test) for each in by_domain(data)] == [2, 2]
    with pytest.raises(ConfigError, match="test_attributes is not allowed"):
        from_torch(POINTS, test_attributes={"domain": [0]})


def test_from_folder_computes_attributes_from_the_path(tmp_path):
    for number in range(8):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        Image.new("RGB", (2, 2), (number, 0, 0)).save(tmp_path / "ab"[number % 2] / f"{number}.png")
    data = from_folder(tmp_path, test=0.4, attributes={"time": lambda path: float(path.stem)})
    for part in (data.train, data.test):
        red = (255 * part.inputs[:, 0, 0, 0]).round()
        assert torch.equal(part.attributes["time"].float(), red)


@pytest.fixture(scope="module")
def table():
    made = datasets.Dataset.from_dict(
        {
            "vector": [[float(number), 1.0] for number in range(20)],
            "tokens": [[1, 2, number % 4] for number in range(20)],
            "size": [float(number) for number in range(20)],
            "day": np.arange(20).astype("datetime64[D]"),
            "ward": WARDS,
            "sex": ["m", "f"] * 10,
            "kind": [0, 1] * 10,
        }
    )
    return made.cast_column("ward", datasets.ClassLabel(names=["north", "south"]))


@pytest.mark.parametrize(
    "settings",
    [
        {"inputs": "vector", "target": "kind"},
        {"inputs": ["size"], "target": "kind"},
        {"inputs": "tokens", "vocabulary": 5},
    ],
)
def test_from_huggingface_makes_attributes_of_named_columns(table, settings):
    data = from_huggingface(
        table, **settings, test=table.select([0, 11]), time="day", domain="ward", group="sex"
    )
    assert data.train.attributes["domain"].tolist() == WARDS.tolist()
    assert data.train.attributes["group"].tolist() == [1, 0] * 10
    assert data.train.attributes["time"].tolist() == [86400.0 * day for day in range(20)]
    assert data.test.attributes["domain"].tolist() == [0, 1]
    assert data.categories["domain"] == ("north", "south")
    assert data.categories["group"] == ("f", "m")
    # names of a type are declared, names that are found depend on every record
    assert data.train.numbered_by_records == ("group",) and by_domain(data).assigned_by_record
    assert "the values of the attribute group are declared public" in data.public_facts


def test_from_huggingface_refuses_a_missing_column_by_name(table):
    with pytest.raises(
        ConfigError,
        match="domain = 'hospital' is not allowed; allowed: columns of the data set: vector",
    ):
        from_huggingface(table, inputs="vector", target="kind", domain="hospital")


# --------------------------------------------------------------------------- by position


def named_only():
    for name in perdure.data.__all__:
        function = getattr(perdure.data, name)
        if inspect.isfunction(function):
            kinds = [each.kind for each in inspect.signature(function).parameters.values()]
            if inspect.Parameter.KEYWORD_ONLY in kinds:
                yield name


@pytest.mark.parametrize("name", list(named_only()))
def test_data_functions_refuse_arguments_given_without_a_name(name):
    with pytest.raises(ConfigError, match=f"{name} was given 9 arguments without a name") as caught:
        getattr(perdure.data, name)(*range(9))
    assert "\n" not in str(caught.value) and "=..." in str(caught.value)


def required(name):
    """Arguments by name that a function has no default for."""
    return [
        each.name
        for each in inspect.signature(getattr(perdure.data, name)).parameters.values()
        if each.default is each.empty and each.kind is each.KEYWORD_ONLY
    ]


@pytest.mark.parametrize("name", [name for name in named_only() if required(name)])
def test_data_functions_name_each_argument_that_is_missing(name):
    with pytest.raises(ConfigError, match=f"{name} was not given all that it needs") as caught:
        getattr(perdure.data, name)()
    assert all(f"{each}=..., " in str(caught.value) for each in required(name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"experiences": 5}, r"add scenario=\.\.\., task, domain, class$"),
        ({"experience": 2}, r"no argument experience; allowed: .*; did you mean 'experiences'\?"),
        ({"data": None}, r"split was given data twice; give it once, data=\.\.\."),
    ],
)
def test_a_call_with_wrong_names_is_refused_in_one_line(given, told):
    with pytest.raises(ConfigError, match=told):
        perdure.data.split(perdure.data.digits(), **given)


def test_by_domain_and_by_time_cut_by_a_named_attribute():
    attributes = {"site": WARDS, "day": np.arange(20)}
    data = perdure.data.from_arrays(
        POINTS.tensors[0], POINTS.tensors[1], test=0.3, attributes=attributes
    )
    assert len(by_domain(data, "site")) == 2
    assert len(by_time(data, "day", boundaries=[5, 10])) == 3


def test_split_refuses_regression_and_names_the_cuts_for_it():
    data = perdure.data.from_arrays(np.ones((9, 2)), np.ones(9), test=0.5, task="regression")
    with pytest.raises(ConfigError, match="by_time, by_domain and joint serve every task"):
        split(data, scenario="class", experiences=1)
    assert len(split(digits(), scenario="class", experiences=5)) == 5


# --------------------------------------------------------------------------- odd, but honest

DATA = perdure.data.from_arrays(
    POINTS.tensors[0], POINTS.tensors[1], attributes={"time": WARDS, "domain": WARDS}
)
STREAM = split(DATA, scenario="class", experiences=2)
OTHER_TYPES = {
    "split": {"scenario": "class", "experiences": 1.0},
    "blurry": {"experiences": 2, "blurry_share": "0.1"},
    "by_time": {"boundaries": 5},
    "by_domain": {"order": ["north", "south"]},
    "repetition": {"experiences": "4"},
    "permuted": {"experiences": 2.5},
    "rotated": {"angles": 3},
    "joint": {"declared_size": "5"},
    "online": {"chunk": True},
    "iid": {"clients": "2"},
    "dirichlet": {"clients": 2, "alpha": "1"},
    "from_arrays": {"targets": [0, 1], "seed": 2**70},
    "from_torch": {"keys": 3},
    "from_folder": {"attributes": [1]},
    "from_tokens": {"vocabulary": "3"},
}


@pytest.mark.parametrize("name", OTHER_TYPES)
def test_stream_functions_refuse_an_argument_of_another_type(name):
    given = STREAM if name in ("online", "iid", "dirichlet") else DATA
    wrong = list(OTHER_TYPES[name])[-1]
    with pytest.raises(ConfigError, match=f"^{wrong} = .* is not allowed; allowed: ") as caught:
        getattr(perdure.data, name)(given, **OTHER_TYPES[name])
    assert "\n" not in str(caught.value)


def test_stream_functions_accept_numpy_arrays_and_numbers():
    cut = by_time(DATA, boundaries=np.array([1.0]))
    assert len(cut) == 2 and len(by_domain(DATA, order=np.array([0, 1]))) == 2
    assert len(split(DATA, scenario="class", experiences=np.int64(2))) == 2


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        (
            "are a masked array, with 1 values masked",
            {"inputs": np.ma.masked_values([[1.0, 2]], 2)},
        ),
        ("have 9223372036854775808; allowed", {"inputs": np.array([[2**63]], dtype=np.uint64)}),
        ("on the device 'meta'", {"inputs": torch.ones(1, 2, device="meta")}),
        ("num_classes = 1000000000", {"num_classes": 10**9}),
        ("attributes are a list; allowed: a dict", {"attributes": [1]}),
    ],
)
def test_from_arrays_refuses_values_that_conversion_would_change(message, settings):
    given = {"inputs": [[1.0]], "targets": [0], "test": ([[1.0]], [0])} | settings
    with pytest.raises(ConfigError, match=message):
        perdure.data.from_arrays(**given)


def test_test_records_get_unused_ids_if_the_largest_id_is_taken():
    ids = [2**63 - 1, 5]
    data = perdure.data.from_arrays([[1.0], [2.0]], [0, 1], ids=ids, test=([[1.0]], [0]))
    assert data.train.ids.tolist() == ids and data.test.ids.tolist() == [4]


def test_from_folder_names_an_attribute_function_that_fails(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "a" / "x.png")
    with pytest.raises(ConfigError, match=r"attributes\['time'\] failed for a/x.png: ValueError"):
        from_folder(tmp_path, attributes={"time": lambda path: float(path.stem)})
    with pytest.raises(ConfigError, match=r"attributes\['time'\] = 3 is not allowed"):
        from_folder(tmp_path, attributes={"time": 3})
