import base64
import json
import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perdure.errors import BudgetError, ConfigError, LedgerError, PerdureError
from perdure.privacy.accounting import Charge, epsilon
from perdure.privacy.ledger import Entry, Ledger, merge, read
from perdure.privacy.ledger_file import link
from perdure.privacy.noise import NoiseKey

DELTA = 1e-5
N, STEPS, NOISE = 12_000, 469, 1.1
Q = 256 / N
KEY = NoiseKey.from_seed(0, "ledger")
POINTS = ("ledger.before-append", "ledger.appended", "ledger.head-written")


def entry(scope=None, **changes):
    fields = {
        "purpose": "gradient", "mechanism": "gaussian", "noise_multiplier": NOISE, "clip_norm": 1.0, "first_step": 0,
        "steps": STEPS, "sampling": "poisson", "scope": scope or {"e1": Q}, "data": "d", "start": "s",
        "simulated": True,
    }  # fmt: skip
    return Entry(**(fields | changes))


def opened(path=None, partitions=5, key=KEY, **options):
    ledger = Ledger.open(path, key=key, **options)
    for i in range(1, partitions + 1):
        ledger.declare(f"e{i}", N)
    return ledger


def filled(path, entries=3, **options):
    ledger = opened(path, 2, **options)
    for i in range(entries):
        ledger.charge(entry(first_step=i, steps=1, simulated=ledger._key.simulated))
    return ledger


# ---- reference values


@pytest.mark.reference
def test_disjoint_experiences_and_a_record_of_two():
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
def test_the_same_data_five_times_never_resets():
    ledger = opened()
    for i in range(5):
        ledger.charge(entry({"e1": Q}, first_step=i * STEPS))
    assert ledger.epsilon(delta=DELTA) == pytest.approx(5.519, abs=0.005)


@pytest.mark.reference
def test_replay_is_charged_to_where_the_records_came_from():
    ledger, series = opened(), []
    ledger.charge(entry({"e1": Q}))
    series.append(ledger.epsilon(["e1"], delta=DELTA))
    for i in range(2, 6):
        pool = 256 / (N + 1000)
        ledger.charge(entry({f"e{j}": pool for j in range(1, i + 1)}, first_step=i * STEPS))
        series.append(ledger.epsilon(["e1"], delta=DELTA))
    assert series == pytest.approx([2.384, 3.237, 3.944, 4.567, 5.135], abs=0.005)
    assert ledger.worst(DELTA)[0] == "e1"


@pytest.mark.reference
def test_half_of_every_batch_from_the_memory():
    ledger = opened()
    ledger.charge(entry({"e1": Q}))
    for i in range(2, 6):
        ledger.charge(entry({"e1": 128 / 1000}, first_step=i * STEPS))
    assert ledger.epsilon(delta=DELTA) == pytest.approx(43.914, abs=0.005)


def test_a_record_in_two_partitions_of_one_entry_is_in_a_step_at_most_once():
    ledger = opened(partitions=2)
    ledger.charge(entry({"e1": 0.02, "e2": 0.03}))
    both = ledger.epsilon(["e1", "e2"], delta=DELTA)
    assert both == epsilon([Charge(0.05, NOISE, STEPS)], delta=DELTA)
    assert both > epsilon([Charge(0.02, NOISE, STEPS), Charge(0.03, NOISE, STEPS)], delta=DELTA)


def test_replace_one_looks_at_any_two_partitions():
    ledger = opened(partitions=2, relation="replace-one")
    for i, rate in ((1, 0.02), (2, 0.03)):
        ledger.charge(entry({f"e{i}": rate}, relation="replace-one"))
    name, spent = ledger.worst(DELTA)
    assert name == "e1 and e2"
    pair = [Charge(0.02, NOISE, STEPS), Charge(0.03, NOISE, STEPS)]
    assert spent == epsilon(pair, delta=DELTA, relation="replace-one")


def test_raw_data_makes_epsilon_infinite_for_its_partition_only():
    ledger = opened(partitions=2)
    ledger.charge(entry({"e1": 1.0}, mechanism="none", noise_multiplier=0.0, sampling="none", steps=1))
    assert ledger.worst(DELTA) == ("e1", math.inf)
    assert ledger.epsilon(["e2"], delta=DELTA) == 0
    assert str(ledger.statement(DELTA)).startswith("epsilon infinite (record,")


# ---- entries and statements


def test_the_digest_changes_with_every_field():
    base = entry()
    changes = {
        "purpose": "reference", "noise_multiplier": 1.2, "clip_norm": 2.0, "first_step": 1, "steps": 1,
        "scope": {"e2": Q}, "unit": "client", "relation": "replace-one", "trust": "server", "data": "e", "start": "t",
        "simulated": False,
    }  # fmt: skip
    digests = {replace(base, **{name: value}).digest for name, value in changes.items()} | {base.digest}
    digests.add(entry({"e1": 1.0}, sampling="none").digest)
    digests.add(entry(mechanism="none", noise_multiplier=0.0).digest)
    assert len(digests) == len(changes) + 3
    assert entry().digest == base.digest == entry(noise_multiplier=NOISE, clip_norm=1).digest


@pytest.mark.parametrize(
    "wrong",
    [
        {"sampling": "shuffled"}, {"unit": "household"}, {"relation": "zero-out"}, {"mechanism": "laplace"},
        {"mechanism": "none"}, {"clip_norm": 0.0}, {"clip_norm": math.inf}, {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan}, {"steps": 0}, {"first_step": -1}, {"scope": {"e1": 0.0}},
        {"scope": {"e1": 1.5}}, {"sampling": "none"},
    ],
)  # fmt: skip
def test_impossible_entries_are_refused(wrong):
    with pytest.raises(ConfigError):
        entry(**wrong)


def test_an_entry_without_scope_is_refused():
    with pytest.raises(ConfigError):
        replace(entry(), scope={})


def test_statement_says_everything():
    ledger = opened()
    ledger.charge(entry())
    assert str(ledger.statement(DELTA)) == (
        "epsilon 2.39 (record, add/remove, delta 1e-5, PLD, Poisson sampling, trusted curator; "
        "simulation: not a private release)"
    )
    ledger.charge(entry({"e1": 1.0}, sampling="none", steps=1))
    assert ledger.statement(DELTA).sampling == "Poisson sampling and full passes"


def test_statement_of_a_secret_key_is_no_simulation(tmp_path):
    key = NoiseKey.from_os(tmp_path / "key")
    ledger = opened(key=key, unit="client", relation="replace-one")
    ledger.charge(entry({"e1": 1.0}, sampling="none", simulated=False, unit="client", relation="replace-one", steps=1))
    text = str(ledger.statement(1e-3))
    assert "(client, replace-one, delta 0.001, PLD, no sampling, trusted curator)" in text


def test_printed_epsilon_is_rounded_up():
    statement = opened().statement(DELTA)
    assert str(replace(statement, epsilon=2.3801)).startswith("epsilon 2.39 ")
    assert str(replace(statement, epsilon=2.39)).startswith("epsilon 2.39 ")
    assert str(statement).startswith("epsilon 0.00 ")


# ---- charging


@pytest.mark.parametrize("wrong", [{"unit": "client"}, {"relation": "replace-one"}, {"simulated": False}])
def test_units_relations_and_kinds_of_noise_never_mix(wrong):
    ledger = opened()
    with pytest.raises(LedgerError, match=next(iter(wrong))):
        ledger.charge(entry(**wrong))
    assert ledger.entries == []


def test_partitions_are_declared_once_with_one_size():
    ledger = opened(partitions=1)
    ledger.declare("e1", N)
    assert len(ledger.chain.lines) == 2
    with pytest.raises(LedgerError, match="12000 records, now 12001"):
        ledger.declare("e1", N + 1)
    with pytest.raises(ConfigError):
        ledger.declare("e2", 0)
    with pytest.raises(LedgerError, match="'e9' has no declared size"):
        ledger.charge(entry({"e1": Q, "e9": Q}))
    with pytest.raises(ConfigError, match="e9"):
        ledger.epsilon(["e9"], delta=DELTA)


def test_a_matching_entry_is_executed_again_without_being_appended(tmp_path):
    path = tmp_path / "ledger.jsonl"
    first = filled(path)
    before = path.read_bytes()
    again = filled(path)
    assert path.read_bytes() == before
    assert again.charges("e1") == first.charges("e1") and again.sizes == first.sizes
    changed = again.charge(entry(first_step=0, steps=1, start="elsewhere"))
    assert changed not in {e.digest for e in first.entries}
    assert len(path.read_bytes()) > len(before)


def test_projection_writes_nothing():
    ledger = opened(partitions=2)
    ledger.charge(entry())
    lines, more = list(ledger.chain.lines), entry({"e1": Q, "e2": Q}, first_step=STEPS)
    projected = ledger.project(more, DELTA)
    assert ledger.chain.lines == lines
    ledger.charge(more)
    assert projected == {p: ledger.epsilon([p], delta=DELTA) for p in ("e1", "e2")} == ledger.project(more, DELTA)


# ---- grants


PLAN = {"e1": [Charge(Q, NOISE, STEPS)], "e2": [Charge(Q, NOISE, STEPS), Charge(1.0, 10.0, 1)]}


def test_a_plan_over_budget_is_refused_with_amount_and_way_out():
    ledger = opened()
    with pytest.raises(
        BudgetError, match=r"'e2' would reach epsilon 2\.4\d+ \(0 of it .* above the 2\.39 .* fewer steps"
    ):
        ledger.grant(PLAN, epsilon=2.39, delta=DELTA)
    assert len(ledger.chain.lines) == 6
    ledger.charge(entry(first_step=7))  # nothing was granted, nothing binds


def test_the_verdict_is_that_of_pld():
    exact = epsilon(PLAN["e1"], delta=DELTA)
    assert epsilon(PLAN["e1"], delta=DELTA, accountant="rdp") > exact
    opened().grant({"e1": PLAN["e1"]}, epsilon=exact, delta=DELTA)
    with pytest.raises(BudgetError):
        opened().grant({"e1": PLAN["e1"]}, epsilon=exact - 1e-6, delta=DELTA)


def test_what_was_spent_before_counts():
    ledger = opened()
    ledger.charge(entry(noise_multiplier=1.2))
    with pytest.raises(BudgetError, match=r"'e1' would reach epsilon 3\.\d+ \(2\.\d+ of it spent before\)"):
        ledger.grant(PLAN, epsilon=2.5, delta=DELTA)
    ledger.grant({"e2": PLAN["e2"]}, epsilon=2.5, delta=DELTA)


def test_what_of_a_plan_was_charged_already_is_not_charged_again():
    """A run that goes on with a new partition grants its whole plan anew; the part that is done is done."""
    ledger = opened()
    ledger.grant({"e1": PLAN["e1"]}, epsilon=2.5, delta=DELTA)
    ledger.charge(entry(steps=400))
    ledger.grant(PLAN, epsilon=2.5, delta=DELTA)
    with pytest.raises(BudgetError, match="allowed 69"):
        ledger.charge(entry(first_step=400, steps=70))
    ledger.charge(entry(first_step=400, steps=69))
    ledger.charge(entry({"e2": Q}))
    with pytest.raises(BudgetError, match="allowed 0"):
        ledger.charge(entry(first_step=800, steps=1))


def test_only_what_was_granted_may_be_charged(tmp_path):
    ledger = opened(tmp_path / "l.jsonl")
    ledger.grant(PLAN, epsilon=3.0, delta=DELTA)
    ledger.charge(entry(steps=400))
    with pytest.raises(BudgetError, match=r"'e1': given 70 steps .* allowed 69"):
        ledger.charge(entry(first_step=400, steps=70))
    for outside in ({"noise_multiplier": 1.0}, {"scope": {"e3": Q}}, {"scope": {"e2": Q, "e1": Q / 2}}):
        with pytest.raises(BudgetError, match="allowed 0"):
            ledger.charge(entry(**outside, steps=1))
    for _ in range(2):  # the grant binds a restarted run, and re-execution consumes nothing
        ledger = opened(tmp_path / "l.jsonl")
        ledger.grant(PLAN, epsilon=3.0, delta=DELTA)
        ledger.charge(entry(steps=400))
        with pytest.raises(BudgetError, match="allowed 69"):
            ledger.charge(entry(first_step=400, steps=70))
    ledger.charge(entry(first_step=400, steps=69))
    ledger.charge(entry({"e2": Q}))
    ledger.charge(entry({"e2": 1.0}, sampling="none", noise_multiplier=10.0, steps=1))
    assert ledger.epsilon(delta=DELTA) <= 3.0
    assert sum("grant" in line for line in ledger.chain.lines) == 1
    reopened = Ledger.open(tmp_path / "l.jsonl", key=KEY)
    with pytest.raises(BudgetError):
        reopened.charge(entry(first_step=999, steps=1))


def test_a_new_plan_lets_the_old_one_lapse():
    ledger = opened()
    old, new = {"e1": [Charge(Q, NOISE, 100)]}, {"e1": [Charge(Q, 2.0, 50)]}
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


def test_impossible_grants_are_refused():
    ledger = opened(partitions=1)
    with pytest.raises(LedgerError, match="'e9'"):
        ledger.grant({"e9": []}, epsilon=1.0, delta=DELTA)
    for wrong in ({"epsilon": 0.0, "delta": DELTA}, {"epsilon": 1.0, "delta": 1.0}):
        with pytest.raises(ConfigError):
            ledger.grant({"e1": []}, **wrong)


def test_a_grant_under_replace_one_binds_two_partitions_together():
    ledger = opened(partitions=2, relation="replace-one")
    alone = epsilon([Charge(0.02, 2.0, 50)], delta=DELTA, relation="replace-one")
    with pytest.raises(BudgetError, match="e1 and e2"):
        ledger.grant({p: [Charge(0.02, 2.0, 50)] for p in ("e1", "e2")}, epsilon=1.1 * alone, delta=DELTA)


# ---- damage


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


def damaged(path, lines):
    path.write_bytes(b"".join(lines))
    with pytest.raises(LedgerError) as error:
        Ledger.open(path, key=KEY)
    return str(error.value)


@pytest.fixture
def path(tmp_path):
    filled(tmp_path / "ledger.jsonl")
    return tmp_path / "ledger.jsonl"


def test_an_edited_line_is_named(path):
    lines = lines_of(path)
    lines[3] = lines[3].replace(b'"steps":1', b'"steps":0')
    assert "line 4" in damaged(path, lines)


def test_another_spelling_of_the_same_line_is_refused(path):
    lines = lines_of(path)
    lines[3] = lines[3].replace(b'"steps":1', b'"steps": 1')
    assert "line 4" in damaged(path, lines)


def test_reordered_removed_and_inserted_lines_are_named(path):
    lines = lines_of(path)
    assert "line 4" in damaged(path, [*lines[:3], lines[4], lines[3], lines[5]])
    assert "line 4" in damaged(path, [*lines[:3], *lines[4:]])
    assert "line 5" in damaged(path, [*lines[:4], lines[3], *lines[4:]])


@pytest.mark.parametrize("kept", range(6))
def test_a_shortened_file_is_refused(path, kept):
    assert f"line {kept + 1}: missing" in damaged(path, lines_of(path)[:kept])


def test_a_covered_line_that_is_torn_is_refused(path):
    lines = lines_of(path)
    assert "line 6: missing" in damaged(path, [*lines[:5], lines[5][:-1]])


def test_a_ledger_rewritten_as_a_whole_is_refused(path):
    rewritten, last = [], "0" * 64
    for line in lines_of(path):
        body = {n: v for n, v in json.loads(line).items() if n not in ("prev", "hash")}
        text, last = link(body | ({"steps": 2} if body["kind"] == "entry" else {}), last)
        rewritten.append(text.encode() + b"\n")
    assert "line 6: rewritten" in damaged(path, rewritten)
    head = path.with_suffix(".head.json")
    head.write_text(json.dumps(json.loads(head.read_text()) | {"hash": last}, sort_keys=True, separators=(",", ":")))
    assert "not sealed with this key" in damaged(path, rewritten)


def test_a_head_of_another_key_or_a_missing_one_is_refused(path):
    with pytest.raises(LedgerError, match="key"):
        Ledger.open(path, key=NoiseKey.from_seed(1))
    path.with_suffix(".head.json").unlink()
    with pytest.raises(LedgerError, match="missing"):
        Ledger.open(path, key=KEY)


@pytest.mark.parametrize("options", [{"owner": "x"}, {"unit": "client"}, {"relation": "replace-one"}])
def test_a_ledger_is_opened_as_what_it_is(path, options):
    with pytest.raises(LedgerError, match=str(next(iter(options.values())))):
        Ledger.open(path, key=KEY, **options)


def test_two_processes_at_once_are_refused(path):
    first, second = Ledger.open(path, key=KEY), Ledger.open(path, key=KEY)
    first.charge(entry(first_step=10))
    with pytest.raises(LedgerError, match="another process"):
        second.charge(entry(first_step=11))
    assert len(Ledger.open(path, key=KEY).entries) == 4


@pytest.mark.property
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_refused(path, data):
    """In the file or in its head; both are covered to the last byte."""
    victim = data.draw(st.sampled_from([path, path.with_suffix(".head.json")]))
    original = victim.read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda v: v != original[position]))
    victim.write_bytes(original[:position] + bytes([value]) + original[position + 1 :])
    try:
        with pytest.raises(LedgerError, match=r"line|head"):
            Ledger.open(path, key=KEY)
    finally:
        victim.write_bytes(original)
    assert len(Ledger.open(path, key=KEY).entries) == 3


@pytest.mark.property
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tail=st.binary(min_size=1, max_size=300))
def test_whatever_stands_beyond_the_head_is_dropped(path, tail):
    original = path.read_bytes()
    path.write_bytes(original + tail)
    assert len(Ledger.open(path, key=KEY).entries) == 3
    assert path.read_bytes() == original


# ---- crashes


class CrashError(Exception):
    pass


def crash_at(countdown):
    def trace(point):
        nonlocal countdown
        assert point in POINTS
        countdown -= 1
        if countdown < 0:
            raise CrashError(point)

    return trace


@pytest.mark.parametrize("crash", range(18))
def test_a_crash_at_any_point_loses_no_drawn_noise_and_the_run_ends_the_same(tmp_path, crash):
    """Six lines (header, two partitions, three entries) with three points each."""
    path, drawn = tmp_path / "ledger.jsonl", []

    def run(trace):
        ledger = opened(path, 2, trace=trace)
        for i in range(3):
            drawn.append(ledger.charge(entry(first_step=i, steps=1)))

    with pytest.raises(CrashError):
        run(crash_at(crash))
    survivors = {e.digest for e in Ledger.open(path, key=KEY).entries}
    assert set(drawn) <= survivors
    if crash % 3 == 1:  # appended, not covered
        assert survivors == set(drawn)
    run(lambda point: None)
    undisturbed = filled(tmp_path / "other.jsonl")
    assert path.read_bytes() == (tmp_path / "other.jsonl").read_bytes()
    assert [e.digest for e in undisturbed.entries] == drawn[-3:]


@pytest.mark.parametrize("crash", range(3))
def test_a_caught_failure_leaves_the_open_ledger_usable(tmp_path, crash):
    point_reached = []

    def trace(point):
        point_reached.append(point)
        if len(point_reached) == 6 + crash + 1:
            raise CrashError(point)

    ledger = opened(tmp_path / "l.jsonl", 1, trace=trace)
    with pytest.raises(CrashError):
        ledger.charge(entry(steps=1))
    ledger.charge(entry(steps=2))
    ledger.charge(entry(steps=1))
    reopened = Ledger.open(tmp_path / "l.jsonl", key=KEY)
    assert sorted(e.steps for e in reopened.entries) == [1, 2]


def test_memory_behaves_as_the_file_does(tmp_path):
    on_disk, in_memory = filled(tmp_path / "l.jsonl"), filled(None)
    assert in_memory.chain.lines == on_disk.chain.lines and in_memory.chain.head == on_disk.chain.head
    points = []
    opened(None, 1, trace=points.append)
    assert points == list(POINTS) * 2


# ---- secrecy


def test_the_key_is_in_no_file_that_is_written(tmp_path):
    key = NoiseKey.from_os(tmp_path / "private" / "key")
    secret = (tmp_path / "private" / "key").read_bytes()
    ledger = filled(tmp_path / "run" / "ledger.jsonl", key=key, owner="client 1")
    merge([ledger]).export(tmp_path / "run" / "all.jsonl")
    written = b"".join(p.read_bytes() for p in (tmp_path / "run").iterdir())
    assert len(list((tmp_path / "run").iterdir())) == 3
    for form in (secret, secret.hex().encode(), base64.b64encode(secret), repr(secret).encode()):
        assert form not in written


# ---- merging


@pytest.fixture
def clients(tmp_path):
    for i in (1, 2, 3):
        ledger = opened(tmp_path / f"{i}.jsonl", 2, key=NoiseKey.from_seed(i), owner=f"client {i}")
        ledger.charge(entry({"e1": Q}, steps=100 * i))
    return [tmp_path / f"{i}.jsonl" for i in (1, 2, 3)]


def test_merged_ledgers_stand_side_by_side(clients, tmp_path):
    merged = merge(clients)
    each = merged.per_client(DELTA)
    assert each == {f"client {i}": epsilon([Charge(Q, NOISE, 100 * i)], delta=DELTA) for i in (1, 2, 3)}
    assert merged.worst(DELTA) == ("client 3/e1", each["client 3"])
    assert merged.epsilon(delta=DELTA) == each["client 3"]
    shared = merged.epsilon(["client 1/e1", "client 2/e1"], delta=DELTA)
    assert shared == epsilon([Charge(Q, NOISE, 300)], delta=DELTA)
    assert "trusted curator per client; simulation" in str(merged.statement(DELTA))


def test_export_keeps_every_chain_and_head(clients, tmp_path):
    out = tmp_path / "all.jsonl"
    merge([clients[0], Ledger.open(clients[1], key=NoiseKey.from_seed(2), owner="client 2")]).export(out)
    merge([out, clients[2]]).export(out)
    text = out.read_text()
    for file in clients:
        assert file.read_text() in text and file.with_suffix(".head.json").read_text() in text
    keys = {f"client {i}": NoiseKey.from_seed(i) for i in (1, 2, 3)}
    assert read(out, keys).verified == "chains and keyed heads verified"
    assert "heads not" in read(out).verified and "heads not" in read(clients[0]).verified
    assert read(out).per_client(DELTA) == merge(clients).per_client(DELTA)
    with pytest.raises(LedgerError, match="key"):
        read(out, keys | {"client 2": NoiseKey.from_seed(9)})


def test_reading_changes_nothing(clients):
    with clients[0].open("ab") as file:
        file.write(b"torn")
    before = clients[0].read_bytes()
    assert len(read(clients[0]).entries) == 1
    assert clients[0].read_bytes() == before


@pytest.mark.property
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_of_an_export_is_refused(clients, tmp_path, data):
    out = tmp_path / "all.jsonl"
    merge(clients).export(out)
    original = out.read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    if data.draw(st.booleans()):
        out.write_bytes(original[:position])
    else:
        value = data.draw(st.integers(0, 255).filter(lambda v: v != original[position]))
        out.write_bytes(original[:position] + bytes([value]) + original[position + 1 :])
    with pytest.raises(LedgerError, match="line"):
        keys = {f"client {i}": NoiseKey.from_seed(i) for i in (1, 2, 3)}
        read(out, keys)


def test_lines_after_the_last_ledger_are_refused(clients, tmp_path):
    out = tmp_path / "all.jsonl"
    merge(clients).export(out)
    for extra in (b"{}\n", b"{}"):
        out.write_bytes(out.read_bytes() + extra)
        with pytest.raises(LedgerError, match="line 17"):
            read(out)
        merge(clients).export(out)


def test_equal_owners_and_mixed_units_are_refused(clients, tmp_path):
    with pytest.raises(LedgerError, match="owner"):
        merge([clients[0], clients[0]])
    other = opened(None, 1, unit="client", owner="server")
    with pytest.raises(LedgerError, match="never mix"):
        merge([clients[0], other])
    assert merge([]).worst(DELTA) == ("none", 0.0)


def test_a_file_that_is_no_ledger_is_refused(tmp_path):
    for content in (b"", b"\xff\x00\n", b"[1]\n", b"{}\n"):
        (tmp_path / "x.jsonl").write_bytes(content)
        with pytest.raises(PerdureError, match="line 1"):
            read(tmp_path / "x.jsonl")


def test_a_ledger_that_was_stopped_before_its_first_line_holds_nothing(tmp_path):
    class StoppedError(Exception):
        pass

    def stop(point):
        raise StoppedError

    with pytest.raises(StoppedError):
        Ledger.open(tmp_path / "ledger.jsonl", key=KEY, trace=stop)
    assert read(tmp_path / "ledger.jsonl").entries == [] and merge([tmp_path / "ledger.jsonl"]).partitions == ()
    assert Ledger.open(tmp_path / "ledger.jsonl", key=KEY).chain.lines
