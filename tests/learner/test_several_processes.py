"""Training on several processes: two processes equal one, and noise is added once."""

import sys

import pytest
import torch

from helpers.shared_training import learner_of, toy_stream
from perdure.errors import ConfigError, RunError
from perdure.models import cnn, mlp
from perdure.strategies import Naive
from perdure.utils.processes import with_processes

CASES = ("DER++", "A-GEM private")


@pytest.fixture(scope="module")
def two_and_one(tmp_path_factory):
    """Return the final tensors and matrices of every case by two processes and by one."""
    found = {}
    command = [sys.executable, "-m", "helpers.shared_training", ",".join(CASES)]
    with with_processes(command, 2):
        for case in CASES:
            both = learner_of(case, processes=2, folder=tmp_path_factory.mktemp("two"))
            found[case] = [(both.fit(toy_stream()), both)]
    for case in CASES:
        alone = learner_of(case, folder=tmp_path_factory.mktemp("one"))
        found[case].append((alone.fit(toy_stream()), alone))
    return found


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(two_and_one, case):
    (matrix, both), (expected, alone) = two_and_one[case]
    assert matrix.tolist() == expected.tolist()
    mine = both.snapshot()
    theirs = alone.snapshot()
    assert mine.tensors.keys() == theirs.tensors.keys()
    for name, value in theirs.tensors.items():
        torch.testing.assert_close(mine.tensors[name], value, rtol=0, atol=1e-6, msg=name)
    moved = sum(float(each.abs().sum()) for n, each in theirs.tensors.items() if "model" in n)
    assert moved > 1
