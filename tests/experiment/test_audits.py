"""Membership inference on the models of a finished run, with and without privacy."""

import pytest
import torch

from perdure.data.scenarios import split
from perdure.errors import ConfigError, RunError
from perdure.experiment.audits import attack_run, mixed, population
from perdure.experiment.config import parse
from perdure.experiment.run import run

CONFIG = """
name = "attacked"
[data]
experiences = 2
[model]
hidden = [256]
[training]
learning_rate = 0.003
epochs = 60
batch_size = 64
[private_training]
learning_rate = 0.01
epochs = 4
batch_size = 64
[privacy]
epsilon = 1.0
delta = 5e-4
seed = 0
[[arms]]
strategy = "joint"
[[arms]]
strategy = "joint"
private = true
"""


def test_shadow_attack_members_and_non_members_are_disjoint(toy_data):
    stream = split(toy_data, scenario="class", experiences=2)
    records, members, known = population(stream, 0, seed=0)
    train = stream[0].train
    test = stream[0].test
    assert int(members.sum()) == len(records) // 2 == 12 and len(known) == 12
    assert set(records.ids[members].tolist()) | set(known.ids.tolist()) == set(train.ids.tolist())
    assert not set(records.ids[~members].tolist()) & set(train.ids.tolist())
    assert torch.equal(records.inputs[~members], test.inputs[:12])
    half = records.take(torch.arange(24) % 2 == 0)
    shown = mixed(stream, 0, known, half)
    assert len(shown[0].train) == 24 and shown[0].train.declared_size == train.declared_size
    assert shown[0].train.partition == train.partition and shown[1] is stream[1]


@pytest.mark.deep(reason="full replay: attacks every arm of a run")
def test_attack_run_attacks_every_arm_and_changes_no_file(tmp_path):
    short = CONFIG.replace("epochs = 60", "epochs = 1").replace("epochs = 4", "epochs = 1")
    run(parse(short), short, tmp_path)
    seen = []
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    attacks = attack_run(tmp_path, shadows=4, progress=lambda *told: seen.append(told[:2]))
    assert list(attacks) == ["joint-plain", "joint-private"]
    assert all(0 <= attack.auc <= 1 and attack.auc_error > 0 for attack in attacks.values())
    assert [share for arm, share in seen if arm == "joint-plain"][-1] == 1.0
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


@pytest.mark.deep(reason="full replay: trains a run to memorise, and eight shadows of each arm")
def test_the_attack_finds_members_only_without_privacy(tmp_path):
    run(parse(CONFIG), CONFIG, tmp_path)
    plain, private = attack_run(tmp_path, shadows=8).values()
    assert plain.auc > 0.5 + 3 * plain.auc_error
    assert abs(private.auc - 0.5) < 3 * private.auc_error


def test_attack_run_refuses_an_unfinished_run(tmp_path):
    (tmp_path / "config.toml").write_text(CONFIG)
    with pytest.raises(RunError, match="let the run finish first"):
        attack_run(tmp_path, shadows=4)
    with pytest.raises(ConfigError, match="experience = 2 is not allowed; allowed: 0 to 1"):
        attack_run(tmp_path, experience=2)
