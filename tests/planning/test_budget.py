"""Privacy budgets planned from public facts: horizons, caps, budgets per experience, and spent
charges.
"""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch

from perdure.data.scenarios import permuted, split
from perdure.errors import BudgetError, ConfigError, PrivacyError
from perdure.learner.learner import Learner
from perdure.planning.budget import horizon, planned
from perdure.privacy.accounting.calibration import epsilon
from perdure.privacy.accounting.charges import Charge
from perdure.privacy.private_sum import Schedule
from perdure.privacy.settings import Privacy
from perdure.strategies.ewc import EWC
from perdure.strategies.joint import Joint
from perdure.strategies.naive import Naive
from perdure.strategies.replay import Replay

DELTA = 1e-5


@pytest.fixture
def stream(toy_data):
    """Return a stream of four experiences with 12 records of one class each."""
    return split(toy_data, scenario="class", experiences=4)


@pytest.fixture
def learner_of(toy_model):
    def make(stream, strategy=None, prepare=True, **changes):
        options = {"optimizer": partial(torch.optim.SGD, lr=0.5), "epochs": 3, "batch_size": 4}
        learner = Learner(
            model=toy_model(stream), strategy=strategy or Naive(), **options | changes
        )
        if prepare:
            learner.prepare(stream)
        return learner

    return make


def spent(learner):
    return {
        p: learner.private_sum.ledger.epsilon([p], delta=DELTA)
        for p in learner.private_sum.ledger.partitions
    }


# --------------------------------------------------------------------------- horizon


@pytest.mark.parametrize(
    "strategy",
    [
        Naive(),
        EWC(strength=1.0),
        pytest.param(
            Replay(memory_size=6),
            marks=pytest.mark.deep(reason="full replay: calibrates six times"),
        ),
        pytest.param(
            Joint(), marks=pytest.mark.deep(reason="full replay: every experience at all others")
        ),
    ],
)
def test_a_longer_horizon_adds_noise_only_if_records_recur(learner_of, stream, strategy):
    first = replace(stream, experiences=stream.experiences[:2])
    short = learner_of(first, strategy, privacy=Privacy(epsilon=3, seed=0))
    long = learner_of(first, strategy, privacy=Privacy(epsilon=3, horizon=6, seed=0))
    reuses_past_records = strategy.privacy_cost.reuses_past_records
    assert (
        long.private_sum.noise_multiplier > 1.02 * short.private_sum.noise_multiplier
    ) == reuses_past_records
    long.fit(first)
    assert (
        max(spent(long).values()) <= 3 and (max(spent(long).values()) < 2.9) == reuses_past_records
    )


def test_a_longer_horizon_repeats_the_last_experience(learner_of, stream):
    learner = learner_of(stream, privacy=Privacy(epsilon=3, horizon=6, seed=0))
    stages = horizon(learner.training)
    assert [stage.index for stage in stages] == list(range(6))
    assert [stage.train.partition for stage in stages[4:]] == [
        "experience-3, 1 later",
        "experience-3, 2 later",
    ]
    copies = permuted_stream(stream)
    longer = learner_of(copies, privacy=Privacy(epsilon=3, horizon=4, seed=0))
    later = horizon(longer.training)
    assert {stage.train.partition for stage in later} == {copies[0].train.partition}


def permuted_stream(stream):
    from perdure.data.datasets.base import Dataset

    train = stream[0].train
    test = stream[0].test
    data = Dataset(name="one", train=train, test=test, num_classes=4, input_shape=(5,))
    return permuted(data, experiences=2, seed=0)


def test_a_stream_longer_than_the_horizon_is_refused(learner_of, stream):
    with pytest.raises(
        ConfigError,
        match=r"privacy.horizon = 3 is not allowed; allowed: at least 4, the number of experiences",
    ):
        learner_of(stream, privacy=Privacy(epsilon=3, horizon=3, seed=0))


def test_a_run_accepts_new_experiences_within_the_horizon(learner_of, stream, tmp_path):
    """The folder is the same and the stream grew: old charges stay and the grant of the whole
    horizon holds.
    """
    privacy = Privacy(epsilon=3, horizon=4, seed=0)
    early = replace(stream, experiences=stream.experiences[:2])
    first = learner_of(early, Replay(memory_size=6), privacy=privacy, folder=tmp_path)
    first.fit(early)
    entries = len(first.private_sum.ledger.entries)
    second = learner_of(stream, Replay(memory_size=6), privacy=privacy, folder=tmp_path)
    assert second.private_sum.noise_multiplier == first.private_sum.noise_multiplier
    second.fit(stream)
    assert second.private_sum.ledger.entries[:entries] == first.private_sum.ledger.entries
    assert len(second.private_sum.ledger.entries) > entries and max(spent(second).values()) <= 3


# --------------------------------------------------------------------------- budgets by experience


def test_experiences_have_own_budgets_if_records_are_used_once(learner_of, stream):
    stream = replace(stream, experiences=stream.experiences[:2])
    targets = (2.0, 4.0)
    learner = learner_of(stream, EWC(strength=1.0), privacy=Privacy(epsilon=targets, seed=0))
    learner.fit(stream)
    assert list(spent(learner).values()) == pytest.approx(targets, rel=0.01)
    assert all(
        value <= target for value, target in zip(spent(learner).values(), targets, strict=True)
    )
    noise = [
        e.noise_multiplier for e in learner.private_sum.ledger.entries if e.purpose == "gradient"
    ]
    assert noise == sorted(noise, reverse=True) == list(learner.private_sum.schedule.noise)


@pytest.mark.parametrize("strategy", [Replay(memory_size=4), Joint()])
def test_budgets_per_experience_are_refused_if_records_recur(learner_of, stream, strategy):
    with pytest.raises(
        ConfigError,
        match=f"one number for all, because {strategy.name} on split-blobs uses records again",
    ):
        learner_of(stream, strategy, privacy=Privacy(epsilon=(1, 1, 1, 1), seed=0))


def test_the_number_of_budgets_must_equal_the_experiences(learner_of, stream):
    with pytest.raises(ConfigError, match="4 numbers, one per experience"):
        learner_of(stream, privacy=Privacy(epsilon=(1.0, 2.0), seed=0))
    for other in ({"noise_multiplier": 1.0}, {"horizon": 4}):
        with pytest.raises(ConfigError, match=r"privacy.epsilon"):
            Privacy(epsilon=(1.0, 2.0), **other)
    with pytest.raises(ConfigError, match=r"privacy.epsilon = 0 is not allowed"):
        Privacy(epsilon=(1.0, 0))


# --------------------------------------------------------------------------- a cap, and who leaves


def capped(stream, learner_of, strategy, cap, **changes):
    return learner_of(
        stream, strategy, privacy=Privacy(noise_multiplier=2.0, epsilon=cap, seed=0), **changes
    )


@pytest.mark.parametrize("strategy", [Replay(memory_size=6), Joint()])
def test_partitions_over_the_epsilon_cap_leave_all_pools(learner_of, stream, strategy):
    free = learner_of(stream, strategy, privacy=Privacy(noise_multiplier=2.0, seed=0))
    free.fit(stream)
    assert spent(free)["experience-0"] > 1.02 * spent(free)["experience-1"]
    cap = (spent(free)["experience-0"] + spent(free)["experience-1"]) / 2
    seen: dict[int, set[int]] = {}

    def watch(point, learner):
        if point == "step.done":
            here = seen.setdefault(learner.position.experience, set())
            here |= set(learner.session.held.rows.tasks.tolist())

    learner = capped(stream, learner_of, strategy, cap, callbacks=[watch])
    learner.fit(stream)
    left = learner.private_sum.schedule.excluded
    assert left[0] == frozenset() and "experience-0" in left[3] and "experience-3" not in left[3]
    assert all(earlier <= later for earlier, later in pairwise(left))
    assert 0 not in seen[3] and 3 in seen[3] and 0 in seen[1] | {0}
    assert max(spent(learner).values()) <= cap
    touched = {i: set() for i in range(4)}
    for number, entry in enumerate(
        e for e in learner.private_sum.ledger.entries if e.purpose == "gradient"
    ):
        touched[number] |= entry.scope.keys()
    assert all(touched[i].isdisjoint(left[i]) for i in range(4))


def test_unaffordable_new_records_are_refused_before_any_noise(learner_of, stream):
    trace = []
    with pytest.raises(
        BudgetError,
        match=r"the records of experience 0 would exceed epsilon 0.01 .* larger",
    ):
        capped(stream, learner_of, Naive(), 0.01, callbacks=[lambda point, _: trace.append(point)])
    assert "noise.drawn" not in trace


def test_a_cap_above_the_spent_epsilon_changes_nothing(learner_of, stream):
    ends = []
    for cap in (None, 100.0):
        privacy = Privacy(noise_multiplier=2.0, epsilon=cap, seed=0)
        learner = learner_of(stream, Replay(memory_size=6), privacy=privacy)
        learner.fit(stream)
        ends.append(learner.model.state_dict())
        assert learner.private_sum.schedule.excluded in ((), (frozenset(),) * 4)
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


# --------------------------------------------------------------------------- spent elsewhere


def test_charges_given_as_spent_are_counted_and_written_once(learner_of, stream, tmp_path):
    before = (Charge(0.01, 1.1, 500), Charge(1.0, 20.0, 1))
    privacy = Privacy(epsilon=3, spent=before, seed=0)
    fresh = learner_of(stream, EWC(strength=1.0), privacy=replace(privacy, spent=()))
    learner = learner_of(stream, EWC(strength=1.0), privacy=privacy, folder=tmp_path)
    assert learner.private_sum.noise_multiplier > fresh.private_sum.noise_multiplier
    learner.fit(stream)
    assert all(2.9 < value <= 3 for value in spent(learner).values())
    again = learner_of(stream, EWC(strength=1.0), privacy=privacy, folder=tmp_path)
    old = [e for e in again.private_sum.ledger.entries if e.purpose == "spent elsewhere"]
    assert len(old) == 2 * len(stream)
    plan = planned(again.training, Schedule(noise=(again.private_sum.noise_multiplier,)))
    for partition, history in plan.items():
        assert spent(again)[partition] == pytest.approx(epsilon(history, delta=DELTA))


def test_equal_charges_given_as_spent_are_each_counted(learner_of, stream):
    one = Charge(0.01, 1.1, 500)
    once, twice = (
        learner_of(stream, privacy=Privacy(noise_multiplier=9.0, spent=s, seed=0))
        for s in ((one,), (one, one))
    )
    assert max(spent(once).values()) == pytest.approx(epsilon([one], delta=DELTA))
    assert max(spent(twice).values()) == pytest.approx(epsilon([one, one], delta=DELTA))


def test_the_budget_of_an_experience_holds_if_a_run_is_extended(learner_of, stream, tmp_path):
    """With another plan in the same folder, charges of the first plan count against each
    experience's budget.
    """
    stream = replace(stream, experiences=stream.experiences[:2])
    privacy = Privacy(epsilon=(1.0, 8.0), seed=0)
    first = learner_of(stream, privacy=privacy, folder=tmp_path)
    first.begin(0)
    first.train(first.training.block(0, 0, 1))
    first.close()
    with pytest.raises(
        BudgetError, match=r"'experience-0' would reach epsilon 1\.\d+ .* above the 1 granted"
    ):
        learner_of(stream, privacy=privacy, folder=tmp_path, epochs=None, iterations=20)


def test_a_budget_used_up_by_spent_charges_is_refused(learner_of, stream):
    with pytest.raises(BudgetError, match="the charges with fixed noise already cost more"):
        learner_of(stream, privacy=Privacy(epsilon=1, spent=(Charge(1.0, 0.5, 10),), seed=0))


# --------------------------------------------------------------------------- raw diagnostics


def test_callbacks_of_private_runs_get_no_unreleased_values(learner_of, stream):
    learner = learner_of(
        stream, Replay(memory_size=4), privacy=Privacy(noise_multiplier=1.0, seed=0)
    )
    learner.fit(stream)
    for what in ("diagnostics", "stored"):
        with pytest.raises(PrivacyError, match="has no noise, so it may not be read"):
            getattr(learner.curator, what)
    assert learner.curator.signal_to_noise > -1


@pytest.mark.parametrize("budget", [{"noise_multiplier": 1.0}, {"epsilon": 3}])
def test_raw_diagnostics_are_shown_and_make_epsilon_infinite(learner_of, stream, budget):
    seen = []

    def watch(point, learner):
        if point == "step.gradient":
            seen.append((learner.curator.diagnostics, learner.curator.signal_to_noise))

    learner = learner_of(
        stream,
        privacy=Privacy(**budget, diagnostics="raw", clip_norm=0.5, seed=0),
        callbacks=[watch],
        batch_size=6,
    )
    learner.fit(stream)
    assert len({shown.rows for shown, _ in seen}) > 2 and all(
        0 <= shown.clipped <= 1 for shown, _ in seen
    )
    assert sum(shown.clipped for shown, _ in seen) > 0 and all(
        float(shown.loss) >= 0 for shown, _ in seen
    )
    ledger = learner.private_sum.ledger
    assert ledger.epsilon(delta=DELTA) == float("inf") and "infinite" in str(
        ledger.statement(DELTA)
    )
    assert {e.mechanism for e in ledger.entries if e.purpose == "diagnostics"} == {"none"}


def test_raw_diagnostics_do_not_change_the_model(learner_of, stream):
    ends = []
    for diagnostics in ("released", "raw"):
        learner = learner_of(
            stream, privacy=Privacy(noise_multiplier=1.0, diagnostics=diagnostics, seed=0)
        )
        learner.fit(stream)
        ends.append(learner.model.state_dict())
    assert all(torch.allclose(value, ends[1][name], atol=1e-6) for name, value in ends[0].items())


def test_callbacks_get_exact_values_without_privacy(learner_of, stream):
    learner = learner_of(stream, Replay(memory_size=4))
    learner.fit(stream)
    assert learner.curator.diagnostics.rows > 0 and learner.curator.stored == 4
    assert learner.curator.diagnostics.clipped == 0 and learner.curator.signal_to_noise == float(
        "inf"
    )
