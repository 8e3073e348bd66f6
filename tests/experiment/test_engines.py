"""One config on several engines gives one result."""

import pytest

from perdure.experiment.config import parse
from perdure.experiment.overrides import overridden
from perdure.experiment.run import run, untimed

CONFIG = """
name = "ten"
[data]
experiences = 5
[model]
hidden = [8]
[training]
optimizer = "SGD"
learning_rate = 0.1
epochs = 1
batch_size = 64
[federation]
clients = 10
rounds = 1
min_size = 4
[[arms]]
strategy = "replay"
memory_size = 20
"""


@pytest.mark.deep(reason="deployment: Ray starts processes that import torch")
@pytest.mark.filterwarnings("ignore")  # Ray and Flower's entry to it warn of their own parts
def test_ray_gives_the_result_of_one_process(tmp_path):
    pytest.importorskip("ray", reason="needs the extra simulation")
    results = {}
    for engine in ("inprocess", "ray"):
        text = overridden(CONFIG, source="ten.toml", engine=engine)
        results[engine] = untimed(run(parse(text), text, tmp_path / engine))
    for engine, result in results.items():
        assert result["federation"].pop("engine") == engine  # a setting, which the result quotes
    assert results["inprocess"] == results["ray"]
