"""The history of a trained model stays with it in every new learner, folder or copy."""

import copy
from dataclasses import replace
from inspect import signature

import pytest
import torch
from torch import nn

from helpers.learners import SIMULATED
from perdure.data import (
    dirichlet,
    from_arrays,
    from_folder,
    from_huggingface,
    from_pandas,
    from_tokens,
    from_torch,
    iid,
)
from perdure.data.scenarios import permuted, split
from perdure.data.scenarios.places import NAMELESS
from perdure.errors import ConfigError, LedgerError, PrivacyError
from perdure.learner.model_history import trainings_of
from perdure.privacy.accounting.calibration import epsilon
from perdure.privacy.accounting.charges import Charge
from perdure.privacy.settings import Privacy
from perdure.strategies import EWC, Naive

DELTA = 1e-5


@pytest.fixture
def trained(learner_of, toy_stream):
    """Return a learner that was trained without a folder."""

    def make(privacy=SIMULATED, **changes):
        learner = learner_of(privacy=privacy, **changes)
        learner.fit(toy_stream())
        return learner

    return make


def leave_checkpoint(learner_of, stream, options):
    """Stop another run after its first experience, and leave its checkpoint in the folder."""
    learner = learner_of(**options)
    learner.prepare(stream)
    learner.begin(0)
    learner.train(range(4))
    learner.finish()
    learner.save()
    learner.close()


def spent(learner):
    return learner.private_sum.ledger.epsilon(delta=DELTA)


@pytest.mark.parametrize("first", [None, SIMULATED], ids=["plain", "private"])
@pytest.mark.parametrize("then", [None, SIMULATED], ids=["to plain", "to private"])
def test_a_trained_model_is_refused_without_warm_start(
    trained, learner_of, toy_stream, first, then
):
    model = trained(first).model
    with pytest.raises(ConfigError, match=r"trained already .* allowed: .*warm_start=True"):
        learner_of(model=model, privacy=then).fit(toy_stream())


def test_a_second_fit_is_refused_without_warm_start(trained, toy_stream):
    learner = trained(None)
    with pytest.raises(ConfigError, match="warm_start=True"):
        learner.fit(toy_stream())


@pytest.mark.parametrize("how", ["itself", "copy", "part"])
def test_a_warm_start_charges_the_earlier_cost(trained, learner_of, toy_stream, tmp_path, how):
    first = trained()
    alone = spent(first)
    given = {
        "itself": lambda: first.model,
        "copy": lambda: copy.deepcopy(first.model),
        "part": lambda: nn.Sequential(first.model, nn.Linear(4, 4)),
    }[how]()
    again = learner_of(model=given, privacy=SIMULATED, warm_start=True, folder=tmp_path)
    again.fit(toy_stream())
    twice = [*first.private_sum.ledger.charges("experience-0")] * 2
    from perdure.privacy.accounting.calibration import epsilon

    assert spent(again) == pytest.approx(epsilon(twice, delta=DELTA), rel=1e-6)
    assert spent(again) > 1.2 * alone
    assert "training before this ledger counted" in str(again.private_sum.ledger.statement(DELTA))


def test_loaded_weights_have_no_history_in_the_statement(
    trained, learner_of, toy_stream, toy_model
):
    first = trained()
    bare = toy_model(toy_stream())
    bare.load_state_dict(first.model.state_dict())
    learner = learner_of(model=bare, privacy=SIMULATED)
    learner.fit(toy_stream())
    assert spent(learner) == pytest.approx(spent(first))
    statement = learner.private_sum.ledger.statement(DELTA)
    assert "training before this ledger not counted" in str(statement)


def test_a_third_learner_carries_the_charges_of_both_others(trained, learner_of, toy_stream):
    first = trained()
    learners = [first]
    for _ in range(2):
        model = learners[-1].model
        learners.append(learner_of(model=model, privacy=SIMULATED, warm_start=True))
        learners[-1].fit(toy_stream())
    steps = [
        sum(charge.steps for charge in each.private_sum.ledger.charges("experience-0"))
        for each in learners
    ]
    assert steps == [steps[0], 2 * steps[0], 3 * steps[0]]


@pytest.mark.deep(reason="full replay: calibrates a whole stream three times")
def test_a_privacy_budget_includes_charges_of_a_warm_start(trained, learner_of, toy_stream):
    first = trained()
    target = replace(SIMULATED, noise_multiplier=None, epsilon=2 * spent(first), delta=DELTA)
    fresh = learner_of(privacy=target)
    fresh.fit(toy_stream())
    again = learner_of(model=first.model, privacy=target, warm_start=True)
    again.fit(toy_stream())
    assert spent(again) <= 2 * spent(first)
    assert again.private_sum.noise_multiplier > fresh.private_sum.noise_multiplier


def test_a_resumed_warm_start_has_the_same_earlier_charges(
    trained, learner_of, toy_stream, tmp_path
):
    """In another process the weights have no history, and the ledger holds the earlier charges."""
    first = trained()
    start = first.model.state_dict()
    start = {name: value.clone() for name, value in start.items()}
    target = replace(SIMULATED, noise_multiplier=None, epsilon=2 * spent(first), delta=DELTA)
    options = {"privacy": target, "warm_start": True, "folder": tmp_path}

    def stop(point, learner):
        if point == "experience.begin" and learner.position.experience == 1:
            raise KeyError

    with pytest.raises(KeyError):
        learner_of(model=first.model, callbacks=[stop], **options).fit(toy_stream())
    bare = copy.deepcopy(first.model)
    bare.load_state_dict(start)
    for part in bare.modules():
        vars(part).pop("_perdure_training", None)
    again = learner_of(model=bare, **options)
    again.fit(toy_stream())
    own = again.private_sum.ledger
    assert spent(first) < spent(again) <= 2 * spent(first)
    assert sum(entry.purpose.startswith("spent before") for entry in own.entries) == 2


def test_renamed_partitions_get_the_largest_earlier_cost(trained, learner_of, toy_data):
    first = trained()
    stream = permuted(toy_data, experiences=2)
    again = learner_of(model=first.model, stream=stream, privacy=SIMULATED, warm_start=True)
    again.fit(stream)
    ledger = again.private_sum.ledger
    names = [experience.train.partition for experience in stream]
    assert not set(names) & set(first.private_sum.ledger.partitions)
    for name in names:
        assert ledger.epsilon([name], delta=DELTA) > spent(first)


def test_a_partition_with_another_declared_size_is_refused(trained, learner_of, toy_stream):
    model = trained().model
    stream = toy_stream()
    first = stream[0]
    other = replace(first, train=replace(first.train, declared_size=20))
    stream = replace(stream, experiences=(other, stream[1]))
    with pytest.raises(LedgerError, match="was declared with 24 records, now with 20"):
        learner_of(model=model, privacy=SIMULATED, warm_start=True).prepare(stream)


# ---------------------------------------------------------------- names are not records


def uneven(data, **changes):
    """Return two experiences, the first sampled at 8 / 24 and the second at 8 / 12."""
    return split(data, scenario="class", experiences=2, declared_size=[24, 12], **changes)


def carried(learner, partition):
    entries = learner.private_sum.ledger.entries
    mine = [e for e in entries if partition in e.scope and e.purpose.startswith("spent before")]
    return {(e.scope[partition], e.steps) for e in mine}


def by_hand(stream):
    """Return the same stream without a rule for the place of its records."""
    experiences = (replace(e, train=replace(e.train, placed_by="")) for e in stream)
    return replace(stream, experiences=tuple(experiences))


def begun_again(learner_of, first, stream, **changes):
    options = {"privacy": SIMULATED, "warm_start": True} | changes
    again = learner_of(model=first.model, stream=stream, **options)
    again.prepare(stream)
    return again


RARE, OFTEN = (8 / 24, 4), (8 / 12, 4)


def test_an_equal_split_rule_keeps_the_charges_of_partitions(learner_of, toy_data):
    first = learner_of(privacy=SIMULATED)
    first.fit(uneven(toy_data))
    again = begun_again(learner_of, first, uneven(toy_data))
    assert again.private_sum.ledger.partitions == ("experience-0", "experience-1")
    assert carried(again, "experience-0") == {RARE}
    assert carried(again, "experience-1") == {OFTEN}


def test_partitions_of_an_unnamed_data_set_get_the_largest_cost(learner_of, toy_data):
    """The data set may hold the same records with other targets, and so in other partitions."""
    nameless = replace(toy_data, name="data")  # the default of from_arrays and its kin
    first = learner_of(privacy=SIMULATED)
    first.fit(uneven(nameless))
    again = begun_again(learner_of, first, uneven(nameless))
    assert carried(again, "experience-0") == carried(again, "experience-1") == {OFTEN}


def test_functions_that_make_data_sets_give_no_name_by_default():
    for make in (from_arrays, from_folder, from_huggingface, from_pandas, from_tokens, from_torch):
        assert signature(make).parameters["name"].default == NAMELESS


@pytest.mark.parametrize(
    "other",
    [
        lambda data: uneven(data, class_order=[2, 3, 0, 1]),
        lambda data: uneven(replace(data, name="another table")),
        lambda data: by_hand(uneven(data)),
    ],
    ids=["class order", "data set", "by hand"],
)
def test_partitions_of_another_split_rule_get_the_largest_cost(learner_of, toy_data, other):
    """Records of the second experience may now be in the first one, under any name."""
    first = learner_of(privacy=SIMULATED)
    first.fit(uneven(toy_data))
    again = learner_of(model=first.model, privacy=SIMULATED, warm_start=True)
    again.fit(other(toy_data))
    ledger = again.private_sum.ledger
    assert carried(again, "experience-0") == carried(again, "experience-1") == {OFTEN}
    old = first.private_sum.ledger
    own = [e for e in ledger.entries if not e.purpose.startswith("spent before")]
    for before in old.partitions:
        for name in ("experience-0", "experience-1"):
            met = [*old.charges(before), *(e.charge([name]) for e in own if name in e.scope)]
            assert ledger.epsilon([name], delta=DELTA) >= epsilon(met, delta=DELTA) - 1e-9
    earlier = [name for name in ledger.partitions if name.endswith(", earlier")]
    assert earlier == ["experience-0, earlier", "experience-1, earlier"]
    assert [carried(again, name) for name in earlier] == [{RARE}, {OFTEN}]


def test_records_of_a_third_split_rule_are_charged_separately(learner_of, toy_data):
    learner = learner_of(privacy=SIMULATED)
    learner.fit(uneven(toy_data))
    for order in ([2, 3, 0, 1], [0, 2, 1, 3]):
        stream = uneven(toy_data, class_order=order)
        learner = begun_again(learner_of, learner, stream)
        learner.fit(stream)
    ledger = learner.private_sum.ledger
    assert [name.count(", earlier") for name in sorted(ledger.partitions)] == [0, 1, 2] * 2
    worst = max(sum(steps for _, steps in carried(learner, name)) for name in ledger.partitions)
    assert carried(learner, "experience-0") == {(8 / 12, 8)} and worst == 8


def test_two_charge_histories_count_if_neither_covers_the_other(learner_of, toy_data):
    """Epsilon does not show which of two histories is worse after more charges are added."""
    stream = uneven(toy_data)
    first = learner_of(iterations=None, epochs=1, privacy=SIMULATED)
    first.fit(stream)
    again = begun_again(learner_of, first, by_hand(stream))
    assert carried(again, "experience-0") == {(8 / 24, 3), (8 / 12, 2)}


def test_experiences_added_after_warm_start_get_the_largest_cost(learner_of, toy_data, tmp_path):
    first = learner_of(privacy=SIMULATED)
    first.fit(uneven(toy_data))
    whole = split(toy_data, scenario="class", experiences=4, declared_size=[12, 12, 12, 12])
    target = replace(SIMULATED, noise_multiplier=None, epsilon=4 * spent(first), horizon=4)

    def run(model, count, privacy):
        stream = replace(whole, experiences=whole.experiences[:count])
        options = {"stream": stream, "privacy": privacy, "warm_start": True}
        learner = learner_of(model=model, folder=tmp_path / str(privacy.horizon), **options)
        learner.fit(stream)
        return learner

    for privacy in (SIMULATED, target):
        run(copy.deepcopy(first.model), 2, privacy)
        bare = copy.deepcopy(first.model)
        for part in bare.modules():
            vars(part).pop("_perdure_training", None)
        again = run(bare, 4, privacy)
        for name in ("experience-2", "experience-3"):
            assert carried(again, name) == {OFTEN}
        assert spent(again) <= 4 * spent(first)


def test_a_ledger_refuses_a_known_name_of_another_split_rule(learner_of, toy_data, tmp_path):
    learner = learner_of(privacy=SIMULATED, folder=tmp_path)
    learner.fit(uneven(toy_data))
    learner.close()
    other = learner_of(privacy=SIMULATED, folder=tmp_path)
    with pytest.raises(LedgerError, match="'experience-0' was made by another rule"):
        other.prepare(uneven(toy_data, class_order=[2, 3, 0, 1]))


def test_the_split_rule_of_a_client_depends_on_the_client_split(toy_data):
    stream = split(toy_data, scenario="class", experiences=2)

    def rules(streams):
        return [[e.train.placed_by for e in own] for own in streams]

    ways = [
        iid(stream, clients=2, exact=False),
        iid(stream, clients=3, exact=False),
        iid(stream, clients=2, exact=False, seed=1),
        iid(stream, clients=2, exact=False, declared_size=40),
        dirichlet(stream, clients=2, alpha=1.0, exact=False),
        dirichlet(stream, clients=2, alpha=2.0, exact=False),
        iid(uneven(toy_data), clients=2, exact=False),
    ]
    found = [rules(way)[0][0] for way in ways]
    assert len(set(found)) == len(found)
    assert rules(iid(stream, clients=2, exact=False)) == rules(ways[0])
    assert {
        rule for own in rules(iid(by_hand(stream), clients=2, exact=False)) for rule in own
    } == {""}


class Own(nn.Module):
    """A model with its own forward pass, whose independence of records is only tested."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 4)
        self.head = nn.Linear(4, 4)

    def features(self, x):
        return torch.tanh(self.body(x))

    def forward(self, x):
        return self.head(self.features(x))


def test_a_warm_start_states_the_weaker_independence(learner_of, toy_stream):
    model = Own()
    learner_of(model=model, privacy=SIMULATED).fit(toy_stream())
    alone = replace(SIMULATED, custom_forward="record-by-record")
    again = learner_of(model=model, privacy=alone, warm_start=True)
    again.fit(toy_stream())
    assert {entry.independence for entry in again.private_sum.ledger.entries} == {
        "tested",
        "by construction",
    }
    assert again.private_sum.ledger.statement(DELTA).independence == "tested"


def test_charges_given_as_spent_have_unknown_independence(learner_of, toy_stream):
    learner = learner_of(privacy=replace(SIMULATED, spent=(Charge(0.1, 1.0, 5),)))
    learner.prepare(toy_stream())
    assert learner.private_sum.ledger.statement(DELTA).independence == "not known"


def test_a_model_trained_without_ledger_cannot_become_private(trained, learner_of, toy_stream):
    model = trained(None).model
    with pytest.raises(PrivacyError, match="trained without privacy on experience-0, experience-1"):
        learner_of(model=model, privacy=SIMULATED, warm_start=True).prepare(toy_stream())
    learner_of(model=model, warm_start=True).fit(toy_stream())


def test_a_model_trained_with_simulated_noise_needs_a_simulation(
    trained, learner_of, toy_stream, tmp_path
):
    model = trained().model
    secret = Privacy(noise_multiplier=1.0)
    with pytest.raises(PrivacyError, match="simulated noise, which protects no record"):
        learner_of(model=model, privacy=secret, warm_start=True, folder=tmp_path).prepare(
            toy_stream()
        )


def test_a_model_in_two_learners_is_refused_at_the_second(learner_of, toy_stream):
    learners = [learner_of(privacy=SIMULATED)]
    learners.append(learner_of(model=learners[0].model, privacy=SIMULATED))
    for learner in learners:
        learner.prepare(toy_stream())
        learner.begin(0)
    learners[0].train(range(2))
    with pytest.raises(ConfigError, match="trained already"):
        learners[1].train(range(2))


def test_a_model_restored_from_a_checkpoint_keeps_its_history(learner_of, toy_stream, tmp_path):
    learner_of(EWC(strength=1.0), privacy=SIMULATED, folder=tmp_path).fit(toy_stream())
    again = learner_of(EWC(strength=1.0), privacy=SIMULATED, folder=tmp_path)
    again.prepare(toy_stream())
    assert trainings_of(again.model) == []
    again.resume()
    (training,) = trainings_of(again.model)
    assert training.entries == again.private_sum.ledger.entries
    again.close()
    other = learner_of(Naive(), model=again.model, privacy=SIMULATED, warm_start=True)
    other.fit(toy_stream())
    assert spent(other) > spent(again)


@pytest.mark.parametrize("warm_start", [False, True])
@pytest.mark.parametrize("first", [None, SIMULATED], ids=["plain", "private"])
def test_a_checkpoint_folder_does_not_hide_the_model_history(
    trained, learner_of, toy_stream, toy_model, tmp_path, first, warm_start
):
    """A checkpoint in the folder removes a history only if its weights replace those of the
    model.
    """
    options = {"privacy": SIMULATED, "folder": tmp_path}
    leave_checkpoint(learner_of, toy_stream(), options)
    model = trained(first).model
    model.load_state_dict(toy_model(toy_stream()).state_dict())  # as the run began: it may resume
    before = trainings_of(model)
    learner = learner_of(model=model, warm_start=warm_start, **options)
    learner.prepare(toy_stream())
    told = r"trained already .* allowed: resume\(\), which loads the checkpoint of"
    with pytest.raises(ConfigError, match=told):
        learner.begin(1)
    with pytest.raises(ConfigError, match=told):
        learner.session.reserve(range(2), "digest")
    assert trainings_of(model) == before
    spent_there = spent(learner)
    learner.fit(toy_stream())
    (training,) = trainings_of(model)
    assert training.entries == learner.private_sum.ledger.entries
    assert spent(learner) >= spent_there and not training.uncounted


def test_a_snapshot_of_another_run_does_not_hide_the_history(
    trained, learner_of, toy_stream, tmp_path
):
    options = {"privacy": SIMULATED, "folder": tmp_path}
    leave_checkpoint(learner_of, toy_stream(), options)
    other = trained(SIMULATED)
    learner = learner_of(model=other.model, **options)
    learner.prepare(toy_stream())
    with pytest.raises(ConfigError, match="trained already"):
        learner.restore(other.snapshot())


def test_an_untrained_model_may_start_in_a_checkpoint_folder(learner_of, toy_stream, tmp_path):
    options = {"privacy": SIMULATED, "folder": tmp_path}
    leave_checkpoint(learner_of, toy_stream(), options)
    learner = learner_of(**options)
    learner.prepare(toy_stream())
    learner.begin(0)
    learner.train(range(2))
    assert len(trainings_of(learner.model)) == 1


def test_a_model_gets_only_one_history_entry_per_run(learner_of, toy_stream):
    learner = learner_of()
    learner.prepare(toy_stream())
    learner.begin(0)
    learner.train(range(2))
    (mark,) = trainings_of(learner.model)
    learner.train(range(2, 4))
    learner.begin(0)
    assert trainings_of(learner.model)[0] is mark
    learner.model.head = copy.deepcopy(learner.model.head)  # carries a copy of the mark
    learner.train(range(4, 6))
    assert trainings_of(learner.model.head)[0] is trainings_of(learner.model.body)[0]


def test_the_history_of_a_model_is_not_in_its_weights(trained, toy_stream):
    model = trained().model
    assert trainings_of(model)
    assert not any("perdure" in name for name in model.state_dict())
    assert trainings_of(copy.deepcopy(model))[0].entries == trainings_of(model)[0].entries
    assert torch.equal(copy.deepcopy(model)(torch.zeros(1, 5)), model(torch.zeros(1, 5)))
