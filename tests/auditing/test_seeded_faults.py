"""Faults that were planted, each caught by a tool, while the honest version passes.

- guard: refuses model, loss or strategy on synthetic records, before anything is charged;
- replay: a sum moves by more than was charged, or an output differs that no release explains;
- ledger: a draw that no entry pays for, or a ledger that is not the one that was written;
- canary: a lower bound on epsilon above what is claimed.
"""

from collections import Counter
from functools import partial

import pytest
import torch

from helpers.faulty_engines import RECORD, REPLAY, UNPAID, twins
from helpers.faulty_models import GUARD, Fault
from helpers.replays import maker, settings
from perdure import Learner, Privacy
from perdure.auditing.canaries import audit
from perdure.errors import GuardError, LedgerError, PrivacyError
from perdure.learner.inspection import Verdict
from perdure.models.classifiers import mlp
from perdure.privacy.noise.key import NoiseKey
from perdure.privacy.private_sum import PrivateSum
from perdure.strategies.naive import Naive
from perdure.testing.replay import replay


@pytest.fixture
def parts(toy_stream, toy_model):
    """Return the stream of a fault, and a function that makes learners with or without the
    fault.
    """

    def build(fault, *, honest):
        stream = fault.stream or toy_stream
        if fault.stream is twins:
            stream = toy_stream if honest else partial(twins, toy_stream)
        model = (fault.honest_model if honest else fault.model) or toy_model
        strategy = fault.honest_strategy if honest and fault.honest_strategy else fault.strategy
        changes = {} if honest else fault.changes
        torch.manual_seed(0)
        make = maker(stream(), strategy, model, privacy=settings(**fault.privacy), **changes)

        def made(number):
            torch.manual_seed(0)
            learner = make(number)
            if not honest:
                learner.make_private_sum = fault.kind
            return learner

        return stream(), made

    return build


def replayed(fault, stream, make, *, honest):
    neighbours = [fault.neighbour(stream)] if fault.neighbour and not honest else None
    return replay(
        make,
        [stream],
        neighbours,
        record=RECORD,
        outputs=fault.honest_outputs if honest else fault.outputs,
    )


def test_at_least_24_faults_are_planted_for_the_audits():
    tools = Counter(guard=len(GUARD), replay=len(REPLAY), ledger=len(UNPAID) + 3, canary=2)
    assert tools.total() >= 24
    assert not GUARD.keys() & REPLAY.keys() and not REPLAY.keys() & UNPAID.keys()


@pytest.mark.parametrize(("tool", "name"), [("guard", name) for name in GUARD])
def test_the_guard_finds_each_fault_planted_for_it(tool, name, parts, monkeypatch):
    stream, make = parts(GUARD[name], honest=False)
    with monkeypatch.context() as planted:
        GUARD[name].plant(planted)
        with pytest.raises(GuardError):
            make(0).prepare(stream)
    stream, make = parts(GUARD[name], honest=True)
    learner = make(0)
    learner.prepare(stream)
    assert learner.private_sum is not None


@pytest.mark.parametrize(("tool", "name"), [("replay", name) for name in REPLAY])
def test_replaying_without_one_record_finds_each_planted_fault(tool, name, parts, monkeypatch):
    fault = REPLAY[name]
    with monkeypatch.context() as planted:
        fault.plant(planted)
        found = replayed(fault, *parts(fault, honest=False), honest=False)
    assert found.largest > 1.05 or found.unexplained
    assert not found.holds
    assert replayed(fault, *parts(fault, honest=True), honest=True).holds


@pytest.mark.parametrize(("tool", "name"), [("replay", "coupling only above 20 rows")])
def test_replaying_without_the_guard_finds_planted_faults(tool, name, parts, monkeypatch):
    unguarded = Verdict(independence="tested", alone=False)
    monkeypatch.setattr("perdure.learner.guarded_party.inspect", lambda *args, **options: unguarded)
    again = "perdure.learner.inspected_path.InspectedPath.look_again"
    monkeypatch.setattr(again, lambda *args, **options: None)
    fault = GUARD[name]
    found = replayed(fault, *parts(fault, honest=False), honest=False)
    assert found.largest > 1.05
    assert replayed(fault, *parts(fault, honest=True), honest=True).holds


@pytest.mark.parametrize(("tool", "name"), [("ledger", name) for name in UNPAID])
def test_replaying_finds_noise_drawn_without_a_ledger_entry(tool, name, parts, monkeypatch):
    fault = UNPAID[name]
    with monkeypatch.context() as planted:
        fault.plant(planted)
        found = replayed(fault, *parts(fault, honest=False), honest=False)
    assert found.unpaid and not found.holds
    assert replayed(fault, *parts(fault, honest=True), honest=True).holds


@pytest.mark.parametrize(
    ("tool", "name", "damage"),
    [
        ("ledger", "an edited ledger", lambda text: text.replace(b'"steps":3', b'"steps":2', 1)),
        ("ledger", "a shortened ledger", lambda text: text[: text[:-1].rindex(b"\n") + 1]),
    ],
)
def test_the_learner_refuses_a_damaged_ledger(tool, name, damage, parts, tmp_path):
    stream, make = parts(Fault(), honest=True)

    def learner():
        made = make(0)
        made.folder = tmp_path
        return made

    learner().fit(stream)
    learner().fit(stream)  # the honest one is read again
    file = tmp_path / "ledger.jsonl"
    before = file.read_bytes()
    file.write_bytes(damage(before))
    assert file.read_bytes() != before
    with pytest.raises(LedgerError):
        learner().fit(stream)


@pytest.mark.parametrize(("tool", "name"), [("ledger", "a step drawn without a reserve")])
def test_no_noise_is_drawn_for_a_step_without_a_ledger_charge(tool, name, parts):
    stream, make = parts(Fault(), honest=True)
    learner = make(0)
    learner.prepare(stream)
    learner.begin(0)
    session = learner.session
    session.reserve(range(1), learner.noise_digest())
    session.fill_gradients(session.sample(0))
    session.follow_step()
    with pytest.raises(PrivacyError, match="was not charged to the ledger"):
        session.fill_gradients(session.sample(1))


class HalfKey(NoiseKey):
    """A key that draws half the noise."""

    def add_noise(self, total, scale, **place):
        super().add_noise(total, scale / 2, **place)


class LoadedCoins(NoiseKey):
    """A key that puts every record into every step."""

    def uniform(self, n, **place):
        return super().uniform(n, **place) * 1e-3


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("tool", "name", "key"),
    [
        ("canary", "a key that draws half the noise", HalfKey),
        ("canary", "coins that ignore the rate", LoadedCoins),
    ],
)
def test_the_canary_audit_finds_each_planted_fault(tool, name, key, toy_stream, toy_model):
    """The lower bounds are ten standard errors above the claim; a correct audit is flagged once in
    10,000.
    """
    privacy = Privacy(noise_multiplier=2.4, delta=1e-5, sampling_rate=0.4, seed=0)

    def of(kind):
        learner = Learner(
            model=mlp(input_shape=(5,), num_classes=4, hidden=(6,), seed=3),
            strategy=Naive(),
            optimizer=partial(torch.optim.SGD, lr=0.5),
            iterations=25,
            privacy=privacy,
        )

        def make(**parts):
            return PrivateSum(**(parts | {"key": kind.from_seed(0, "client", 0)}))

        learner.make_private_sum = make
        return audit(learner, toy_stream(), canaries=1000, confidence=0.9999)

    assert of(key).flagged
    assert not of(NoiseKey).flagged
