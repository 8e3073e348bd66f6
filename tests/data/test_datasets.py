"""Data sets: built-in tables, and readers of small files in the published formats."""

import gzip
import importlib
import os
import struct
import sys
import zipfile
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from perdure.data import adult, mnist
from perdure.data import cifar10 as load_cifar10
from perdure.data.datasets import base as datasets
from perdure.data.datasets import cifar10, find, names
from perdure.data.datasets.base import Dataset
from perdure.data.datasets.breast_cancer import breast_cancer
from perdure.data.datasets.digits import digits
from perdure.data.datasets.registry import load
from perdure.data.records import Records
from perdure.errors import ConfigError, DataError
from perdure.experiment.data_config import DataConfig

ADULT_HEADER = "age, workclass, fnlwgt, education, education-num, marital-status, ..."
ADULT_ROW = (
    "39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, "
    "Male, 2174, 0, "
    "40, United-States, <=50K"
)
ADULT_TEST_ROW = (
    "25, ?, 226802, 11th, 7, Never-married, ?, Own-child, Black, Female, 200000, 0, 40, "
    "Holand-Netherlands, >50K."
)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def small_mnist(tmp_path):
    """Five training and three test images, the training part gzipped."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for stem, n, ending in (("train", 5, ".gz"), ("t10k", 3, "")):
        images = generator.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        images[0, 0, :2] = 0, 255
        for name, array in (("images-idx3", images), ("labels-idx1", np.arange(n, dtype=np.uint8))):
            content = gzip.compress(idx(array)) if ending else idx(array)
            (folder / f"{stem}-{name}-ubyte{ending}").write_bytes(content)
    return tmp_path


@pytest.fixture
def small_adult(tmp_path):
    (tmp_path / "adult").mkdir()
    (tmp_path / "adult" / "adult.data").write_text(f"{ADULT_HEADER}\n{ADULT_ROW}\n{ADULT_ROW}\n\n")
    (tmp_path / "adult" / "adult.test").write_text(f"|1x3 Cross validator\n{ADULT_TEST_ROW}\n")
    return tmp_path


def jpeg(colour: tuple[int, int, int], size: int = 32) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def small_zip(tmp_path, monkeypatch):
    """Two training images and one test image; the cache folder is inside `tmp_path` too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with zipfile.ZipFile(tmp_path / "cifar10-jpeg.zip", "w") as archive:
        archive.writestr("train/truck/0000.jpg", jpeg((255, 0, 0)))
        archive.writestr("train/airplane/0001.jpg", jpeg((0, 0, 255)))
        archive.writestr("test/cat/0000.jpg", jpeg((0, 255, 0)))
    return tmp_path


# ---------------------------------------------------------------- embedded


@pytest.mark.parametrize(
    ("name", "total", "shape", "classes"),
    [("digits", 1797, (1, 8, 8), 10), ("breast-cancer", 569, (30,), 2)],
)
def test_built_in_data_sets_have_the_stated_sizes_and_ranges(name, total, shape, classes):
    data = load(name)
    assert (data.name, data.input_shape, data.num_classes) == (name, shape, classes)
    assert data.train.inputs.dtype == torch.float32
    ids = torch.cat([data.train.ids, data.test.ids])
    assert torch.equal(ids.sort().values, torch.arange(total)), (
        "each source record is in one part, once"
    )
    assert data.train.partition == name
    assert data.test.partition != name
    shares = data.test.labels.bincount() / (
        data.test.labels.bincount() + data.train.labels.bincount()
    )
    assert (shares - 0.3).abs().max() < 0.01, "the same share of each class"


def test_digits_are_the_published_pixels_divided_by_16():
    from sklearn.datasets import load_digits

    data = digits(seed=4)
    source = load_digits()
    expected = torch.from_numpy(source.images).float()[data.train.ids]
    assert torch.equal(data.train.inputs[:, 0] * 16, expected)
    assert data.train.labels.tolist() == source.target[data.train.ids].tolist()
    assert 0 == data.train.inputs.min() < data.train.inputs.max() == 1


def test_the_train_test_split_depends_only_on_the_seed():
    first, again, other = (digits(seed=seed).test.ids for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_breast_cancer_is_standardised_over_the_published_table():
    data = breast_cancer()
    whole = torch.cat([data.train.inputs, data.test.inputs])
    torch.testing.assert_close(whole.mean(0), torch.zeros(30), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.std(0, correction=0), torch.ones(30), atol=1e-5, rtol=0)
    assert "public" in data.public_facts[0]


# ---------------------------------------------------------------- MNIST


def test_mnist_reads_plain_and_gzipped_idx_files(small_mnist):
    data = load("mnist", root=small_mnist)
    assert data.train.inputs.shape == (5, 1, 28, 28)
    assert data.train.inputs[0, 0, 0, :2].tolist() == [0.0, 1.0]
    assert data.train.labels.tolist() == [0, 1, 2, 3, 4]
    assert data.train.ids.tolist() == [0, 1, 2, 3, 4]
    assert data.test.ids.tolist() == [5, 6, 7], "one id never names two records"


def test_mnist_reads_pixels_in_row_major_order(small_mnist):
    pixels = np.arange(5 * 784, dtype=np.uint8).reshape(5, 28, 28)
    path = small_mnist / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(idx(pixels))  # the plain file is preferred to the gzipped one
    assert torch.equal(
        load("mnist", root=small_mnist).train.inputs[:, 0], torch.from_numpy(pixels) / 255
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x00\x00\x0d\x03", "not an IDX file"),
        (b"", "not an IDX file"),
        (idx(np.zeros((2, 2, 2), dtype=np.uint8))[:-1], "but its header promises"),
        (idx(np.zeros((2, 2, 2), dtype=np.uint8))[:9], "but its header promises"),
        (idx(np.zeros((5, 27, 27), dtype=np.uint8)), r"\(1, 27, 27\)"),
        (idx(np.zeros(5, dtype=np.uint8)), "shape"),
        (idx(np.zeros((4, 28, 28), dtype=np.uint8)), "labels"),
    ],
)
def test_mnist_refuses_a_damaged_idx_file(small_mnist, content, words):
    (small_mnist / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=words):
        load("mnist", root=small_mnist)


def test_mnist_refuses_a_truncated_gzip_file(small_mnist):
    path = small_mnist / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        load("mnist", root=small_mnist)


def test_mnist_refuses_a_full_size_file_with_another_checksum(small_mnist):
    (small_mnist / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(
        idx(np.zeros((60_000, 28, 28), dtype=np.uint8))
    )
    with pytest.raises(DataError, match="MD5"):
        load("mnist", root=small_mnist)


def test_the_real_mnist_files_are_read_if_present(small_mnist):
    """With PERDURE_DATA the published files are read and their checksum is tested; without it small
    files are read.
    """
    real = "PERDURE_DATA" in os.environ
    data = load("mnist", root=None if real else small_mnist)
    assert (len(data.train), len(data.test)) == ((60_000, 10_000) if real else (5, 3))


# ---------------------------------------------------------------- CIFAR-10


def test_cifar10_reads_the_binary_files(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    record = np.arange(3072, dtype=np.uint8)
    for number, name in enumerate(
        [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]
    ):
        (folder / name).write_bytes(bytes([number]) + record.tobytes())
    data = load("cifar10", root=tmp_path)
    assert data.train.labels.tolist() == [0, 1, 2, 3, 4]
    assert data.test.labels.tolist() == [5]
    assert data.test.ids.tolist() == [5]
    assert torch.equal(data.train.inputs[0], torch.from_numpy(record).reshape(3, 32, 32) / 255)
    (folder / "test_batch.bin").write_bytes(b"\x00" * 3000)
    with pytest.raises(DataError, match="3073"):
        load("cifar10", root=tmp_path)
    (folder / "test_batch.bin").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        load("cifar10", root=tmp_path)


def test_cifar100_reads_pixels_and_fine_classes(tmp_path):
    """A record starts with its superclass and its class."""
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    pixels = np.arange(3072, dtype=np.uint8)
    for name, labels in (("train.bin", [(1, 99), (2, 0)]), ("test.bin", [(3, 7)])):
        (folder / name).write_bytes(b"".join(bytes(each) + pixels.tobytes() for each in labels))
    data = load("cifar100", root=tmp_path)
    assert data.train.labels.tolist() == [99, 0]
    assert data.test.labels.tolist() == [7]
    assert torch.equal(data.train.inputs[1], torch.from_numpy(pixels).reshape(3, 32, 32) / 255)
    (folder / "test.bin").write_bytes(b"\x00" * 3073)
    with pytest.raises(DataError, match="3074"):
        load("cifar100", root=tmp_path)
    with pytest.raises(DataError, match="no CIFAR-100 in"):
        load("cifar100", root=tmp_path / "empty")


def test_cifar10_reads_zipped_jpeg_files_and_caches_pixels(small_zip, monkeypatch):
    data = load("cifar10", root=small_zip)
    assert data.train.labels.tolist() == [0, 9], (
        "airplane is 0 and truck is 9, in alphabetical order"
    )
    assert data.test.labels.tolist() == [3]
    colours = data.train.inputs.mean(dim=(2, 3))
    torch.testing.assert_close(colours, torch.tensor([[0.0, 0, 1], [1, 0, 0]]), atol=0.02, rtol=0)
    (cached,) = (small_zip / "cache" / "perdure").iterdir()
    assert cached.suffix == ".safetensors"
    monkeypatch.setattr(cifar10, "read_image_zip", None)
    again = load("cifar10", root=small_zip)
    assert torch.equal(again.train.inputs, data.train.inputs)


def test_cifar10_reads_a_changed_archive_and_not_the_cache(small_zip):
    load("cifar10", root=small_zip)
    with zipfile.ZipFile(small_zip / "cifar10-jpeg.zip", "a") as archive:
        archive.writestr("train/bird/0002.jpg", jpeg((0, 0, 0)))
    assert load("cifar10", root=small_zip).train.labels.tolist() == [0, 2, 9]


def test_cifar10_replaces_a_damaged_cache_file(small_zip):
    data = load("cifar10", root=small_zip)
    (cached,) = (small_zip / "cache" / "perdure").iterdir()
    cached.write_bytes(b"torn")
    assert torch.equal(load("cifar10", root=small_zip).train.inputs, data.train.inputs)


def test_cifar10_loads_without_a_writable_cache(small_zip, monkeypatch):
    blocked = small_zip / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert len(load("cifar10", root=small_zip).train) == 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train/zebra/0.jpg", jpeg((0, 0, 0)), "zebra"),
        ("train/cat/9.jpg", b"no picture", "not an image"),
        ("train/cat/9.jpg", jpeg((0, 0, 0), size=16), r"\(16, 16, 3\)"),
        ("train/cat/9.jpg", jpeg((9, 99, 0))[:-30], "cannot be read"),
    ],
)
def test_cifar10_refuses_an_invalid_image_in_the_archive(small_zip, name, content, words):
    with zipfile.ZipFile(small_zip / "cifar10-jpeg.zip", "a") as archive:
        archive.writestr(name, content)
    with pytest.raises(DataError, match=words):
        load("cifar10", root=small_zip)


def test_cifar10_refuses_a_damaged_or_empty_archive(tmp_path):
    archive = tmp_path / "cifar10-jpeg.zip"
    archive.write_bytes(b"PK torn")
    with pytest.raises(DataError, match="cannot be read"):
        load("cifar10", root=tmp_path)
    zipfile.ZipFile(archive, "w").close()
    with pytest.raises(DataError, match="has no file train"):
        cifar10.read_image_zip(archive, "train")


# ---------------------------------------------------------------- Adult


def test_adult_is_encoded_with_declared_ranges_and_categories(small_adult):
    data = load("adult", root=small_adult)
    assert data.input_shape == (105,)
    assert data.train.labels.tolist() == [0, 0]
    assert data.test.labels.tolist() == [1], "the full stop of the test file is dropped"
    assert data.test.ids.tolist() == [2]
    row = data.train.inputs[0]
    numeric = torch.tensor([0.39, 77516 / 1.5e6, 12 / 15, 2174 / 99_999, 0, 0.4])
    torch.testing.assert_close(row[:6], numeric)
    assert row[6:].sum() == 8, "one indicator for each of the eight categories"
    assert row[6 + 5] == 1, "State-gov is the sixth work class"
    assert data.test.inputs[0, 6:].sum() == 6, "nothing is set for the two that are missing"
    assert data.test.inputs[0, 3] == 1, "clamped to the declared range"
    names = {name: data.categories[name] for name in ("workclass", "race", "sex")}
    numbers = {name: int(data.train.attributes[name][0]) for name in names}
    found = {name: names[name][number] for name, number in numbers.items()}
    assert found == {"workclass": "State-gov", "race": "White", "sex": "Male"}
    assert int(data.test.attributes["workclass"][0]) == 8, "missing: the number after the last"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("Bachelors", "Wizard", "line 2 has an unknown category 'Wizard'"),
        ("39,", "old,", "line 2 has age = 'old'"),
        ("39,", "nan,", "line 2 has age = 'nan'"),
        ("<=50K", "lots", "line 2 has income 'lots'"),
        (", Male", "", "line 2 has 14 columns"),
    ],
)
def test_adult_refuses_an_invalid_row_and_names_its_line(small_adult, old, new, words):
    path = small_adult / "adult" / "adult.data"
    path.write_text(f"{ADULT_HEADER}\n{ADULT_ROW.replace(old, new)}\n")
    with pytest.raises(DataError, match=words):
        load("adult", root=small_adult)


def test_adult_refuses_an_empty_or_undecodable_table(small_adult):
    path = small_adult / "adult" / "adult.data"
    path.write_text(ADULT_HEADER)
    with pytest.raises(DataError, match="no records"):
        load("adult", root=small_adult)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read"):
        load("adult", root=small_adult)


# ---------------------------------------------------------------- where to look


@pytest.mark.parametrize("name", ["mnist", "cifar10", "adult"])
def test_the_error_for_missing_data_names_path_and_fix(tmp_path, name):
    """The root is a file, so a download fails at once, with or without a network."""
    root = tmp_path / "file"
    root.write_text("")
    with pytest.raises(DataError, match=r"^no [^\n]*$") as caught:
        load(name, root=root)
    assert str(root) in str(caught.value)


def test_the_data_root_is_argument_then_environment_then_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PERDURE_DATA", raising=False)
    assert datasets.data_root() == tmp_path / "cache" / "perdure"
    monkeypatch.setenv("PERDURE_DATA", str(tmp_path / "data"))
    assert datasets.data_root() == tmp_path / "data"
    assert datasets.data_root(tmp_path) == tmp_path
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert datasets.cache_folder() == tmp_path / ".cache" / "perdure"


def test_an_unknown_data_set_name_lists_the_known_names():
    known = f"data set = 'imagenet' .* allowed: {', '.join(names())}, or \"module:name"
    with pytest.raises(ConfigError, match=known):
        load("imagenet")
    with pytest.raises(ConfigError, match="test_share"):
        digits(test_share=1.0)


def test_a_data_set_refuses_inputs_or_labels_it_does_not_declare():
    good = Records(inputs=torch.zeros(3, 2), labels=torch.tensor([0, 1, 1]))
    bad = Records(inputs=torch.zeros(3, 2), labels=torch.tensor([0, 1, 2]))
    with pytest.raises(DataError, match="test labels"):
        Dataset(name="x", train=good, test=bad, num_classes=2, input_shape=(2,))
    with pytest.raises(DataError, match="shape"):
        Dataset(name="x", train=good, test=good, num_classes=2, input_shape=(3,))


# ---------------------------------------------------------------- data sets of one's own

TWINS = """
import torch
from perdure.data.datasets import Dataset
from perdure.data.records import Records


def build(labels):
    rows = Records(inputs=torch.zeros(2, 3), labels=torch.tensor(labels))
    return Dataset(name="twins", train=rows, test=rows, num_classes=2, input_shape=(3,))


def twins(root=None, seed=0, share=0.5):
    assert root == "here" and share == 0.5
    return build([seed, seed])


def list_of_twins():
    return [twins("here")]


def needs_more(share):
    return twins("here")
"""


@pytest.fixture
def twins(tmp_path, monkeypatch):
    """Add a module with a data set, once in perdure.data.datasets and once on the path."""
    package = importlib.import_module("perdure.data.datasets")
    (tmp_path / "twins.py").write_text(TWINS)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.syspath_prepend(tmp_path)
    yield "twins"
    for name in ("twins", "perdure.data.datasets.twins"):
        sys.modules.pop(name, None)
    vars(package).pop("twins", None)


def test_data_set_names_equal_file_names():
    assert {"adult", "breast_cancer", "cifar10", "digits", "mnist"} <= set(names())
    assert find("digits") is digits
    assert find("breast-cancer") is find("breast_cancer") is breast_cancer


def test_a_file_in_the_package_adds_a_data_set(twins):
    assert "twins" in names()
    assert load("twins", root="here", seed=1).train.labels.tolist() == [1, 1]
    assert DataConfig(name="twins").name == "twins"


def test_an_outside_data_set_is_named_by_module_and_function(twins):
    assert load("twins:twins", root="here").train.labels.tolist() == [0, 0]
    assert DataConfig(name="twins:twins").name == "twins:twins"
    with pytest.raises(
        ConfigError, match=r"twins:list_of_twins' is a list; .* perdure.data.Dataset"
    ):
        load("twins:list_of_twins")
    with pytest.raises(ConfigError, match=r"twins:needs_more' is not allowed; .* of `root` and"):
        load("twins:needs_more")


def test_a_config_refuses_an_unknown_data_set():
    with pytest.raises(ConfigError, match=r"name = 'mnits' is not allowed; .* mean 'mnist'\?"):
        DataConfig(name="mnits")


# ---------------------------------------------------------------- declared sizes and ids


def test_every_data_set_accepts_a_declared_size(small_mnist, small_adult, small_zip):
    made = [
        digits(declared_size=1300),
        breast_cancer(declared_size=1300),
        mnist(small_mnist, declared_size=1300),
        adult(small_adult, declared_size=1300),
        load_cifar10(small_zip, declared_size=1300),
        load("digits", declared_size=1300),
    ]
    assert [data.train.declared_size for data in made] == [1300] * 6
    assert not any(data.train.size_counted for data in made)
    assert digits().train.size_counted and load("digits").train.size_counted
    assert digits().train.declared_size == len(digits().train)


def test_published_data_sets_have_ids_independent_of_position(small_mnist, small_adult):
    made = (digits(), breast_cancer(), mnist(small_mnist), adult(small_adult))
    assert not any(data.train.ids_by_position for data in made)
