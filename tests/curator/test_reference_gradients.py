"""Reference gradients: cost, members, order of charge and draw, and noise."""

from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch

from helpers.reference_gradients import BOTH, PRIVATE, flat, learner_of, loss_of, opened, reserved
from perdure.contract.plan import MemoryPlan, Plan
from perdure.errors import BudgetError, PrivacyError, StrategyError
from perdure.planning.budget import charges, planned
from perdure.planning.exposure import reference_exposures
from perdure.privacy.accounting.charges import Charge, merged
from perdure.privacy.settings import Privacy
from perdure.strategies import AGEM, GEM, Replay

# --------------------------------------------------------------------------- what they cost


def declared(stream, *sizes):
    parts = zip(stream, sizes, strict=True)
    return [replace(e, train=replace(e.train, declared_size=size)) for e, size in parts]


def test_reference_rates_come_from_declared_sizes(four):
    """Memory holds 200 of 400 earlier records: 50 of the first experience and 150 of the second."""
    stages = declared(four, 100, 300, 600, 12)[:3]
    plans = {
        use: Plan(memory=MemoryPlan(capacity=200, use=use, batch_size=20))
        for use in ("reference", "references")
    }
    (together,) = reference_exposures(stages, plans["reference"], batch_size=99).items()
    assert (
        together[0] == "reference" and together[1].pool_size == 200 and together[1].expected == 20
    )
    assert together[1].scope == {"experience-0": 0.1, "experience-1": 0.1}
    apart = reference_exposures(stages, plans["references"], batch_size=99)
    assert {name: each.scope for name, each in apart.items()} == {
        "reference 0": {"experience-0": 20 / 50},
        "reference 1": {"experience-1": 20 / 150},
    }
    assert [each.pool_size for each in apart.values()] == [50, 150]
    by_new = replace(plans["reference"], memory=replace(plans["reference"].memory, batch_size=None))
    assert reference_exposures(stages, by_new, batch_size=50)["reference"].rate == 0.25
    assert reference_exposures(stages, by_new, batch_size=500)["reference"].rate == 1.0


def test_rehearsal_and_first_experience_plan_no_reference(four):
    stages = four.experiences
    only = Plan(memory=MemoryPlan(capacity=9, use="reference"))
    assert (
        reference_exposures(stages[:1], only, batch_size=4)
        == {}
        == reference_exposures(stages, Plan(), batch_size=4)
    )
    for use in ("rehearsal", "pooled"):
        assert (
            reference_exposures(stages, Plan(memory=MemoryPlan(capacity=9, use=use)), batch_size=4)
            == {}
        )


def test_an_excluded_partition_is_in_no_reference_gradient(four):
    stages = declared(four, 100, 300, 600, 12)[:3]
    for use, names in (("reference", ["reference"]), ("references", ["reference 1"])):
        plan = Plan(memory=MemoryPlan(capacity=200, use=use, batch_size=15))
        found = reference_exposures(stages, plan, batch_size=4, excluded={"experience-0"})
        assert list(found) == names
        assert found[names[0]].scope == {"experience-1": 0.1} and found[names[0]].pool_size == 150
        assert (
            reference_exposures(
                stages, plan, batch_size=4, excluded={"experience-0", "experience-1"}
            )
            == {}
        )


@BOTH
@pytest.mark.parametrize("bands", [None, 2])
@pytest.mark.parametrize("which", ["four", "copies"])
def test_the_ledger_has_the_planned_reference_charges(request, toy_model, strategy, which, bands):
    stream = request.getfixturevalue(which)
    learner = learner_of(toy_model(stream), strategy, privacy=replace(PRIVATE, bands=bands))
    learner.fit(stream)
    ledger = learner.private_sum.ledger
    for partition, plan in planned(learner.training, learner.private_sum.schedule).items():
        assert merged(ledger.charges(partition)) == merged(plan)


@pytest.mark.deep(reason="full replay: calibrates and trains two strategies")
@BOTH
def test_a_calibrated_run_spends_almost_the_whole_budget(four, toy_model, strategy):
    learner = learner_of(toy_model(four), strategy, privacy=Privacy(epsilon=4, seed=0, delta=1e-5))
    learner.fit(four)
    assert 3.9 < learner.private_sum.ledger.epsilon(delta=1e-5) <= 4


def test_every_earlier_experience_is_charged_at_its_own_rate(four, toy_model):
    learner = learner_of(toy_model(four), GEM(memory_size=12, batch_size=2))
    learner.prepare(four)
    assert charges(learner.training, four.experiences[:3], 1.0) == {
        "experience-2": [Charge(4 / 12, 1.0, 4, "grid-gaussian")],
        "experience-0": [Charge(2 / 6, 1.0, 4, "grid-gaussian")],
        "experience-1": [Charge(2 / 6, 1.0, 4, "grid-gaussian")],
    }


@pytest.mark.parametrize(
    ("strategy", "beside"), [(AGEM(memory_size=12), [1, 1]), (GEM(memory_size=12), [1, 2])]
)
def test_charges_of_experiences_that_share_records_add_up(copies, toy_model, strategy, beside):
    """Permuted copies of one image are one record, charged for the gradients and for every
    reference gradient.
    """
    learner = learner_of(toy_model(copies), strategy)
    learner.fit(copies)
    (partition,) = learner.private_sum.ledger.partitions
    found = {
        c.sampling_rate: c.steps for c in merged(learner.private_sum.ledger.charges(partition))
    }
    assert found[4 / 48] == 3 * 4  # gradients
    others = sum(steps for rate, steps in found.items() if rate > 4 / 48)
    assert others == 4 * sum(beside)


# --------------------------------------------------------------------------- who is in them


def test_a_reference_is_the_mean_gradient_of_stored_rows(four, toy_model):
    learner = opened(
        learner_of(toy_model(four), GEM(memory_size=12, batch_size=6), privacy=None), four, 2
    )
    curator = learner.curator
    rows = learner.session.held.memory.rows
    learner.session.held.sample(0)
    for k in (0, 1):
        own = rows.take(rows.tasks == k)
        loss = loss_of(learner)(learner.session.forward, own).mean()
        expected = torch.autograd.grad(loss, list(learner.params.values()))
        mine = curator.reference(loss_of(learner), learner.params, of=k)
        torch.testing.assert_close(flat(mine), torch.cat([value.flatten() for value in expected]))
        assert len(own) == 6 and float(flat(mine).norm()) > 0.01


def test_reference_rows_equal_rows_drawn_from_one_experience(four, toy_model):
    """The expected rows are drawn from a copy of the experience's rows."""
    strategy = GEM(memory_size=12, batch_size=4)
    held = opened(learner_of(toy_model(four), strategy, privacy=None), four, 2).session.held
    stored = held.memory.rows
    found = []
    for step in range(3):
        held.sample(step)
        for k in (0, 1):
            copy = held.pool.stored_rows(stored.take(stored.tasks == k), f"reference {k}", step)
            assert torch.equal(held.reference_rows(k).ids, copy.ids)
        found.append(held.pool.positions_of(1))
    assert found[0] is found[1] is found[2] and len(found[0]) == 6


def test_an_epoch_of_reference_batches_visits_every_stored_row(four, toy_model):
    learner = opened(learner_of(toy_model(four), AGEM(memory_size=10), privacy=None), four, 2)
    met = []

    def losses(forward, batch):
        met.append(batch)
        return loss_of(learner)(forward, batch)

    for step in range(3):
        learner.session.held.sample(step)
        learner.curator.reference(losses, learner.params)
    assert [len(batch) for batch in met] == [4, 4, 2] and all(
        bool(batch.from_memory.all()) for batch in met
    )
    ids = torch.cat([batch.ids for batch in met])
    assert sorted(ids.tolist()) == sorted(learner.session.held.memory.rows.ids.tolist())


def test_a_private_reference_is_divided_by_the_declared_size(four, toy_model, meetings):
    """All stored rows at rate 1 are clipped by hand; the divisor is the declared 6, whatever the
    number of stored rows.
    """
    learner = opened(learner_of(toy_model(four), GEM(memory_size=12, batch_size=6)), four, 2)
    curator = reserved(learner)
    rows = learner.session.held.memory.rows
    for k in (0, 1):
        mine = flat(curator.reference(loss_of(learner, 5.0), learner.params, of=k))
        by_hand = torch.zeros_like(mine)
        own = rows.take(rows.tasks == k)
        for i in range(len(own)):
            loss = loss_of(learner, 5.0)(learner.session.forward, own.take(slice(i, i + 1))).sum()
            one = torch.cat(
                [g.flatten() for g in torch.autograd.grad(loss, list(learner.params.values()))]
            )
            by_hand += one * min(1.0, 1.0 / float(one.norm()))
        (noise, exact) = meetings.of[[key for key in meetings.of if key[1] == f"reference {k}"][-1]]
        torch.testing.assert_close(exact.float(), by_hand, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine, ((exact + noise) / 6).float(), rtol=1e-4, atol=1e-4)


@BOTH
def test_one_record_changes_a_reference_by_at_most_clip_norm(four, toy_model, meetings, strategy):
    strategy = replace(strategy, batch_size=100)  # all that is stored, at rate 1
    learner = opened(
        learner_of(toy_model(four), strategy, privacy=replace(PRIVATE, clip_norm=0.3)), four, 2
    )
    whole = learner.session.held.memory.rows
    held = learner.session.held
    names = ["reference"] if strategy.name == "AGEM" else ["reference 0", "reference 1"]

    def sums(rows):
        held.memory.rows = rows
        before = len(meetings.of)
        learner.begin(2)
        curator = reserved(learner)
        for name in names:
            of = None if name == "reference" else int(name.split()[1])
            curator.reference(loss_of(learner, 50.0), learner.params, of=of)
        new = list(meetings.of.items())[before:]
        return {purpose: exact for (_, purpose, _), (_, exact) in new}

    everyone = sums(whole)
    for dropped in range(len(whole)):
        neighbour = sums(whole.take(torch.arange(len(whole)) != dropped))
        moved = {name: float((everyone[name] - neighbour[name]).norm()) for name in names}
        assert (
            max(moved.values()) <= 0.3 * (1 + 1e-4)
            and sum(value > 0.1 for value in moved.values()) == 1
        )


def test_a_reference_without_stored_records_is_only_noise(four, toy_model, meetings):
    learner = opened(learner_of(toy_model(four), AGEM(memory_size=12)), four, 1)
    learner.session.held.memory.rows = None
    learner.begin(1)
    curator = reserved(learner)
    mine = flat(curator.reference(loss_of(learner), learner.params))
    (noise, exact) = meetings.of[list(meetings.of)[-1]]
    assert not exact.any() and bool((mine != 0).all())
    torch.testing.assert_close(mine, (noise / 4).float())  # the declared rows of a reference


@pytest.mark.deep(reason="full replay: calibrates and trains under a cap")
def test_excluded_partitions_are_not_drawn_for_references(four, toy_model):
    privacy = replace(PRIVATE, epsilon=15, delta=1e-5)
    drawn = {}

    def look(point, learner):
        if point == "experience.begin":
            samplers = learner.session.held.samplers
            drawn[learner.position.experience] = (
                set(samplers["reference"].rows.tasks.tolist()) if "reference" in samplers else set()
            )

    learner = learner_of(
        toy_model(four), AGEM(memory_size=6), privacy=privacy, iterations=6, callbacks=[look]
    )
    learner.fit(four)
    left = [{int(name[-1]) for name in gone} for gone in learner.private_sum.schedule.excluded]
    assert any(left)
    assert drawn == {k: set(range(k)) - left[k] for k in range(4)}
    assert learner.private_sum.ledger.epsilon(delta=1e-5) <= 15


@BOTH
def test_a_budget_below_the_cost_of_new_records_is_refused(four, toy_model, strategy):
    learner = learner_of(toy_model(four), strategy, privacy=replace(PRIVATE, epsilon=0.5))
    with pytest.raises(BudgetError, match=r"the records of experience 0 would exceed epsilon 0\.5"):
        learner.prepare(four)


# ------------------------------------------------------------------------ charged first, drawn once


@BOTH
def test_all_reference_steps_are_charged_before_the_first_noise(four, toy_model, strategy):
    trace = []
    learner = learner_of(
        toy_model(four), strategy, callbacks=[lambda point, _: trace.append(point)]
    )
    opened(learner, four, 1)
    before = len(learner.private_sum.ledger.entries)
    curator = reserved(learner)
    trace.clear()
    of = None if strategy.name == "AGEM" else 0
    curator.reference(loss_of(learner), learner.params, of=of)
    assert trace == [
        "ledger.before-append",
        "ledger.appended",
        "ledger.head-written",
        "noise.drawn",
    ]
    learner.session.held.sample(1)
    curator.reference(loss_of(learner), learner.params, of=of)
    assert trace[4:] == ["noise.drawn"]
    gradient, beside = learner.private_sum.ledger.entries[before:]
    assert (gradient.purpose, gradient.scope) == ("gradient", {"experience-1": 4 / 12})
    assert beside.purpose == ("reference" if of is None else "reference 0")
    assert (beside.scope, beside.first_step, beside.steps) == ({"experience-0": 4 / 12}, 0, 4)
    assert (beside.sampling, beside.noise_multiplier, beside.clip_norm) == ("poisson", 1.0, 1.0)


@BOTH
def test_a_reference_is_drawn_once_and_only_in_charged_steps(four, toy_model, strategy):
    learner = opened(learner_of(toy_model(four), strategy), four, 1)
    curator = reserved(learner, range(2))
    of = None if strategy.name == "AGEM" else 0
    ask = partial(curator.reference, loss_of(learner), learner.params, of=of)
    ask()
    with pytest.raises(PrivacyError, match="step 0 is not the next step"):
        ask()
    learner.session.held.sample(1)
    ask()
    with pytest.raises(PrivacyError, match="step 1 is not the next step"):
        ask()
    with pytest.raises(PrivacyError, match="step 2 was not charged"):
        learner.session.held.sample(2)


@pytest.mark.parametrize(
    ("strategy", "of"),
    [
        (AGEM(memory_size=12), 0),
        (GEM(memory_size=12), None),
        (GEM(memory_size=12), 1),
        (Replay(memory_size=12), None),
    ],
)
def test_a_reference_that_was_not_planned_is_refused(four, toy_model, strategy, of):
    learner = opened(learner_of(toy_model(four), strategy), four, 1)
    with pytest.raises(PrivacyError, match=r"was not planned, .*MemoryPlan\(use="):
        reserved(learner).reference(loss_of(learner), learner.params, of=of)


def test_a_reference_in_the_first_experience_is_refused(four, toy_model):
    learner = opened(learner_of(toy_model(four), AGEM(memory_size=12), privacy=None), four, 0)
    learner.session.held.sample(0)
    with pytest.raises(StrategyError, match="empty in the first experience"):
        learner.curator.reference(loss_of(learner), learner.params)


# --------------------------------------------------------------------------- noise


@pytest.mark.statistical
def test_references_have_independent_noise_of_the_stated_scale(four, toy_model, meetings):
    """64 numbers a stream: a correlation of 200 x 64 pairs has standard deviation 1/113; bound 5 of
    them (6e-7).

    The scale is measured on 200 x 64 normals and more, within 4 % (6 standard errors and more).
    """
    learner = opened(learner_of(toy_model(four), GEM(memory_size=12), iterations=1), four, 2)
    meetings.of.clear()
    learner.session.held.reserve(steps := range(200), "start")
    for step in steps:
        batch = learner.session.held.sample(step)
        for k in (0, 1):
            learner.curator.reference(loss_of(learner), learner.params, of=k)
        learner.curator.gradient(loss_of(learner), learner.params, batch, step)
    streams = {
        name: torch.cat(meetings.noises(name))
        for name in ("gradient", "reference 0", "reference 1")
    }
    assert [len(each) for each in streams.values()] == [200 * 64] * 3 and len(meetings.sums) >= 600
    for one, other in combinations(streams.values(), 2):
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 5 / 113
    for each in streams.values():
        assert abs(float(each.std()) - 1) < 0.04
        # step after step
        assert abs(float(torch.corrcoef(torch.stack([each[64:], each[:-64]]))[0, 1])) < 5 / 113
