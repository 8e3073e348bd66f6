"""Training on several processes: two equal one, noise is added once, and a lost one is seen."""

import os
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from helpers.shared_training import in_two_processes, learner_of, toy_stream
from perdure import Learner, Privacy
from perdure.errors import ConfigError, RunError
from perdure.models import mlp
from perdure.strategies import Naive
from perdure.utils.processes import with_processes

SHORT = ("DER++", "A-GEM private")
ALL = ("Naive", "EWC", "DER++", "A-GEM", "Naive private", "EWC private", "A-GEM private")
forked = pytest.mark.deep(reason="deployment: a forked second process")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def assert_equal_trainings(both, alone):
    """Assert that two learners have equal results up to rounding in float64, and equal ledgers."""
    assert both.matrix == alone.matrix
    mine = both.snapshot().tensors
    theirs = alone.snapshot().tensors
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-6, msg=name)
    if alone.privacy:
        assert both.private_sum.ledger.entries == alone.private_sum.ledger.entries
        assert len(both.private_sum.ledger.entries) > 1


def fitted(case, folder, **given):
    learner = learner_of(case, folder=folder, **given)
    learner.fit(toy_stream())
    return learner


def assert_two_equal_one(cases, folder):
    """Assert that two started processes and one have equal results in every case."""
    command = [sys.executable, "-m", "helpers.shared_training", ",".join(cases)]
    with with_processes(command, 2):
        found = {case: fitted(case, folder / f"{case} 2", processes=2) for case in cases}
    for case in cases:
        assert_equal_trainings(found[case], fitted(case, folder / case))


@pytest.mark.usefixtures("helpers_in_programs")
def test_two_processes_equal_one_in_float64(tmp_path):
    assert_two_equal_one(SHORT, tmp_path)


@pytest.mark.deep(reason="deployment: a second process, and seven cases")
@pytest.mark.usefixtures("helpers_in_programs")
def test_two_processes_equal_one_in_every_case(tmp_path):
    assert_two_equal_one(ALL, tmp_path)


@forked
def test_a_plain_step_equals_torch_ddp_in_float64():
    """A mean over processes is the mean over rows if parts are equal; losses are float32."""

    def by_torch():
        mine = learner_of("Naive", batch_size=10)
        mine.prepare(toy_stream())
        mine.begin(0)
        model = DistributedDataParallel(mine.model)
        optimizer = mine.current_optimizer
        rank = distributed.get_rank()
        for step in range(3):
            rows = mine.session.sample(step)
            assert len(rows) == 10
            own = slice(5 * rank, 5 * rank + 5)
            optimizer.zero_grad()
            outputs = mine.session.held.context.mask(model(rows.inputs[own]), rows.take(own))
            F.cross_entropy(outputs, rows.labels[own]).backward()
            optimizer.step()
        return mine

    theirs, error = in_two_processes(by_torch)
    assert error == ""

    def by_perdure():
        mine = learner_of("Naive", processes=2, batch_size=10)
        mine.prepare(toy_stream())
        mine.begin(0)
        mine.train(range(3))
        return mine

    ours, error = in_two_processes(by_perdure)
    assert error == ""
    for name, value in theirs.params.items():
        torch.testing.assert_close(ours.params[name], value, rtol=0, atol=1e-8)


@forked
@pytest.mark.parametrize("case", ["DER++", "A-GEM private"])
def test_a_stopped_run_of_two_processes_resumes_in_both(case, tmp_path):
    def stopped(point, learner):
        if point == "block.begin" and learner.position.experience == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_two_processes(lambda: fitted(case, tmp_path / "two", processes=2, callbacks=[stopped]))
    both, error = in_two_processes(lambda: fitted(case, tmp_path / "two", processes=2))
    assert error == ""
    assert_equal_trainings(both, fitted(case, tmp_path / "alone"))


@forked
def test_secret_noise_and_coins_come_from_process_0_alone(tmp_path):
    """Processes with keys of their own would draw other rows, and end with other parameters."""
    secret = Privacy(noise_multiplier=1.0, delta=1e-3)
    both, error = in_two_processes(
        lambda: fitted("A-GEM private", tmp_path, processes=2, privacy=secret)
    )
    assert error == ""
    assert not both.private_sum.ledger.simulated
    assert len(list(tmp_path.rglob("key"))) == 1


@pytest.mark.deep(reason="chaos: a process dies")
def test_a_process_that_dies_stops_the_others_with_one_line():
    def dies(point, learner):
        if distributed.get_rank() == 1:
            os._exit(1)

    def work():
        learner = learner_of("Naive", processes=2)
        learner.prepare(toy_stream())
        learner.callbacks = [dies]
        learner.fit(toy_stream())

    # in a process of its own, because a broken group leaves threads behind
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            in_two_processes(work)
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        told = file.read()
    os.waitpid(child, 0)
    assert told.startswith("RunError: another process of this training ended")
    assert "\n" not in told


@forked
def test_processes_with_different_settings_are_refused():
    def work():
        learner_of("Naive", processes=2, l2=0.1 * distributed.get_rank()).fit(toy_stream())

    with pytest.raises(RunError, match="2 processes have different settings"):
        in_two_processes(work)


CHANGES = {
    "inputs": lambda records: replace(records, inputs=records.inputs.flip(0)),
    "labels": lambda records: replace(records, labels=records.labels.flip(0)),
    "ids": lambda records: replace(records, ids=records.ids.flip(0)),
    "order": lambda records: records.map(lambda rows: rows.flip(0)),
    "weights": lambda records: replace(records, weights=torch.ones(len(records))),
    "attributes": lambda records: replace(records, attributes={"group": records.labels}),
    "declared size": lambda records: records.declared(len(records) + 1),
}
"""One difference between the records of two processes, by name."""


def changed_stream(change):
    """Return the toy stream with other training records."""
    stream = toy_stream()
    return replace(
        stream, experiences=tuple(replace(each, train=change(each.train)) for each in stream)
    )


@forked
@pytest.mark.parametrize("case", ["Naive", "Naive private"])
def test_processes_with_different_records_are_refused(case):
    """A record in another row would be clipped in both processes, and count twice in the sum."""

    def work():
        refused = []
        for name, change in CHANGES.items():
            learner = learner_of(case, processes=2)
            mine = changed_stream(change) if distributed.get_rank() else toy_stream()
            try:
                learner.fit(mine)
            except RunError as error:
                assert "different settings, models or records" in str(error)
                refused.append(name)
        assert refused == list(CHANGES)
        learner_of(case, processes=2).fit(toy_stream())

    _, error = in_two_processes(work)
    assert error == ""


def test_several_processes_without_a_group_are_refused():
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2"):
        learner_of("Naive", processes=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "batch"}, "BatchNorm1d in body.2, which couples the rows"),
        ({"dropout": 0.5}, "Dropout in body.3, whose random numbers"),
    ],
)
def test_a_layer_that_needs_whole_batches_is_refused(changes, message):
    model = mlp(input_shape=(6,), num_classes=4, hidden=(8,), seed=0, **changes)
    with pytest.raises(ConfigError, match=message):
        Learner(model=model, strategy=Naive(), optimizer=torch.optim.SGD, epochs=1, processes=2)


def test_raw_diagnostics_of_several_processes_are_refused():
    model = mlp(input_shape=(6,), num_classes=4, hidden=(8,), seed=0)
    raw = Privacy(noise_multiplier=1.0, seed=0, diagnostics="raw")
    given = {"optimizer": torch.optim.SGD, "epochs": 1, "processes": 2}
    with pytest.raises(ConfigError, match="diagnostics='raw'"):
        Learner(model=model, strategy=Naive(), privacy=raw, **given)
