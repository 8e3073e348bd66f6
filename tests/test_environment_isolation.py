"""Isolation of the tests: no network, no file of the user's home, and data without downloads."""

import os
import pwd
import socket
from pathlib import Path

import pytest
import torch

from perdure.data.datasets.base import cache_folder
from perdure.data.datasets.registry import load


@pytest.mark.parametrize(
    ("name", "shape"), [("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32)), ("adult", (105,))]
)
def test_tests_can_read_every_built_in_data_set(data_root, name, shape):
    data = load(name, root=data_root)
    assert data.input_shape == shape
    for records in (data.train, data.test):
        assert records.labels.unique().tolist() == list(range(data.num_classes)), (
            "every class is there"
        )


def test_tests_cannot_resolve_host_names():
    for host in ("example.org", "192.0.2.1"):
        with pytest.raises(OSError, match="without a network"):
            socket.create_connection((host, 80), timeout=1)


def test_tests_can_connect_to_their_own_machine():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), 5) as client,
    ):
        assert client.getpeername() == server.getsockname()


def test_tests_do_not_use_the_home_folder_of_the_user():
    assert Path.home() != Path(pwd.getpwuid(os.getuid()).pw_dir)
    assert cache_folder().is_relative_to(Path.home())


def test_tests_run_with_one_thread():
    assert torch.get_num_threads() == 1
