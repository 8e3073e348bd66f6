"""The ledger file: damaged lines are named, crashes lose no charge, no key is stored, and merging
keeps chains.
"""

import base64
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.ledgers import DELTA, KEY, NOISE, Q, entry, filled, opened
from perdure.errors import LedgerError, PerdureError
from perdure.privacy.accounting.calibration import epsilon
from perdure.privacy.accounting.charges import Charge
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.ledger.merged import merge, read
from perdure.privacy.ledger.storage import link
from perdure.privacy.noise.key import NoiseKey

POINTS = ("ledger.before-append", "ledger.appended", "ledger.head-written")


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


def test_the_error_names_the_edited_ledger_line(path):
    lines = lines_of(path)
    lines[3] = lines[3].replace(b'"steps":1', b'"steps":0')
    assert "line 4" in damaged(path, lines)


def test_a_ledger_line_with_an_added_space_is_refused(path):
    lines = lines_of(path)
    lines[3] = lines[3].replace(b'"steps":1', b'"steps": 1')
    assert "line 4" in damaged(path, lines)


def test_the_error_names_a_moved_missing_or_inserted_line(path):
    lines = lines_of(path)
    assert "line 4" in damaged(path, [*lines[:3], lines[4], lines[3], lines[5]])
    assert "line 4" in damaged(path, [*lines[:3], *lines[4:]])
    assert "line 5" in damaged(path, [*lines[:4], lines[3], *lines[4:]])


@pytest.mark.parametrize("kept", range(6))
def test_a_shortened_ledger_file_is_refused(path, kept):
    assert f"line {kept + 1}: the line is missing" in damaged(path, lines_of(path)[:kept])


def test_a_truncated_sealed_ledger_line_is_refused(path):
    lines = lines_of(path)
    assert "line 6: the line is missing" in damaged(path, [*lines[:5], lines[5][:-1]])


def test_a_ledger_rewritten_with_new_hashes_is_refused(path):
    rewritten = []
    last = "0" * 64
    for line in lines_of(path):
        body = {n: v for n, v in json.loads(line).items() if n not in ("prev", "hash")}
        text, last = link(body | ({"steps": 2} if body["kind"] == "entry" else {}), last)
        rewritten.append(text.encode() + b"\n")
    assert "line 6: the line was changed" in damaged(path, rewritten)
    head = path.with_suffix(".head.json")
    head.write_text(
        json.dumps(
            json.loads(head.read_text()) | {"hash": last}, sort_keys=True, separators=(",", ":")
        )
    )
    assert "does not fit this key" in damaged(path, rewritten)


def test_a_missing_head_or_a_head_of_another_key_is_refused(path):
    with pytest.raises(LedgerError, match="key"):
        Ledger.open(path, key=NoiseKey.from_seed(1))
    path.with_suffix(".head.json").unlink()
    with pytest.raises(LedgerError, match="missing"):
        Ledger.open(path, key=KEY)


@pytest.mark.parametrize(
    "options", [{"owner": "x"}, {"unit": "client"}, {"relation": "replace-one"}]
)
def test_a_ledger_with_another_owner_unit_or_relation_is_refused(path, options):
    with pytest.raises(LedgerError, match=str(next(iter(options.values())))):
        Ledger.open(path, key=KEY, **options)


def test_the_ledger_refuses_a_second_writing_process(path):
    first = Ledger.open(path, key=KEY)
    second = Ledger.open(path, key=KEY)
    first.charge(entry(first_step=10))
    with pytest.raises(LedgerError, match="another process"):
        second.charge(entry(first_step=11))
    assert len(Ledger.open(path, key=KEY).entries) == 4


@pytest.mark.property
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_changed_byte_of_ledger_or_head_is_refused(path, data):
    """Ledger and head are both protected to the last byte."""
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
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tail=st.binary(min_size=1, max_size=300))
def test_unsealed_ledger_lines_at_the_end_are_dropped(path, tail):
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
def test_a_crash_at_any_point_loses_no_ledger_entry(tmp_path, crash):
    """Six lines (header, two partitions, three entries) with three points each."""
    path = tmp_path / "ledger.jsonl"
    drawn = []

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
def test_an_open_ledger_works_after_a_failed_write_is_caught(tmp_path, crash):
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


def test_a_ledger_in_memory_behaves_like_a_ledger_file(tmp_path):
    on_disk = filled(tmp_path / "l.jsonl")
    in_memory = filled(None)
    assert (
        in_memory.chain.lines == on_disk.chain.lines and in_memory.chain.head == on_disk.chain.head
    )
    points = []
    opened(None, 1, trace=points.append)
    assert points == list(POINTS) * 2


# ---- secrecy


def test_no_ledger_file_contains_the_noise_key(tmp_path):
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


def test_merged_ledgers_keep_the_partitions_of_all_owners(clients, tmp_path):
    merged = merge(clients)
    each = merged.per_client(DELTA)
    assert each == {
        f"client {i}": epsilon([Charge(Q, NOISE, 100 * i)], delta=DELTA) for i in (1, 2, 3)
    }
    assert merged.worst(DELTA) == ("client 3/e1", each["client 3"])
    assert merged.epsilon(delta=DELTA) == each["client 3"]
    shared = merged.epsilon(["client 1/e1", "client 2/e1"], delta=DELTA)
    assert shared == epsilon([Charge(Q, NOISE, 300)], delta=DELTA)
    told = "per client, declared sizes public, independence of records not known; training before"
    assert told in str(merged.statement(DELTA))


def test_an_export_keeps_every_hash_chain_and_head(clients, tmp_path):
    out = tmp_path / "all.jsonl"
    merge(
        [clients[0], Ledger.open(clients[1], key=NoiseKey.from_seed(2), owner="client 2")]
    ).export(out)
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


def test_reading_a_ledger_changes_no_file(clients):
    with clients[0].open("ab") as file:
        file.write(b"torn")
    before = clients[0].read_bytes()
    assert len(read(clients[0]).entries) == 1
    assert clients[0].read_bytes() == before


@pytest.mark.property
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_changed_byte_of_an_export_is_refused(clients, tmp_path, data):
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


def test_an_export_with_lines_after_the_last_ledger_is_refused(clients, tmp_path):
    out = tmp_path / "all.jsonl"
    merge(clients).export(out)
    for extra in (b"{}\n", b"{}"):
        out.write_bytes(out.read_bytes() + extra)
        with pytest.raises(LedgerError, match="line 17"):
            read(out)
        merge(clients).export(out)


def test_merge_refuses_equal_owners_and_mixed_units(clients, tmp_path):
    with pytest.raises(LedgerError, match="owner"):
        merge([clients[0], clients[0]])
    other = opened(None, 1, unit="client", owner="server")
    with pytest.raises(LedgerError, match="merge only ledgers with the same unit"):
        merge([clients[0], other])
    assert merge([]).worst(DELTA) == ("none", 0.0)


def test_reading_a_file_that_is_no_ledger_is_refused(tmp_path):
    for content in (b"", b"\xff\x00\n", b"[1]\n", b"{}\n"):
        (tmp_path / "x.jsonl").write_bytes(content)
        with pytest.raises(PerdureError, match="line 1"):
            read(tmp_path / "x.jsonl")


def test_a_ledger_stopped_before_the_first_line_is_empty(tmp_path):
    class StoppedError(Exception):
        pass

    def stop(point):
        raise StoppedError

    with pytest.raises(StoppedError):
        Ledger.open(tmp_path / "ledger.jsonl", key=KEY, trace=stop)
    assert (
        read(tmp_path / "ledger.jsonl").entries == []
        and merge([tmp_path / "ledger.jsonl"]).partitions == ()
    )
    assert Ledger.open(tmp_path / "ledger.jsonl", key=KEY).chain.lines
