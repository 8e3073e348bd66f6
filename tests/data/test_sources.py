"""Data sets from each kind of source: valid input, and invalid input refused in one line."""

import re
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

from perdure.data import (
    InputDomain,
    by_domain,
    from_arrays,
    from_folder,
    from_huggingface,
    from_pandas,
    from_tokens,
    from_torch,
    split,
)
from perdure.data.row_view import RowView
from perdure.errors import ConfigError
from perdure.tasks import NextToken, Regression

RANDOM = np.random.default_rng(0)
ROWS = RANDOM.normal(size=(40, 3))
LABELS = np.arange(40) % 2
NO_TIME = {"time": [0, np.nan]}
BYTES = RANDOM.integers(0, 256, size=(40, 5, 6, 3), dtype=np.uint8)


def refused(message: str, make, *args, **settings) -> None:
    """Assert that the call raises one line that contains the message."""
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        make(*args, **settings)
    assert "\n" not in str(caught.value)


def changed(values, place, value):
    """Return a copy with another value at one place."""
    copy = np.array(values)
    copy[place] = value
    return copy


# --------------------------------------------------------------------------- arrays


def test_from_arrays_converts_inputs_to_float32_with_a_note():
    data = from_arrays(ROWS, LABELS.astype(np.int32), test=(ROWS[:8] + 1, LABELS[:8]))
    assert data.train.inputs.dtype == torch.float32
    assert torch.equal(data.train.inputs, torch.from_numpy(ROWS).float())
    assert data.train.labels.dtype == torch.int64
    assert "training inputs were float64; they are float32 now" in repr(data)
    assert data.num_classes == 2
    assert set(data.train.ids.tolist()).isdisjoint(data.test.ids.tolist())
    assert len(split(data, scenario="class", experiences=2)) == 2


def test_from_arrays_scales_image_bytes_and_puts_channels_first():
    data = from_arrays(BYTES, LABELS, test=(BYTES[:8], LABELS[:8]))
    expected = torch.from_numpy(BYTES).permute(0, 3, 1, 2) / 255
    assert torch.equal(data.train.inputs, expected)
    assert data.train.domain == InputDomain(shape=(3, 5, 6), range=(0.0, 1.0))
    assert "divided by 255" in repr(data)
    grey = from_arrays(BYTES[..., 0], LABELS, standardise="declared")
    assert grey.input_shape == (1, 5, 6)
    assert float(grey.train.inputs.min()) >= -1


def test_from_arrays_numbers_text_labels_in_the_declared_order():
    words = np.array(["well", "ill"])[LABELS]
    found = from_arrays(ROWS, words)
    assert found.categories["target"] == ("ill", "well")
    assert "the classes found in the records are declared public" in found.public_facts
    declared = from_arrays(ROWS.tolist(), list(words), classes=("well", "ill", "dead"))
    assert declared.num_classes == 3
    assert not any("classes" in fact for fact in declared.public_facts)


def test_from_arrays_scales_inputs_by_declared_constants():
    data = from_arrays(ROWS, LABELS, value_range=(-8, 8), standardise="declared")
    assert torch.allclose(data.train.inputs, torch.from_numpy(ROWS).float()[data.train.ids] / 8)
    assert data.train.domain == InputDomain(shape=(3,), range=(-1.0, 1.0))
    each = from_arrays(ROWS, LABELS, standardise=([1, 2, 3], [1, 1, 2]), test=(ROWS, LABELS))
    expected = (ROWS - [1, 2, 3]) / [1, 1, 2]
    assert torch.allclose(each.train.inputs.double(), torch.from_numpy(expected), atol=1e-5)


def test_the_test_share_depends_only_on_each_record_id():
    names = [f"patient {number}" for number in range(40)]
    whole = from_arrays(ROWS, LABELS, ids=names, attributes={"time": np.arange(40)})
    less = from_arrays(ROWS[1:], LABELS[1:], ids=names[1:])
    assert set(less.test.ids.tolist()) <= set(whole.test.ids.tolist())
    assert set(less.train.ids.tolist()) <= set(whole.train.ids.tolist())
    assert len(whole.train) + len(whole.test) == 40
    assert len(whole.train.attributes["time"]) == len(whole.train)


def test_from_arrays_does_not_copy_a_memory_mapped_array(tmp_path: Path):
    np.save(tmp_path / "rows.npy", ROWS.astype(np.float32))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    data = from_arrays(mapped, LABELS, test=(ROWS, LABELS))
    assert data.train.inputs.data_ptr() == mapped.ctypes.data


def test_from_arrays_converts_large_images_only_when_read():
    pictures = np.broadcast_to(np.uint8(51), (1100, 256, 256))  # 288 MB in float32
    scaled = {"standardise": "declared", "value_range": (0, 1)}
    data = from_arrays(pictures, np.arange(1100) % 2, test=0.05, **scaled)
    inputs = split(data, scenario="class", experiences=2)[1].train.inputs
    assert inputs.dtype == torch.float32
    assert isinstance(inputs, RowView)
    assert inputs.parts[0].change is not None
    assert torch.allclose(inputs[-1], torch.full((1, 256, 256), -0.6))


@pytest.mark.parametrize(
    ("message", "inputs", "targets", "settings"),
    [
        ("inputs have nan in row 7, column 2", changed(ROWS, (7, 2), np.nan), LABELS, {}),
        ("inputs have inf in row 3, column 0", changed(ROWS, (3, 0), 1e300), LABELS, {}),
        ("40 inputs but 39 targets", ROWS, LABELS[1:], {}),
        ("targets take the values 1, 2", ROWS, LABELS + 1, {}),
        ("targets have 2 in row 1; allowed: 0 .. 1", ROWS, LABELS * 2, {"num_classes": 2}),
        ("targets have 0.5 in row 0; allowed: whole", ROWS, LABELS + 0.5, {}),
        ("for one-hot rows give targets.argmax(1)", ROWS, np.eye(2)[LABELS], {}),
        ("inputs are a dict", {"x": ROWS}, LABELS, {}),
        ("perdure.data.from_torch takes a dataset", torchvision.datasets.FakeData(3), LABELS, {}),
        ("perdure.data.from_pandas(table", pd.DataFrame(ROWS), LABELS, {}),
        ("inputs are a str", "rows.npy", LABELS, {}),
        ("rows of different lengths", [[1.0, 2.0], [3.0]], [0, 1], {}),
        ("inputs have shape (40,)", ROWS[:, 0], LABELS, {}),
        ("inputs have shape (0, 3)", ROWS[:0], LABELS[:0], {}),
        ("test inputs have shape (0, 3)", ROWS, LABELS, {"test": (ROWS[:0], LABELS[:0])}),
        ("test inputs have rows of shape (2,)", ROWS, LABELS, {"test": (ROWS[:, :2], LABELS)}),
        ("inputs are uint8 of shape (40, 3)", ROWS.astype(np.uint8), LABELS, {}),
        ("inputs are words", [["a"], ["b"]], [0, 1], {}),
        ("ids are equal in rows 0 and 2", ROWS, LABELS, {"ids": changed(range(40), 2, 0)}),
        ("ids are torch.float64", ROWS, LABELS, {"ids": ROWS[:, 0]}),
        ("inputs have", ROWS, LABELS, {"value_range": (-0.1, 0.1)}),
        ("standardise = 'declared'", ROWS, LABELS, {"standardise": "declared"}),
        ("standardise = (0", ROWS, LABELS, {"standardise": (0, 0)}),
        ("value_range = (1", ROWS, LABELS, {"value_range": (1, 0)}),
        ("test = 1.5", ROWS, LABELS, {"test": 1.5}),
        ("has no train records", ROWS[:1], [0], {"test": 0.99}),
        ("test_ids is not allowed", ROWS, LABELS, {"test_ids": range(3)}),
        (
            "attributes['time'] have nan in row 1",
            ROWS[:2],
            [0, 1],
            {"attributes": {"time": [0, np.nan]}},
        ),
        ("but 1 attributes['time']", ROWS, LABELS, {"attributes": {"time": [0]}}),
        ("num_classes = 0", ROWS, LABELS, {"num_classes": 0}),
        ("classes = ('a', 'a')", ROWS, LABELS, {"classes": ("a", "a")}),
    ],
)
def test_from_arrays_refuses_invalid_arguments_in_one_line(message, inputs, targets, settings):
    refused(message, from_arrays, inputs, targets, **settings)


def test_from_arrays_refuses_an_id_in_train_and_test():
    test = (ROWS[:5], LABELS[:5])
    message = "id 35 in row 0 of its test records and among the training records (5 such rows)"
    refused(message, from_arrays, ROWS, LABELS, test=test, ids=range(40), test_ids=range(35, 40))


# --------------------------------------------------------------------------- torch


def test_from_torch_keeps_the_transforms_of_the_data_set():
    pictures = torchvision.datasets.FakeData(
        20,
        (3, 6, 6),
        3,
        transform=v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
    )
    data = from_torch(pictures, test=pictures, num_classes=3)
    assert torch.equal(data.train.inputs[4], pictures[4][0])
    assert data.notes == ()


def test_from_torch_converts_pictures_to_scaled_bytes():
    data = from_torch(torchvision.datasets.FakeData(20, (3, 6, 6), 3), num_classes=3)
    assert data.input_shape == (3, 6, 6)
    assert "divided by 255" in repr(data)


def test_from_torch_notes_random_transforms():
    flipped = torchvision.datasets.FakeData(20, (3, 6, 6), 3, transform=v2.RandomHorizontalFlip())
    before = torch.get_rng_state()
    one, two = (from_torch(flipped, num_classes=3) for _ in range(2))
    assert "are random: each record has one random version" in repr(one)
    assert torch.equal(one.train.inputs, two.train.inputs)
    assert torch.equal(torch.get_rng_state(), before)


def test_from_torch_refuses_dict_items_without_keys():
    items = [{"x": torch.rand(3), "y": "ab"[number % 2]} for number in range(20)]
    assert from_torch(items, keys=("x", "y")).categories["target"] == ("a", "b")
    refused("is a dict with 'x', 'y'; allowed: input and target", from_torch, items)


@pytest.mark.parametrize(
    ("message", "dataset"),
    [
        ("dataset is a Tensor", torch.zeros(3, 2)),
        ("dataset is a DataFrame", pd.DataFrame(ROWS)),
        ("give the dataset of a loader", torch.utils.data.DataLoader([(torch.zeros(2), 0)])),
        ("has no items", []),
        ("item 1 of the dataset has shape (3,)", [(torch.zeros(2), 0), (torch.zeros(3), 1)]),
        ("item 0 of the dataset cannot be read: KeyError", {"x": ROWS}),
        ("item 0 of the dataset is a int", [1, 2]),
        ("inputs have nan in row 1", [(torch.zeros(2), 0), (torch.full((2,), np.nan), 1)]),
    ],
)
def test_from_torch_refuses_invalid_data_sets_in_one_line(message, dataset):
    refused(message, from_torch, dataset)


# --------------------------------------------------------------------------- pandas


@pytest.fixture(scope="module")
def visits() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "patient": [f"p{number}" for number in range(40)],
            "age": np.where(np.arange(40) == 3, np.nan, 20.0 + np.arange(40)),
            "smoker": LABELS == 1,
            "ward": np.array(["north", "south"])[np.arange(40) // 20],
            "stage": pd.Categorical(["II"] * 39 + [None], categories=["I", "II"]),
            "day": pd.date_range("1970-01-02", periods=40),
            "sex": np.array(["f", "m"])[LABELS],
            "ill": np.array(["no", "yes"])[LABELS],
        }
    )


def test_a_split_by_undeclared_categories_is_not_by_record(visits):
    table = visits[["patient", "ward", "ill"]].assign(age=1.0)
    one_more = pd.concat([table, table[:1].assign(patient="new", ward="east")])
    test = table.assign(patient=[f"q{number}" for number in range(40)])
    roles = {"target": "ill", "ids": "patient", "domain": "ward", "test": test}
    before, after = (from_pandas(rows, **roles) for rows in (table, one_more))
    moved = before.train.attributes["domain"] != after.train.attributes["domain"][:40]
    assert moved.all()  # one record of another ward, and all others are in another experience
    assert by_domain(before).assigned_by_record is False
    assert by_domain(before, order=(1, 0)).assigned_by_record is False
    wards = {"ward": ["east", "north", "south"]}
    declared = [from_pandas(rows, **roles, categories=wards) for rows in (table, one_more)]
    assert torch.equal(*(data.train.attributes["domain"][:40] for data in declared))
    assert by_domain(declared[0]).assigned_by_record is True
    fact = "the values of the attribute domain are declared public"
    assert [fact in data.public_facts for data in (before, declared[0])] == [True, False]
    few = {"ward": ["north"]}
    refused("has 'south'; allowed: north", from_pandas, table, **roles, categories=few)


FILL = {"missing": {"age": 50}}
AGES = {"age": (0, 99)}
SETTINGS = {"target": "ill", "ids": "patient", "time": "day", "group": "sex"}


def test_from_pandas_makes_numbers_indicators_and_attributes(visits):
    data = from_pandas(
        visits,
        **SETTINGS,
        test=visits.assign(patient=[f"q{number}" for number in range(40)]),
        missing={"age": 50},
        ranges={"age": (0, 100)},
        standardise="declared",
    )
    # age, age is missing, smoker, ward=north, ward=south, stage=I, stage=II
    assert data.train.inputs[0].tolist() == pytest.approx([-0.6, 0, 0, 1, 0, 0, 1])
    assert data.train.inputs[3].tolist() == pytest.approx([0, 1, 1, 1, 0, 0, 1])
    assert data.train.inputs[39, -2:].tolist() == [0, 0]
    assert data.train.domain == InputDomain(shape=(7,), range=(-1.0, 1.0))
    assert data.train.attributes["time"][:2].tolist() == [86400.0, 172800.0]
    assert data.train.attributes["group"][:2].tolist() == [0, 1]
    assert data.categories == {"target": ("no", "yes"), "group": ("f", "m")}
    assert "the categories found in ward are declared public" in data.public_facts


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("missing number in row 3, column 'age'", {}),
        ("target = 'sick'", {"target": "sick"}),
        ("columns = 'ill'", {"columns": ["ill"]}),
        ("column 'day' holds datetime64", {"time": None, "missing": {"age": 50}}),
        (
            "has 'south' in row 20, column 'ward'",
            {"categories": {"ward": ["north"]}, **FILL},
        ),
        (
            "missing value in row 39, column 'stage', which is its group",
            {"group": "stage", **FILL},
        ),
        (
            "inputs have 500 in row 3, column 'age'",
            {"missing": {"age": 500}, "ranges": AGES},
        ),
        ("ranges = []", {"missing": {"age": 50}, "ranges": {}}),
        ("missing = 'ward'", {"missing": {"ward": 0}}),
        ("ids are equal in rows 0 and 2", {"ids": "sex", "missing": {"age": 0}}),
        ("holds str; allowed: dates or numbers", {"time": "ward", "columns": ["smoker"]}),
        ("test is a list; allowed: a pandas.DataFrame", {"test": []}),
    ],
)
def test_from_pandas_refuses_invalid_arguments_in_one_line(visits, message, settings):
    refused(message, from_pandas, visits, **{**SETTINGS, **settings})


def test_from_pandas_refuses_a_table_of_another_type():
    refused("table is a ndarray; allowed: a pandas.DataFrame", from_pandas, ROWS, target="x")


# --------------------------------------------------------------------------- folders


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.fromarray(BYTES[number]).save(tmp_path / name / f"{number}.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    return tmp_path


def test_from_folder_makes_one_class_per_sub_folder(photos):
    data = from_folder(photos, test=0.3)
    pixels = torch.from_numpy(BYTES[:4]).permute(0, 3, 1, 2) / 255
    whole = torch.cat([data.train.inputs, data.test.inputs])
    assert len(whole) == 8
    assert all(any(torch.equal(row, image) for image in pixels) for row in whole)
    assert data.categories["target"] == ("cat", "dog")
    assert "1 files of" in repr(data)
    assert not data.train.ids_by_position
    assert from_folder(photos, size=(2, 3), channels=1).input_shape == (1, 2, 3)


def test_from_folder_refuses_invalid_folders_in_one_line(photos):
    refused("is not a folder", from_folder, photos / "absent")
    refused("has no sub-folders", from_folder, photos / "cat")
    refused("has a sub-folder 'dog', which is no class", from_folder, photos, classes=("cat",))
    refused("size = 3", from_folder, photos, size=3)
    refused("channels = 2", from_folder, photos, channels=2)
    refused("another folder", from_folder, photos, test=photos)
    Image.fromarray(BYTES[0][:4]).save(photos / "dog" / "3.png")
    refused("has 4 x 6 pixels", from_folder, photos)
    (photos / "dog" / "3.png").write_bytes(b"torn")
    refused("3.png is not an image", from_folder, photos)


# --------------------------------------------------------------------------- tasks


@pytest.mark.parametrize(
    ("task", "targets", "shape", "outputs"),
    [
        ("multi-label", RANDOM.integers(0, 2, size=(40, 5)), (40, 5), 5),
        ("regression", RANDOM.normal(size=40), (40, 1), 1),
        (Regression(), RANDOM.normal(size=(40, 2)), (40, 2), 2),
    ],
)
def test_from_arrays_keeps_targets_of_each_task(task, targets, shape, outputs):
    data = from_arrays(ROWS, targets, task=task, test=(ROWS, targets))
    assert data.train.labels.shape == shape
    assert data.train.labels.dtype == torch.float32
    assert data.num_classes == outputs
    assert data.task == data.test.task


@pytest.mark.parametrize(
    ("message", "task", "targets"),
    [
        ("task = 'ranking'", "ranking", LABELS),
        ("targets have nan in row 4, column 0", "regression", changed(ROWS[:, 0], 4, np.nan)),
        ("targets have 2.0 in row 0, column 0", "multi-label", np.full((40, 2), 2)),
        ("targets have shape (40,); allowed: (n, C) of 0 and 1", "multi-label", LABELS),
        ("targets are torch.float32; convert", "next-token", ROWS.astype(np.float32)),
    ],
)
def test_from_arrays_refuses_targets_of_another_task(message, task, targets):
    refused(message, from_arrays, ROWS, targets, task=task)


# --------------------------------------------------------------------------- tokens

TEXTS = [[1, 2, 3], [4, 1], [2, 2, 2, 2], [3, 4]] * 5


def test_from_tokens_predicts_the_next_token_by_default():
    data = from_tokens(TEXTS, vocabulary=5, padding=0, length=4, test=TEXTS[:4])
    assert data.train.inputs[:2].tolist() == [[1, 2, 3, 0], [4, 1, 0, 0]]
    assert data.train.labels[:2].tolist() == [[2, 3, -100, -100], [1, -100, -100, -100]]
    assert data.num_classes == 5
    assert data.task == NextToken()
    assert data.train.domain == InputDomain(
        shape=(4,), dtype=torch.int64, vocabulary=5, padding=0, sequence_axes=(0,)
    )
    assert not any("length" in fact for fact in data.public_facts)


def test_from_tokens_accepts_one_class_per_sequence():
    data = from_tokens(TEXTS, [0, 1] * 10, vocabulary=5, padding=0, test=(TEXTS[:2], [0, 1]))
    assert data.train.inputs.shape == (20, 4)
    assert data.num_classes == 2
    assert "the length of the longest sequence is declared public" in data.public_facts


@pytest.mark.parametrize(
    ("message", "sequences", "settings"),
    [
        ("sequences have 4 in row 1, column 0; allowed: tokens 0 .. 3", TEXTS, {"vocabulary": 4}),
        (
            "row 0 of sequences has 3 tokens; allowed: 4 tokens in each row, or padding=TOKEN",
            TEXTS,
            {"padding": None},
        ),
        ("row 2 of sequences has 4 tokens; allowed: at most 3", TEXTS, {"length": 2}),
        ("row 1 of sequences has 1 tokens; allowed: at least 2", [[1, 2], [3, 0]], {}),
        ("sequences have shape (20,)", np.arange(20) % 5, {}),
        ("row 0 of sequences are a str", ["to be"], {}),
        ("sequences are empty", [], {}),
        ("row 0 of sequences is torch.float64", [[0.5, 1.0]], {}),
        ("vocabulary = None", TEXTS, {"vocabulary": None}),
        ("domain.padding = 5", TEXTS, {"padding": 5}),
        ("targets = 'an array'", TEXTS, {"targets": [0] * 20, "task": "next-token"}),
    ],
)
def test_from_tokens_refuses_invalid_sequences(message, sequences, settings):
    refused(message, from_tokens, sequences, **{"vocabulary": 5, "padding": 0, **settings})


# --------------------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="module")
def table() -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {
            "photo": [Image.fromarray(BYTES[number]) for number in range(20)],
            "tokens": TEXTS,
            "size": [0.5, 1.5] * 10,
            "word": ["a", "b"] * 10,
            "number": [f"n{number}" for number in range(20)],
            "kind": [0, 1] * 10,
        }
    ).cast_column("kind", datasets.ClassLabel(names=["cat", "dog"]))


def test_from_huggingface_reads_the_named_columns(table):
    parts = datasets.DatasetDict(train=table, test=table.select(range(4)))
    photos = from_huggingface(parts, inputs="photo", target="kind")
    assert photos.input_shape == (3, 5, 6)
    assert len(photos.test) == 4
    assert photos.categories["target"] == ("cat", "dog")
    columns = from_huggingface(table, inputs=["size", "word"], target="kind", ids="number")
    assert columns.input_shape == (3,)
    assert not columns.train.ids_by_position
    texts = from_huggingface(table, inputs="tokens", vocabulary=5, padding=0)
    assert texts.task == NextToken()


def test_from_huggingface_refuses_invalid_data_sets_and_columns(table):
    refused("inputs = 'photos'", from_huggingface, table, inputs="photos", target="kind")
    refused("target = None", from_huggingface, table, inputs="photo")
    refused("dataset is a str", from_huggingface, "mnist", inputs="image", target="label")
    refused("parts of the dataset", from_huggingface, {"valid": table}, inputs="size")
    empty = table.select([])
    refused("dataset has no records", from_huggingface, empty, inputs="size", target="kind")
    message = "item 1 of the dataset has shape (2,)"
    refused(message, from_huggingface, table, inputs="tokens", target="kind")
