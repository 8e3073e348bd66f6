"""A folder belongs to one learner at a time, until the learner closes it."""

import pytest

from helpers.learners import SIMULATED
from perdure.errors import LedgerError, RunError
from perdure.strategies import Naive

BOTH = pytest.mark.parametrize("privacy", [None, SIMULATED], ids=["plain", "private"])


@pytest.fixture
def prepared(learner_of, toy_stream, tmp_path):
    def make(privacy, **changes):
        learner = learner_of(Naive(), privacy=privacy, folder=tmp_path, **changes)
        learner.prepare(toy_stream())
        return learner

    return make


@BOTH
def test_a_learner_folder_is_refused_to_a_second_learner(prepared, privacy):
    first = prepared(privacy)
    with pytest.raises(RunError, match="is in use by another process or learner"):
        prepared(privacy)
    first.close()
    prepared(privacy)


@BOTH
def test_a_deleted_learner_releases_its_folder(prepared, privacy):
    learner = prepared(privacy)
    del learner
    prepared(privacy)


@BOTH
def test_fit_releases_the_folder_even_after_an_error(
    learner_of, toy_stream, tmp_path, prepared, privacy
):
    def stop(point, learner):
        if point == "step.done":
            raise KeyError

    stopped = learner_of(privacy=privacy, folder=tmp_path, callbacks=[stop])
    with pytest.raises(KeyError):
        stopped.fit(toy_stream())
    whole = learner_of(privacy=privacy, folder=tmp_path)
    whole.fit(toy_stream())
    prepared(privacy)
    assert stopped.session and whole.session  # both are still there


def test_a_learner_can_be_prepared_again_in_its_own_folder(prepared, toy_stream):
    learner = prepared(SIMULATED)
    learner.prepare(toy_stream())
    assert learner.session.lock.held


def test_a_refused_session_releases_its_folder(prepared):
    with pytest.raises(LedgerError, match=r"was made with .*owner"):
        prepared(SIMULATED).close() or prepared(SIMULATED, owner="other")
    prepared(SIMULATED)


def test_only_the_learner_that_holds_the_folder_draws_noise(prepared):
    """Two learners once drew noise for one entry unnoticed, because the second one did not
    write.
    """
    first = prepared(SIMULATED)
    first.begin(0)
    first.close()
    second = prepared(SIMULATED)
    second.begin(0)
    with pytest.raises(RunError, match="in use"):
        first.train(range(2))
    second.train(range(2))
    second.close()
    with pytest.raises(LedgerError, match="another process or learner wrote to this ledger"):
        first.train(range(2))


def test_reserved_steps_are_refused_after_the_learner_is_closed(prepared):
    learner = prepared(SIMULATED)
    learner.begin(0)
    learner.session.reserve(range(2), learner.noise_digest())
    learner.close()
    with pytest.raises(Exception, match="was not charged to the ledger"):
        learner.session.sample(0)
