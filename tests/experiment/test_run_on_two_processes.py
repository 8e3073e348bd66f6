"""A configured run on two processes of this machine."""

import pytest

from perdure.errors import ConfigError
from perdure.experiment import parse, run
from perdure.privacy.ledger.merged import read

CONFIG = """
name = "two"
seeds = [0, 1]
processes = 2
[data]
name = "digits"
experiences = 2
[model]
name = "mlp"
hidden = [16]
[training]
optimizer = "SGD"
learning_rate = 0.1
epochs = 1
batch_size = 64
[privacy]
noise_multiplier = 1.0
delta = 1e-4
seed = 1
[[arms]]
strategy = "replay"
memory_size = 50
[[arms]]
strategy = "naive"
private = true
"""


@pytest.mark.deep(reason="deployment: starts a second process, which imports everything again")
def test_a_run_on_two_processes_has_the_files_of_one(tmp_path):
    alone = CONFIG.replace("processes = 2", "processes = 1")
    two = run(parse(CONFIG), CONFIG, tmp_path / "two")
    one = run(parse(alone), alone, tmp_path / "one")
    files = [
        sorted(
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.suffix in (".json", ".toml", ".safetensors")
        )
        for folder in (tmp_path / "two", tmp_path / "one")
    ]
    assert files[0] == files[1]
    for mine, theirs in zip(two["arms"], one["arms"], strict=True):
        assert mine["epsilon"] == theirs["epsilon"]
    plain = [result["arms"][0]["accuracy_matrix"] for result in (two, one)]
    assert plain[0][0] == pytest.approx(plain[1][0], abs=1.0)
    (part, *_) = read(tmp_path / "two" / "ledger.jsonl").parts
    assert part.account.entries


def test_several_processes_are_refused_in_a_federation():
    text = CONFIG + "[federation]\nclients = 2\nrounds = 1\n"
    with pytest.raises(ConfigError, match=r"processes = 2 .* 1 in a federation"):
        parse(text)
