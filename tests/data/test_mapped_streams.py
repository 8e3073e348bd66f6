"""A stream over a file larger than memory is split, trained on and evaluated without being
loaded.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.mapped_stream import measured


def test_a_memory_mapped_stream_is_trained_without_a_copy(tmp_path):
    found = measured(str(tmp_path / "inputs.bin"), 200, "naive", "plain")
    assert len(found["accuracies"]) == 2
    assert found["cut"] - found["before"] < 30_000
    assert found["trained"] - found["before"] < 80_000


@pytest.mark.deep(reason="deployment: reads 6 GB several times over")
@pytest.mark.parametrize(
    ("strategy", "mode"),
    [
        ("naive", "plain"),
        ("joint", "plain"),
        ("replay", "plain"),
        ("icarl", "plain"),
        ("ewc", "plain"),
        ("replay", "private"),
    ],
)
@pytest.mark.usefixtures("helpers_in_programs")
def test_training_on_a_6_gb_stream_uses_less_than_1_gb(tmp_path, strategy, mode):
    file = tmp_path / "inputs.bin"
    done = subprocess.run(
        [sys.executable, "-m", "helpers.mapped_stream", str(file), "6000", strategy, mode],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    file.unlink()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert max(found["cut"], found["trained"]) < 10**6
