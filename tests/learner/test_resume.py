"""Equal seeds and resumed runs give the same bits, and no noise is drawn without a charge."""

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from helpers.learners import SIMULATED, bits, same_bits
from perdure.contract.combine import Combine
from perdure.errors import LedgerError
from perdure.learner import POINTS
from perdure.learner.checkpoint import Store, numbered
from perdure.models.classifiers import mlp
from perdure.privacy.ledger.merged import read
from perdure.privacy.noise.key import NoiseKey
from perdure.privacy.settings import Privacy
from perdure.strategies import EWC, Joint, LwF, Replay

SECRET = Privacy(noise_multiplier=1.0)


# --------------------------------------------------------------------------- seeds


def dropping(stream):
    model = mlp(input_shape=stream.input_shape, num_classes=stream.num_classes, hidden=(6,), seed=3)
    model.body.append(nn.Dropout(0.4))
    return model


@pytest.mark.parametrize("privacy", [None, SIMULATED])
@pytest.mark.parametrize("strategy", [Replay(memory_size=12), LwF()])
def test_equal_seeds_train_bit_identical_models_with_dropout(
    learner_of, toy_stream, strategy, privacy
):
    ends = []
    for seed in (5, 5, 6):
        # what the caller does with the global generator is nobody's business
        torch.manual_seed(len(ends))
        learner = learner_of(strategy, model=dropping(toy_stream()), seed=seed, privacy=privacy)
        learner.fit(toy_stream())
        ends.append(bits(learner.model.state_dict()))
    assert same_bits(ends[0], ends[1]) and not same_bits(ends[0], ends[2])


def test_private_dropout_draws_come_from_the_noise_key(learner_of, toy_stream):
    """Draws depend on a row's place in the batch: if they were public, one more record would change
    those of others.
    """
    learner = learner_of(seed=5)
    learner.prepare(toy_stream())
    seeds = [learner.session.seed_of("layers", 0)]
    for privacy in (SIMULATED, replace(SIMULATED, seed=1), replace(SIMULATED, seed=1)):
        learner = learner_of(seed=5, privacy=privacy)
        learner.prepare(toy_stream())
        learner.begin(0)
        learner.session.held.reserve(range(9), "start")
        seeds.append(learner.session.seed_of("layers", 0))
    assert (
        len(set(seeds)) == 3
        and seeds[2] == seeds[3]
        and len({learner.session.seed_of("layers", s) for s in range(9)}) == 9
    )


def test_a_second_fit_evaluates_the_stream_again(learner_of, toy_stream):
    learner = learner_of(iterations=60, warm_start=True)
    first = learner.fit(toy_stream())
    again = learner.fit(toy_stream())
    assert again.shape == first.shape == (2, 2) and len(learner.matrix) == 2
    assert learner.position.experience == 2


# --------------------------------------------------------------------------- stopping and going on


class Stop(Exception):  # noqa: N818
    """An exception in place of a power failure."""


class Cut:
    """A callback that stops a run at the k-th call of a point and counts noise draws."""

    def __init__(self, point=None, k=1):
        self.point = point
        self.left = k
        self.draws = 0

    def __call__(self, point, learner):
        self.draws += point == "noise.drawn"
        if point == self.point:
            self.left -= 1
            if self.left == 0:
                raise Stop(point)


RESUMED = {
    "replay": Replay(memory_size=12),
    "ewc": EWC(strength=20.0),
    "online": Combine(EWC(strength=20.0, mode="online"), LwF()),
    "joint": Joint(),
}


def schedule(optimizer, steps):
    return MultiStepLR(optimizer, milestones=[steps // 2, 3], gamma=0.3)


def every_step(optimizer, steps):
    return StepLR(optimizer, step_size=1)


def one_cycle(optimizer, steps):
    return OneCycleLR(optimizer, 0.1, total_steps=steps)


def in_sequence(optimizer, steps):
    warm = LinearLR(optimizer, start_factor=0.1, total_iters=2)
    parts = [warm, CosineAnnealingLR(optimizer, T_max=steps - 2)]
    return SequentialLR(optimizer, parts, milestones=[2])


def harmonic(optimizer, steps):
    return LambdaLR(optimizer, lr_lambda=lambda step: 1 / (1 + step))


@pytest.fixture
def start(learner_of, toy_stream):
    """Return the result of a run in a folder, stopped at `cut` or not."""

    def run(folder, name, privacy, cut, **changes):
        learner = learner_of(
            RESUMED[name],
            blocks=2,
            folder=folder,
            privacy=privacy,
            callbacks=[cut],
            scheduler=schedule,
            **changes,
        )
        matrix = learner.fit(toy_stream())
        return matrix.tolist(), bits(learner.snapshot().tensors), bits(learner.snapshot().private)

    return run


def entries(folder):
    (part,) = read(folder / "ledger.jsonl").parts
    return part.account.entries


def charged(folder):
    """Return the number of steps and releases in the ledger; 0 without a complete first line."""
    head = folder / "ledger.head.json"
    begun = head.exists() and json.loads(head.read_text())["count"] > 0
    return sum(entry.steps for entry in entries(folder)) if begun else 0


def assert_same(mine, theirs):
    assert mine[0] == theirs[0] and same_bits(mine[1], theirs[1]) and same_bits(mine[2], theirs[2])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return result, ledger and number of calls of every point of an undisturbed run, once for each
    kind.
    """
    known = {}

    def whole(start, name, privacy):
        if (name, privacy) not in known:
            folder = tmp_path_factory.mktemp("whole")
            passed = Counter()
            result = start(folder, name, privacy, lambda point, learner: passed.update([point]))
            assert not privacy or passed["noise.drawn"] == charged(folder)
            ledger = (folder / "ledger.jsonl").read_text() if privacy else ""
            known[name, privacy] = (result, ledger, passed)
        return known[name, privacy]

    return whole


FREE = [point for point in POINTS if not point.startswith(("ledger.", "noise."))]


@pytest.mark.parametrize(
    ("name", "point"),
    [
        *product(["replay", "ewc"], FREE),
        *product(["online", "joint"], ["step.gradient", "experience.consolidated"]),
    ],
)
def test_a_run_stopped_anywhere_resumes_bit_identically(start, undisturbed, tmp_path, name, point):
    result, _, passed = undisturbed(start, name, None)
    assert passed[point] >= 2
    times = [passed[point] // 2 + 1] if name == "ewc" else [1, passed[point] // 2 + 1]
    for k in times:
        folder = tmp_path / str(k)
        with pytest.raises(Stop):
            start(folder, name, None, Cut(point, k))
        assert_same(start(folder, name, None, Cut()), result)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", ["replay", "ewc"])
def test_a_stopped_private_run_resumes_with_equal_bits_and_costs(
    start, undisturbed, tmp_path, name, point
):
    result, ledger, passed = undisturbed(start, name, SIMULATED)
    assert passed[point] >= 2
    # the last pass of a strategy without releases is a step like those before
    last = passed[point] if name == "ewc" else passed[point] // 2 + 1
    for k in sorted({passed[point] // 2 + 1, last}):
        folder = tmp_path / str(k)
        cut = Cut(point, k)
        with pytest.raises(Stop):
            start(folder, name, SIMULATED, cut)
        assert charged(folder) >= cut.draws
        assert_same(start(folder, name, SIMULATED, Cut()), result)
        assert (folder / "ledger.jsonl").read_text() == ledger


@pytest.mark.parametrize("point", POINTS)
def test_secret_noise_is_never_drawn_without_a_charge(start, undisturbed, tmp_path, point):
    """The key survives the stop, so repeated steps get the same noise: no charge is missing or
    doubled.
    """
    _, ledger, passed = undisturbed(start, "ewc", SIMULATED)
    cut = Cut(point, passed[point] // 2 + 1)
    with pytest.raises(Stop):
        start(tmp_path, "ewc", SECRET, cut)
    assert charged(tmp_path) >= cut.draws
    start(tmp_path, "ewc", SECRET, Cut())
    merged = read(
        tmp_path / "ledger.jsonl", keys={"curator": NoiseKey.from_os(tmp_path / "private" / "key")}
    )
    assert merged.verified == "chains and keyed heads verified" and not merged.simulated
    assert charged(tmp_path) == passed["noise.drawn"] and len(entries(tmp_path)) == ledger.count(
        '"kind":"entry"'
    )


def test_a_run_stopped_four_times_ends_with_equal_bits(start, undisturbed, tmp_path):
    result, _, _ = undisturbed(start, "replay", SIMULATED)
    for point, k in (
        ("step.done", 3),
        ("noise.drawn", 1),
        ("ledger.appended", 1),
        ("checkpoint.begin", 2),
    ):
        with pytest.raises(Stop):
            start(tmp_path / "cut", "replay", SIMULATED, Cut(point, k))
    assert_same(start(tmp_path / "cut", "replay", SIMULATED, Cut()), result)


def test_a_finished_run_is_not_trained_again(start, tmp_path):
    first = start(tmp_path, "ewc", SIMULATED, Cut())
    cut = Cut("step.sampled")
    assert_same(start(tmp_path, "ewc", SIMULATED, cut), first)
    assert cut.draws == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"scheduler": every_step},
        {"seed": 6},
        {"optimizer": partial(torch.optim.Adam, lr=0.5)},
    ],
)
def test_a_changed_step_gets_new_noise_and_a_new_charge(learner_of, toy_stream, tmp_path, changes):
    """The scheduler's first rate is the same; later rates in the block must count too."""
    noises = []
    for options in ({}, changes):
        folder = tmp_path
        drawn = []

        def look(point, learner, drawn=drawn):
            if point == "step.gradient":
                # a secret of the step is keyed by the entry that pays for it
                drawn.append(learner.private_sum.secret("views", learner.position.step))
                raise Stop

        settings = {"scheduler": schedule} | options
        learner = learner_of(privacy=SIMULATED, folder=folder, callbacks=[look], **settings)
        with pytest.raises(Stop):
            learner.fit(toy_stream())
        noises += drawn
    assert noises[0] != noises[1] and len(entries(tmp_path)) == 2


def test_a_resumed_run_refuses_a_ledger_of_another_key(start, tmp_path):
    start(tmp_path, "ewc", SIMULATED, Cut())
    with pytest.raises(LedgerError, match="does not fit this key"):
        start(tmp_path, "ewc", replace(SIMULATED, seed=1), Cut())


def test_secret_noise_without_a_folder_is_refused(learner_of, toy_stream):
    from perdure.errors import PrivacyError

    with pytest.raises(PrivacyError, match="secret noise needs a folder"):
        learner_of(privacy=SECRET).prepare(toy_stream())


def test_a_learner_snapshot_does_not_change_during_training(learner_of, toy_stream):
    learner = learner_of(LwF(), warm_start=True)
    learner.fit(toy_stream())
    kept = learner.snapshot()
    before = bits(kept.tensors)
    learner.fit(toy_stream())
    assert same_bits(dict(kept.tensors), before)
    assert not same_bits(learner.snapshot().tensors, before)


def test_memory_rows_are_saved_only_in_the_private_folder(learner_of, toy_stream, tmp_path):
    learner = learner_of(Replay(memory_size=12), folder=tmp_path)
    learner.fit(toy_stream())
    saved = Store(tmp_path).load()
    assert not any(name.startswith("memory") for name in saved.tensors)
    assert len(saved.private["memory.inputs"]) == 12
    assert (tmp_path / "private").stat().st_mode & 0o077 == 0
    records = torch.cat([e.train.inputs for e in toy_stream()]).numpy()
    published = b"".join(path.read_bytes() for path in (tmp_path / "checkpoint").iterdir())
    assert not any(record.tobytes() in published for record in records)


@pytest.mark.parametrize("scheduler", [schedule, harmonic, one_cycle, in_sequence])
def test_a_resumed_run_continues_the_learning_rate_schedule(
    learner_of, toy_stream, tmp_path, scheduler
):
    rates = {"whole": [], "cut": []}

    def run(key, cut):
        def look(point, learner):
            if point == "step.done":
                rates[key].append(learner.current_optimizer.param_groups[0]["lr"])

        learner_of(scheduler=scheduler, blocks=4, folder=tmp_path / key, callbacks=[look, cut]).fit(
            toy_stream()
        )

    run("whole", Cut())
    with pytest.raises(Stop):
        run("cut", Cut("checkpoint.end", 2))
    run("cut", Cut())
    assert rates["cut"] == rates["whole"] and len(set(rates["whole"])) > 2


def test_whole_number_keys_of_a_scheduler_survive_json():
    assert numbered({"milestones": {"3": 1, "60": 2}, "lrs": [{"0": 1.0}], "name": "x"}) == {
        "milestones": {3: 1, 60: 2},
        "lrs": [{0: 1.0}],
        "name": "x",
    }
