"""Fixtures for all tests: one thread, an empty home, no network, and small replacements of data
sets.

The toy problem is four Gaussian blobs in five dimensions, learnt two classes at a time.
"""

import atexit
import gc
import gzip
import io
import os
import socket
import struct
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perdure.data.datasets.base import Dataset
from perdure.data.datasets.cifar10 import CIFAR_CLASSES
from perdure.data.records import Records
from perdure.data.scenarios import split
from perdure.learner.known_verdicts import VERDICTS
from perdure.models.classifiers import mlp

pytest.register_assert_rewrite("helpers")


def pytest_configure(config):
    """Set an empty home before any import, so that nothing depends on the user's files, and block
    the network.
    """
    patch = pytest.MonkeyPatch()
    home = tempfile.TemporaryDirectory(prefix="perdure-tests-")
    config.add_cleanup(home.cleanup)
    config.add_cleanup(patch.undo)
    for name, folder in (
        ("HOME", ""),
        ("XDG_CACHE_HOME", ".cache"),
        ("XDG_CONFIG_HOME", ".config"),
        ("XDG_STATE_HOME", ".local/state"),
    ):
        patch.setenv(name, str(Path(home.name, folder)))
    patch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    # programs that tests start too: two threads that wait for each other double the work
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setattr(socket, "getaddrinfo", _only_this_machine(socket.getaddrinfo))
    # hardly anything that is made while tests are collected is garbage
    gc.disable()


def pytest_collection_modifyitems(items):
    """Put files with slow or many tests first, so that no worker waits for a long one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -tests[item.path], str(item.path)))


def pytest_collection_finish():
    """Leave the tests and the libraries out of garbage collection: they are nearly all there is.

    Everything is collected only when Python ends, as libraries expect that look for leaks then:
    pytest collects twice after the last test, which takes seconds if the libraries are visited.
    """
    gc.enable()
    gc.freeze()
    atexit.register(gc.unfreeze)


def _only_this_machine(look_up):
    def getaddrinfo(host, *args, **options):
        if host not in (
            None,
            "",
            "localhost",
            "127.0.0.1",
            "::1",
            "0.0.0.0",
            "::",
            socket.gethostname(),
        ):
            raise socket.gaierror(f"the tests run without a network; {host} was asked for")
        return look_up(host, *args, **options)

    return getaddrinfo


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """Return PERDURE_DATA if it is set, else small files in the published formats of MNIST,
    CIFAR-10 and Adult.
    """
    if chosen := os.environ.get("PERDURE_DATA"):
        return Path(chosen)
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    _write_mnist(root / "MNIST" / "raw", generator)
    _write_cifar10(root / "cifar10-jpeg.zip", generator)
    _write_adult(root / "adult")
    return root


def _write_mnist(folder, generator):
    """Write IDX files of 40 training and 20 test images per class: a bright row that marks the
    class, and noise.
    """
    folder.mkdir(parents=True)
    for stem, per_class in (("train", 40), ("t10k", 20)):
        labels = np.tile(np.arange(10, dtype=np.uint8), per_class)
        images = generator.integers(0, 64, (len(labels), 28, 28), dtype=np.uint8)
        images[np.arange(len(labels)), 4 + 2 * labels] |= 192
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
            (folder / f"{stem}-{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))


def _write_cifar10(path, generator):
    """Write a zip of 4 training and 2 test images per class: one colour per class, and noise."""
    with zipfile.ZipFile(path, "w") as archive:
        for label, name in enumerate(CIFAR_CLASSES):
            for k in range(6):
                pixels = generator.integers(0, 32, (32, 32, 3), dtype=np.uint8) + np.uint8(
                    22 * label
                )
                Image.fromarray(pixels).save(buffer := io.BytesIO(), "JPEG")
                archive.writestr(
                    f"{'train' if k < 4 else 'test'}/{name}/{k:04}.jpg", buffer.getvalue()
                )


def _write_adult(folder):
    """Write two tables of invented people; more years of education mean a higher income."""
    folder.mkdir()
    for name, full_stop, n in (("adult.data", "", 60), ("adult.test", ".", 30)):
        people = (
            f"{20 + k % 50}, Private, {100_000 + k}, Bachelors, {k % 16 + 1}, Never-married, "
            "Sales, Unmarried, Other, "
            f"{('Female', 'Male')[k % 2]}, 0, 0, {30 + k % 20}, Japan, "
            f"{'>50K' if k % 16 > 9 else '<=50K'}{full_stop}"
            for k in range(n)
        )
        (folder / name).write_text("\n".join(people) + "\n")


def blobs(per_class=12, classes=4, features=5, seed=0, first_id=0):
    """Return records whose classes are linearly separable, with inputs in [0, 1]."""
    place = torch.Generator().manual_seed(seed)
    centres = torch.rand(classes, features, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(classes).repeat(per_class)
    inputs = (centres[labels] + 0.08 * torch.randn(len(labels), features, generator=place)).clamp(
        0, 1
    )
    return Records(inputs=inputs, labels=labels, ids=first_id + torch.arange(len(labels)))


@pytest.fixture
def helpers_in_programs(monkeypatch):
    """Let programs that a test starts import `helpers`, as the test does."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


@pytest.fixture(scope="session")
def toy_data():
    """Return the toy problem as a data set with 12 training and 10 test records per class."""
    train = blobs()
    test = blobs(per_class=10, seed=1, first_id=1000)
    return Dataset(name="blobs", train=train, test=test, num_classes=4, input_shape=(5,))


@pytest.fixture
def toy_stream(toy_data):
    """Return a function from a scenario to a stream of two experiences with 24 training records
    each.
    """
    return lambda scenario="class": split(toy_data, scenario=scenario, experiences=2)


@pytest.fixture
def toy_model():
    """Return a function from a stream to the same small model every time."""
    return lambda stream: mlp(
        input_shape=stream.input_shape,
        num_classes=stream.num_classes,
        hidden=(6,),
        seed=3,
        activation="tanh",
    )


@pytest.fixture(autouse=True)
def _verdicts_of_whole_code(request):
    """Forget stored verdicts of the guard, which do not hold for library code that a test
    replaces.
    """
    replaces = "monkeypatch" in request.fixturenames
    if replaces:
        VERDICTS.forget()
    yield
    if replaces:
        VERDICTS.forget()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Use one thread, because more threads slow such small tensors down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
