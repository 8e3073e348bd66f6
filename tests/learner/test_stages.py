"""Streams of pieces: evaluation by stage, on the stage's test records, once each."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from helpers.learners import SIMULATED, bits, same_bits
from perdure.data import Experience, online
from perdure.errors import ConfigError
from perdure.metrics import accuracy, forgetting
from perdure.strategies import Naive, Replay

CHUNK = 5
"""Records of a piece: five pieces an experience of 24."""


@pytest.fixture
def parents(toy_stream):
    return toy_stream()


@pytest.fixture
def pieces(parents):
    return online(parents, chunk=CHUNK)


def by_hand(learner, parents):
    """Return the accuracies on the test records of every stage at the present parameters."""
    after = learner.position.experience - 1
    return [
        accuracy(learner.predictor(after, after=after), e.test.inputs, e.test.labels, 2048)
        for e in parents
    ]


def test_a_piece_is_evaluated_on_the_test_records_of_its_stage(learner_of, parents, pieces):
    ends = []

    def at_ends_of_parents(point, learner):
        if point == "experience.end" and learner.position.experience in (5, 10):
            ends.append(by_hand(learner, parents))

    learner = learner_of(callbacks=[at_ends_of_parents], iterations=8)
    matrix = learner.fit(pieces)
    assert len(pieces) == 10 and matrix.tolist() == ends == learner.matrix
    assert forgetting(matrix) == ends[0][0] - ends[1][0] > 20


def test_every_test_record_is_predicted_once_per_stage(learner_of, parents, pieces):
    predicted = []

    class Counting(Naive):
        def predict(self, forward, inputs, context, state):
            predicted.append(len(inputs))
            return super().predict(forward, inputs, context, state)

    learner_of(Counting()).fit(pieces)
    assert predicted == [len(each.test) for each in parents] * len(parents)


def test_evaluations_within_a_stage_are_not_in_the_matrix(learner_of, parents, pieces):
    seen = []

    def listen(point, learner):
        if point == "evaluated":
            seen.append((learner.position.experience - 1, by_hand(learner, parents)))

    learner = learner_of(evaluate_every=2, callbacks=[listen])
    matrix = learner.fit(pieces)
    assert [index for index, _ in seen] == [1, 3, 4, 6, 8, 9]
    assert learner.progress == [row for row in seen if row[0] not in (4, 9)]
    assert matrix.tolist() == [row for index, row in seen if index in (4, 9)]
    plain = learner_of()
    assert plain.fit(pieces).equal(matrix) and plain.progress == []


@pytest.mark.parametrize(
    ("options", "saved"),
    [({}, 4), ({"evaluate_every": 2}, 12), ({"blocks": 2}, 30), ({"privacy": SIMULATED}, 20)],
)
def test_pieces_have_checkpoints_only_at_evaluations(
    learner_of, parents, pieces, tmp_path, options, saved
):
    """Each evaluation saves twice: before the end of a piece and after it."""
    points = Counter()
    stream = pieces
    if "privacy" in options:
        declared = (replace(each, train=each.train.declared(24)) for each in parents)
        stream = online(replace(parents, experiences=tuple(declared)), chunk=CHUNK, exact=False)
    learner = learner_of(
        folder=tmp_path, callbacks=[lambda point, _: points.update([point])], **options
    )
    learner.fit(stream)
    assert points["checkpoint.end"] == saved


def stopping(point, count):
    left = [count]

    def stop(now, _):
        left[0] -= now == point
        if left[0] == 0:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("count", [1, 4, 7, 10])
def test_a_stopped_run_on_pieces_resumes_bit_identically(learner_of, pieces, tmp_path, count):
    strategy = Replay(memory_size=8, selection="reservoir", update="step")
    whole = learner_of(strategy, evaluate_every=2)
    expected = whole.fit(pieces)
    with pytest.raises(KeyboardInterrupt):
        stopped = stopping("experience.end", count)
        learner_of(strategy, evaluate_every=2, folder=tmp_path, callbacks=[stopped]).fit(pieces)
    again = learner_of(strategy, evaluate_every=2, folder=tmp_path)
    assert again.fit(pieces).equal(expected) and again.progress == whole.progress
    assert same_bits(bits(again.model.state_dict()), bits(whole.model.state_dict()))


def test_more_pieces_of_the_last_stage_evaluate_the_stage_again(learner_of, pieces, tmp_path):
    early = replace(pieces, experiences=pieces.experiences[:8])
    first = learner_of(folder=tmp_path).fit(early)
    learner = learner_of(folder=tmp_path)
    assert first.shape == (2, 2) and learner.fit(pieces).shape == (2, 2)
    assert learner.position.experience == 10


def test_a_stage_is_predicted_with_its_latest_piece(pieces):
    first, second = pieces.stages
    assert (first.first, first.last, second.first, second.last) == (0, 4, 5, 9)
    assert [first.latest(after) for after in (0, 3, 4, 9)] == [0, 3, 4, 4]
    assert [second.latest(after) for after in (0, 5, 7)] == [5, 5, 7]
    assert [pieces.stage_of(index).number for index in range(10)] == [0] * 5 + [1] * 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({3: {"stage": 7}}, "experience 4 goes back to stage 0"),
        ({2: {"test": "copy"}}, "experiences 0 to 4 are one stage and have different test records"),
    ],
)
def test_a_stream_with_invalid_stages_is_refused(pieces, changes, message):
    parts = list(pieces)
    for index, change in changes.items():
        if "test" in change:
            change = {"test": replace(parts[index].test)}
        parts[index] = replace(parts[index], **change)
    with pytest.raises(ConfigError, match=message):
        replace(pieces, experiences=tuple(parts))


# --------------------------------------------------------------------------- late test records


def without_test(stream, index):
    parts = list(stream)
    parts[index] = Experience(index=index, train=parts[index].train, classes=parts[index].classes)
    return replace(stream, experiences=tuple(parts))


def test_test_records_can_be_added_after_training(learner_of, parents, tmp_path):
    late = without_test(parents, 0)
    assert len(late[0].test) == 0 and late[0].test.inputs.shape[1:] == parents.input_shape
    matrix = learner_of(folder=tmp_path).fit(late)
    whole = learner_of().fit(parents)
    assert matrix[:, 0].isnan().all() and matrix[:, 1].equal(whole[:, 1])

    known = late.with_test(0, parents[0].test)
    again = learner_of(folder=tmp_path).fit(known)
    assert again[0].isnan().tolist() == [True, False] and again[1].equal(whole[1])
    assert learner_of(folder=tmp_path).fit(known).nan_to_num().equal(again.nan_to_num())


def test_test_records_can_come_with_a_later_experience(learner_of, parents, tmp_path):
    first = without_test(parents, 0)
    begun = replace(first, experiences=first.experiences[:1])
    assert learner_of(folder=tmp_path).fit(begun).isnan().all()
    grown = learner_of(folder=tmp_path).fit(parents)
    assert grown[1].equal(learner_of().fit(parents)[1]) and grown[0].isnan().all()


def test_with_test_refuses_an_unknown_stage(parents, pieces):
    with pytest.raises(ConfigError, match="stage = 2 is not allowed; allowed: 0 to 1"):
        pieces.with_test(2, parents[0].test)
    given = pieces.with_test(1, parents[1].test.take(torch.arange(3)))
    assert [len(each.test) for each in given] == [20] * 5 + [3] * 5
    assert len(given.stages) == 2
