"""Records to label next, and pseudo-labels, on public pools."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from helpers.learners import SIMULATED
from helpers.toy_data import records
from perdure.data import Dataset, joint
from perdure.data.records import Spent
from perdure.errors import ConfigError, GuardError, PrivacyError
from perdure.learner import Learner, pseudo_labels, select_records
from perdure.models import mlp
from perdure.strategies import Naive


@pytest.fixture(scope="module")
def pool():
    return records(60, first_id=1000, partition="pool")


def trained(learnt=None, **options):
    data = Dataset(
        name="toy",
        train=records(80) if learnt is None else learnt,
        test=records(40, first_id=400, partition="toy-test"),
        num_classes=4,
        input_shape=(1, 4, 6),
    )
    learner = Learner(
        model=mlp(input_shape=(1, 4, 6), num_classes=4, hidden=(8,), seed=0, dropout=0.3),
        strategy=Naive(),
        optimizer=partial(torch.optim.SGD, lr=0.5),
        iterations=5,
        batch_size=16,
        show_progress=False,
        **options,
    )
    learner.fit(replace(joint(data), assigned_by_record=True))
    return learner


@pytest.fixture(scope="module")
def learner():
    return trained()


@pytest.fixture(scope="module")
def private():
    return trained(privacy=SIMULATED)


def places(pool, ids):
    return [pool.ids.tolist().index(each) for each in ids.tolist()]


def test_entropy_and_margin_take_the_most_uncertain(learner, pool):
    probabilities = learner.predict(pool.inputs).softmax(1)
    entropy = -(probabilities * probabilities.log()).sum(1)
    chosen = places(pool, select_records(learner, pool, 7, method="entropy"))
    assert chosen == entropy.argsort(descending=True)[:7].tolist()
    top = probabilities.sort(1, descending=True).values
    chosen = places(pool, select_records(learner, pool, 7, method="margin"))
    assert chosen == (top[:, 0] - top[:, 1]).argsort()[:7].tolist()


def test_coreset_covers_the_pool_as_the_greedy_algorithm(learner, pool):
    labelled = records(5, first_id=3000, partition="labelled")
    found = places(pool, select_records(learner, pool, 6, method="coreset", labelled=labelled))
    learner.model.eval()
    rows = [learner.model.features(each.inputs).detach() for each in (pool, labelled)]
    centres, expected = list(rows[1]), []
    for _ in range(6):
        gaps = [min(float((row - centre).norm()) for centre in centres) for row in rows[0]]
        expected.append(max(range(len(gaps)), key=gaps.__getitem__))
        centres.append(rows[0][expected[-1]])
    assert found == expected
    assert len(set(places(pool, select_records(learner, pool, 60, method="coreset")))) == 60


def test_bald_and_random_depend_on_the_seed_alone(learner, pool):
    state = torch.get_rng_state()
    modes = [part.training for part in learner.model.modules()]
    for method in ("bald", "random"):
        one, again, other = (
            select_records(learner, pool, 10, method=method, seed=seed).tolist()
            for seed in (0, 0, 1)
        )
        assert one == again and one != other and len(set(one)) == 10
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [part.training for part in learner.model.modules()]


def test_pseudo_labels_are_confident_predictions(learner, pool):
    probabilities = learner.predict(pool.inputs).softmax(1)
    threshold = float(probabilities.amax(1).median())
    found = pseudo_labels(learner, pool, threshold=threshold)
    sure = probabilities.amax(1) >= threshold
    assert found.ids.tolist() == pool.ids[sure].tolist()
    assert found.labels.tolist() == probabilities.argmax(1)[sure].tolist()
    labelled = records(5, first_id=3000, partition="labelled")
    both = pseudo_labels(learner, pool, threshold=threshold, labelled=labelled)
    assert both.partition == "labelled" and len(both) == 5 + len(found)
    assert torch.equal(both.labels[:5], labelled.labels)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"count": 0}, "allowed: 1 to 60, the records of the pool"),
        ({"count": 61}, "allowed: 1 to 60, the records of the pool"),
        ({"method": "best"}, "allowed: random, entropy, margin, bald or coreset"),
    ],
)
def test_a_selection_refuses_what_it_cannot_do(learner, pool, changes, words):
    with pytest.raises(ConfigError, match=words):
        select_records(learner, pool, **{"count": 3} | changes)


def test_bald_needs_dropout_and_labels_need_a_threshold(learner, pool):
    with pytest.raises(ConfigError, match="a number above 0 and at most 1"):
        pseudo_labels(learner, pool, threshold=0.0)
    with pytest.raises(ConfigError, match="allowed: records with other ids"):
        pseudo_labels(learner, pool, threshold=1e-9, labelled=pool)
    for part in learner.model.modules():
        if isinstance(part, torch.nn.Dropout):
            kept, part.p = part.p, 0.0
    with pytest.raises(ConfigError, match="allowed: a model with dropout"):
        select_records(learner, pool, 3, method="bald")
    for part in learner.model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = kept


def test_a_private_pool_is_refused(private, pool):
    for ask in (partial(select_records, count=3), pseudo_labels):
        with pytest.raises(PrivacyError, match="a query about the pool, which no ledger entry"):
            ask(private, pool=pool)
        with pytest.raises(PrivacyError, match="records of the pool are training records"):
            ask(private, pool=records(80), public=True)
    assert len(select_records(private, pool, 3, public=True)) == 3


def test_labels_of_a_plain_learner_are_refused_under_privacy(learner, pool):
    few = records(5, first_id=3000, partition="labelled")
    for labelled in (few, None):
        more = pseudo_labels(learner, pool, threshold=0.01, labelled=labelled)
        assert more.coupled_by == "pseudo_labels(...)"
    with pytest.raises(GuardError, match=r"are made by pseudo_labels\(\.\.\.\)"):
        trained(learnt=more, privacy=SIMULATED)


def test_pseudo_labels_keep_the_marks_of_both_parts(private, pool):
    few = records(5, first_id=3000, partition="labelled")
    release = Spent(entry="a", noise_multiplier=1.0, simulated=True)
    other = replace(release, entry="b")
    ask = partial(pseudo_labels, private, threshold=0.01, public=True)
    both = ask(
        pool=replace(pool, coupled_by="one", drawn_by_position=True, spent=(release, other)),
        labelled=replace(few, coupled_by="two", spent=(release,)),
    )
    assert both.coupled_by == "two and one" and both.drawn_by_position
    assert both.spent == (release, other)
    plain = ask(pool=pool, labelled=few)
    assert plain.coupled_by == "" and plain.spent == () and not plain.drawn_by_position
