"""The speed comparison: both libraries do the same work. Times are not tested."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "speed" / "versus_avalanche.py"
pytestmark = [pytest.mark.reference, pytest.mark.slow]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[SCRIPT.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stream(script, data_root):
    from perdure.data.datasets.mnist import mnist
    from perdure.data.scenarios import split

    return script.first_records(split(mnist(data_root), scenario="class", experiences=5), 70)


@pytest.mark.parametrize("kind", ["tensors", "images"])
@pytest.mark.parametrize("name", ["naive", "ewc", "replay"])
def test_avalanche_and_perdure_take_equal_steps_on_equal_records(
    script, stream, monkeypatch, name, kind
):
    monkeypatch.setattr(script, "BATCH", 32)
    row = script.measure(name, kind, stream, repeats=1)
    assert row["steps"] == row["avalanche_steps"] == 15
    assert row["records"] == row["avalanche_records"] >= 350
    assert row["lowest"] == row["times_faster"] == row["highest"] > 0
    assert row["times_faster_in_steps"] > 0


@pytest.mark.parametrize("name", ["slda", "slda_body"])
def test_slda_reads_each_record_once_in_avalanche_and_perdure(script, stream, name):
    row = script.measure(name, "tensors", stream, repeats=1)
    assert row["records"] == row["avalanche_records"] == 350
    assert row["times_faster_in_steps"] is None, "it takes none"


def test_avalanche_and_perdure_get_equal_images(script, stream):
    tensors, images = (
        script.benchmark_of(stream, kind).train_stream[1].dataset for kind in ("tensors", "images")
    )
    for row in (0, 33):
        torch.testing.assert_close(tensors[row][0], images[row][0], atol=1e-6, rtol=0)
        assert tensors[row][1] == images[row][1]


def test_the_speed_benchmark_script_prints_a_table(script, stream, capsys):
    script.show([script.measure("naive", "tensors", stream, repeats=1)])
    assert "naive" in capsys.readouterr().out


def test_slda_features_are_the_pixels_or_the_body_output(script, stream):
    assert [script.model_for(stream, name).feature_size for name in ("slda", "slda_body")] == [
        784,
        400,
    ]
    pixels = script.model_for(stream, "slda").features(stream[0].train.inputs)
    assert torch.equal(pixels, stream[0].train.inputs.flatten(1))
