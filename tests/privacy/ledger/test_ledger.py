"""The privacy ledger: published values, statements, valid charges, and grants."""

import math
from dataclasses import replace

import pytest

from helpers.ledgers import DELTA, KEY, NOISE, STEPS, N, Q, entry, filled, opened
from perdure.errors import BudgetError, ConfigError, LedgerError
from perdure.privacy.accounting.calibration import epsilon
from perdure.privacy.accounting.charges import Charge
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.noise.key import NoiseKey

# ---- reference values


@pytest.mark.reference
def test_epsilon_of_separate_and_shared_records_is_as_documented():
    ledger = opened()
    for i in range(1, 6):
        ledger.charge(entry({f"e{i}": Q}, noise_multiplier=0.9 if i == 3 else NOISE))
    spent = [ledger.epsilon([p], delta=DELTA) for p in ledger.partitions]
    assert spent == pytest.approx([2.384, 2.384, 3.637, 2.384, 2.384], abs=0.005)
    assert ledger.worst(DELTA) == ("e3", spent[2])
    assert ledger.epsilon(delta=DELTA) == spent[2]
    assert ledger.epsilon({"e1", "e3"}, delta=DELTA) == pytest.approx(4.335, abs=0.005)
    assert ledger.epsilon(delta=DELTA, accountant="rdp") > spent[2]


@pytest.mark.reference
def test_charges_of_five_trainings_on_one_partition_add_up():
    ledger = opened()
    for i in range(5):
        ledger.charge(entry({"e1": Q}, first_step=i * STEPS))
    assert ledger.epsilon(delta=DELTA) == pytest.approx(5.519, abs=0.005)


@pytest.mark.reference
def test_stored_records_are_charged_to_their_own_partition():
    ledger = opened()
    series = []
    ledger.charge(entry({"e1": Q}))
    series.append(ledger.epsilon(["e1"], delta=DELTA))
    for i in range(2, 6):
        pool = 256 / (N + 1000)
        ledger.charge(entry({f"e{j}": pool for j in range(1, i + 1)}, first_step=i * STEPS))
        series.append(ledger.epsilon(["e1"], delta=DELTA))
    assert series == pytest.approx([2.384, 3.237, 3.944, 4.567, 5.135], abs=0.005)
    assert ledger.worst(DELTA)[0] == "e1"


@pytest.mark.reference
def test_a_batch_with_stored_rows_charges_both_partitions():
    ledger = opened()
    ledger.charge(entry({"e1": Q}))
    for i in range(2, 6):
        ledger.charge(entry({"e1": 128 / 1000}, first_step=i * STEPS))
    assert ledger.epsilon(delta=DELTA) == pytest.approx(43.914, abs=0.005)


def test_the_rates_of_a_record_in_two_partitions_add_up():
    ledger = opened(partitions=2)
    ledger.charge(entry({"e1": 0.02, "e2": 0.03}))
    both = ledger.epsilon(["e1", "e2"], delta=DELTA)
    assert both == epsilon([Charge(0.05, NOISE, STEPS)], delta=DELTA)
    assert both > epsilon([Charge(0.02, NOISE, STEPS), Charge(0.03, NOISE, STEPS)], delta=DELTA)


def test_replace_one_epsilon_takes_the_worst_two_partitions():
    ledger = opened(partitions=2, relation="replace-one")
    for i, rate in ((1, 0.02), (2, 0.03)):
        ledger.charge(entry({f"e{i}": rate}, relation="replace-one"))
    name, spent = ledger.worst(DELTA)
    assert name == "e1 and e2"
    pair = [Charge(0.02, NOISE, STEPS), Charge(0.03, NOISE, STEPS)]
    assert spent == epsilon(pair, delta=DELTA, relation="replace-one")


def test_raw_data_make_epsilon_infinite_only_for_their_partition():
    ledger = opened(partitions=2)
    ledger.charge(
        entry({"e1": 1.0}, mechanism="none", noise_multiplier=0.0, sampling="none", steps=1)
    )
    assert ledger.worst(DELTA) == ("e1", math.inf)
    assert ledger.epsilon(["e2"], delta=DELTA) == 0
    assert str(ledger.statement(DELTA)).startswith("epsilon infinite (record,")


# ---- entries and statements


def test_the_digest_of_an_entry_changes_with_every_field():
    base = entry()
    changes = {
        "purpose": "reference",
        "noise_multiplier": 1.2,
        "clip_norm": 2.0,
        "first_step": 1,
        "steps": 1,
        "scope": {"e2": Q},
        "unit": "client",
        "relation": "replace-one",
        "trust": "server",
        "data": "e",
        "start": "t",
        "simulated": False,
    }
    digests = {replace(base, **{name: value}).digest for name, value in changes.items()} | {
        base.digest
    }
    digests.add(entry({"e1": 1.0}, sampling="none").digest)
    digests.add(entry(mechanism="none", noise_multiplier=0.0).digest)
    assert len(digests) == len(changes) + 3
    assert entry().digest == base.digest == entry(noise_multiplier=NOISE, clip_norm=1).digest


@pytest.mark.parametrize(
    "wrong",
    [
        {"sampling": "shuffled"},
        {"unit": "household"},
        {"relation": "zero-out"},
        {"mechanism": "laplace"},
        {"mechanism": "none"},
        {"clip_norm": 0.0},
        {"clip_norm": math.inf},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"steps": 0},
        {"first_step": -1},
        {"scope": {"e1": 0.0}},
        {"scope": {"e1": 1.5}},
        {"sampling": "none"},
    ],
)
def test_a_ledger_entry_refuses_an_invalid_field(wrong):
    with pytest.raises(ConfigError):
        entry(**wrong)


def test_a_ledger_entry_without_scope_is_refused():
    with pytest.raises(ConfigError):
        replace(entry(), scope={})


def test_the_statement_has_the_weakest_independence_of_entries():
    ledger = opened()
    assert ledger.independence == ""
    said = []
    for step, word in enumerate(["by construction", "tested", "by construction", "", "tested"]):
        ledger.charge(replace(entry(), first_step=step, steps=1, independence=word))
        said.append(ledger.statement(DELTA).independence)
    assert said == ["by construction", "tested", "tested", "not known", "not known"]
    assert ledger.independence_of(["e2"]) == "by construction", "no entry touches it"


def test_the_ledger_refuses_a_partition_with_another_split_rule(tmp_path):
    key = NoiseKey.from_seed(0)
    ledger = Ledger.open(tmp_path / "ledger.jsonl", key=key)
    ledger.declare("a", 10, "rule 1")
    ledger.declare("b", 10)
    ledger.declare("a", 10, "rule 1")
    for name, rule in (("a", "rule 2"), ("a", ""), ("b", "rule 1")):
        with pytest.raises(LedgerError, match=f"'{name}' was made by another rule"):
            ledger.declare(name, 10, rule)
    again = Ledger.open(tmp_path / "ledger.jsonl", key=key)
    assert again.rules == ledger.rules == {"a": "rule 1", "b": ""}


def test_the_printed_statement_names_all_assumptions():
    ledger = opened()
    ledger.charge(entry())
    assert str(ledger.statement(DELTA)) == (
        "epsilon 2.39 (record, add/remove, delta 1e-5, PLD, Poisson sampling, trusted curator, "
        "declared sizes public, independence of records not known; training before this ledger not "
        "counted; simulation: not a private release)"
    )
    ledger.charge(entry({"e1": 1.0}, sampling="none", steps=1))
    assert ledger.statement(DELTA).sampling == "Poisson sampling and full passes"


@pytest.mark.parametrize(
    ("scopes", "sampling"),
    [
        ([{"e1": 1.0}], "no sampling"),
        ([{"e1": 1.0}, {"e1": 1.0}], "no sampling"),
        ([{"e1": 1.0}, {"e1": 0.5}], "Poisson sampling and full passes"),
        ([{"e1": 0.5}], "Poisson sampling"),
    ],
)
def test_the_privacy_statement_says_no_sampling_at_rate_1(scopes, sampling):
    """A Poisson sample at rate 1 contains every record."""
    ledger = opened()
    for number, scope in enumerate(scopes):
        ledger.charge(entry(scope, steps=1 + number))
    assert {one.sampling for one in ledger.entries} == {"poisson"}
    assert ledger.statement(DELTA).sampling == sampling
    assert f"PLD, {sampling}, " in str(ledger.statement(DELTA))


def test_the_privacy_statement_warns_of_a_large_delta():
    ledger = opened()
    ledger.charge(entry())
    units = sum(ledger.sizes.values())
    below, at = ledger.statement(0.9 / units), ledger.statement(1 / units)
    assert not below.delta_is_large and "whole ones" not in str(below)
    assert at.delta_is_large
    assert str(at).endswith(f"; delta is not below 1 / {units} records: whole ones may leak)")


def test_a_statement_about_secret_noise_says_no_simulation(tmp_path):
    key = NoiseKey.from_os(tmp_path / "key")
    ledger = opened(key=key, unit="client", relation="replace-one")
    ledger.charge(
        entry(
            {"e1": 1.0},
            sampling="none",
            simulated=False,
            unit="client",
            relation="replace-one",
            steps=1,
        )
    )
    text = str(ledger.statement(1e-3))
    told = "(client, replace-one, delta 0.001, PLD, no sampling, trusted curator, declared sizes"
    assert told in text and "simulation" not in text


def test_the_printed_epsilon_is_rounded_up():
    statement = opened().statement(DELTA)
    assert str(replace(statement, epsilon=2.3801)).startswith("epsilon 2.39 ")
    assert str(replace(statement, epsilon=2.39)).startswith("epsilon 2.39 ")
    assert str(statement).startswith("epsilon 0.00 ")


# ---- charging


@pytest.mark.parametrize(
    "wrong", [{"unit": "client"}, {"relation": "replace-one"}, {"simulated": False}]
)
def test_the_ledger_refuses_entries_of_another_unit_or_relation(wrong):
    ledger = opened()
    with pytest.raises(LedgerError, match=next(iter(wrong))):
        ledger.charge(entry(**wrong))
    assert ledger.entries == []


def test_a_partition_cannot_be_declared_with_two_sizes():
    ledger = opened(partitions=1)
    ledger.declare("e1", N)
    assert len(ledger.chain.lines) == 2
    with pytest.raises(LedgerError, match="12000 records, now with 12001"):
        ledger.declare("e1", N + 1)
    with pytest.raises(ConfigError):
        ledger.declare("e2", 0)
    with pytest.raises(LedgerError, match="'e9' has no declared size"):
        ledger.charge(entry({"e1": Q, "e9": Q}))
    with pytest.raises(ConfigError, match="e9"):
        ledger.epsilon(["e9"], delta=DELTA)


def test_an_equal_ledger_entry_is_not_appended_again(tmp_path):
    path = tmp_path / "ledger.jsonl"
    first = filled(path)
    before = path.read_bytes()
    again = filled(path)
    assert path.read_bytes() == before
    assert again.charges("e1") == first.charges("e1") and again.sizes == first.sizes
    changed = again.charge(entry(first_step=0, steps=1, start="elsewhere"))
    assert changed not in {e.digest for e in first.entries}
    assert len(path.read_bytes()) > len(before)


def test_a_projection_writes_nothing_to_the_ledger():
    ledger = opened(partitions=2)
    ledger.charge(entry())
    lines = list(ledger.chain.lines)
    more = entry({"e1": Q, "e2": Q}, first_step=STEPS)
    projected = ledger.project(more, DELTA)
    assert ledger.chain.lines == lines
    ledger.charge(more)
    assert (
        projected
        == {p: ledger.epsilon([p], delta=DELTA) for p in ("e1", "e2")}
        == ledger.project(more, DELTA)
    )


# ---- grants


PLAN = {"e1": [Charge(Q, NOISE, STEPS)], "e2": [Charge(Q, NOISE, STEPS), Charge(1.0, 10.0, 1)]}


def test_the_ledger_refuses_a_plan_over_budget_with_the_fix():
    ledger = opened()
    with pytest.raises(
        BudgetError,
        match=r"'e2' would reach epsilon 2\.4\d+ \(0 of it .* above the 2\.39 .* fewer steps",
    ):
        ledger.grant(PLAN, epsilon=2.39, delta=DELTA)
    assert len(ledger.chain.lines) == 6
    ledger.charge(entry(first_step=7))  # nothing was granted, nothing binds


def test_the_ledger_grants_a_plan_by_the_pld_accountant():
    exact = epsilon(PLAN["e1"], delta=DELTA)
    assert epsilon(PLAN["e1"], delta=DELTA, accountant="rdp") > exact
    opened().grant({"e1": PLAN["e1"]}, epsilon=exact, delta=DELTA)
    with pytest.raises(BudgetError):
        opened().grant({"e1": PLAN["e1"]}, epsilon=exact - 1e-6, delta=DELTA)


def test_a_ledger_grant_counts_the_charges_made_before_the_grant():
    ledger = opened()
    ledger.charge(entry(noise_multiplier=1.2))
    with pytest.raises(
        BudgetError, match=r"'e1' would reach epsilon 3\.\d+ \(2\.\d+ of it spent before\)"
    ):
        ledger.grant(PLAN, epsilon=2.5, delta=DELTA)
    ledger.grant({"e2": PLAN["e2"]}, epsilon=2.5, delta=DELTA)


def test_a_second_ledger_grant_counts_charged_steps_only_once():
    """A run that continues with a new partition grants its whole plan again, and finished steps
    count once.
    """
    ledger = opened()
    ledger.grant({"e1": PLAN["e1"]}, epsilon=2.5, delta=DELTA)
    ledger.charge(entry(steps=400))
    ledger.grant(PLAN, epsilon=2.5, delta=DELTA)
    with pytest.raises(BudgetError, match="grant allows 69"):
        ledger.charge(entry(first_step=400, steps=70))
    ledger.charge(entry(first_step=400, steps=69))
    ledger.charge(entry({"e2": Q}))
    with pytest.raises(BudgetError, match="grant allows 0"):
        ledger.charge(entry(first_step=800, steps=1))


def test_the_ledger_accepts_only_granted_charges(tmp_path):
    ledger = opened(tmp_path / "l.jsonl")
    ledger.grant(PLAN, epsilon=3.0, delta=DELTA)
    ledger.charge(entry(steps=400))
    with pytest.raises(BudgetError, match=r"'e1': given 70 steps .* grant allows 69"):
        ledger.charge(entry(first_step=400, steps=70))
    for outside in (
        {"noise_multiplier": 1.0},
        {"scope": {"e3": Q}},
        {"scope": {"e2": Q, "e1": Q / 2}},
    ):
        with pytest.raises(BudgetError, match="grant allows 0"):
            ledger.charge(entry(**outside, steps=1))
    for _ in range(2):  # the grant binds a restarted run, and re-execution consumes nothing
        ledger = opened(tmp_path / "l.jsonl")
        ledger.grant(PLAN, epsilon=3.0, delta=DELTA)
        ledger.charge(entry(steps=400))
        with pytest.raises(BudgetError, match="grant allows 69"):
            ledger.charge(entry(first_step=400, steps=70))
    ledger.charge(entry(first_step=400, steps=69))
    ledger.charge(entry({"e2": Q}))
    ledger.charge(entry({"e2": 1.0}, sampling="none", noise_multiplier=10.0, steps=1))
    assert ledger.epsilon(delta=DELTA) <= 3.0
    assert sum("grant" in line for line in ledger.chain.lines) == 1
    reopened = Ledger.open(tmp_path / "l.jsonl", key=KEY)
    with pytest.raises(BudgetError):
        reopened.charge(entry(first_step=999, steps=1))


def test_a_new_ledger_grant_replaces_the_old_grant():
    ledger = opened()
    old = {"e1": [Charge(Q, NOISE, 100)]}
    new = {"e1": [Charge(Q, 2.0, 50)]}
    ledger.grant(old, epsilon=3.0, delta=DELTA)
    ledger.charge(entry(steps=60))
    ledger.grant(new, epsilon=3.0, delta=DELTA)
    with pytest.raises(BudgetError):
        ledger.charge(entry(first_step=60, steps=40))
    ledger.grant(old, epsilon=3.0, delta=DELTA)  # a resumed run passes here again
    ledger.charge(entry(steps=60))
    with pytest.raises(BudgetError):
        ledger.charge(entry(first_step=60, steps=40))
    ledger.grant(new, epsilon=3.0, delta=DELTA)
    ledger.charge(entry(noise_multiplier=2.0, steps=50))
    assert ledger.charges("e1") == (Charge(Q, NOISE, 60), Charge(Q, 2.0, 50))


def test_the_ledger_refuses_to_grant_an_invalid_plan():
    ledger = opened(partitions=1)
    with pytest.raises(LedgerError, match="'e9'"):
        ledger.grant({"e9": []}, epsilon=1.0, delta=DELTA)
    for wrong in ({"epsilon": 0.0, "delta": DELTA}, {"epsilon": 1.0, "delta": 1.0}):
        with pytest.raises(ConfigError):
            ledger.grant({"e1": []}, **wrong)


def test_a_replace_one_grant_bounds_two_partitions_together():
    ledger = opened(partitions=2, relation="replace-one")
    alone = epsilon([Charge(0.02, 2.0, 50)], delta=DELTA, relation="replace-one")
    with pytest.raises(BudgetError, match="e1 and e2"):
        ledger.grant(
            {p: [Charge(0.02, 2.0, 50)] for p in ("e1", "e2")}, epsilon=1.1 * alone, delta=DELTA
        )
