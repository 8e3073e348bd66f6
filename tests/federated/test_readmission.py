"""Private clients that lost their disks go on with new ledgers, which count the lost ones."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers import chaos
from helpers.federations import SIMULATED, outcome
from perdure.cli.client_accounts import show_clients
from perdure.errors import BudgetError, LedgerError, PerdureError, RunError
from perdure.federated.ledger_heads import OUTSIDE
from perdure.federated.reported_accounts import reported_accounts
from perdure.federated.sent_tasks import FILE, SentTasks
from perdure.learner.checkpoint import Store
from perdure.privacy import Privacy
from perdure.privacy.accounting.charges import covers
from perdure.privacy.ledger import PublicAccount, read
from perdure.utils.seeding import generator

BUDGET = Privacy(epsilon=6.0, seed=5)
LOST = "spent in a lost ledger"


class KilledError(RuntimeError):
    pass


def killed():
    raise KilledError


def served(folder, *args, **options):
    """Start the server again after every kill, and return the last one."""
    while True:
        try:
            return chaos.serve(folder, *args, kill=killed, readmit=True, **options)
        except KilledError:
            continue


def account(folder):
    (part,) = read(Path(folder, "ledger.jsonl")).parts
    return part.account


def own_charges(folder, partition):
    """Charges that this ledger's own run made, without those that it took over."""
    entries = [each for each in account(folder).entries if each.purpose not in {*OUTSIDE, LOST}]
    charges = (each.charge([partition]) for each in entries)
    return [each for each in charges if each is not None]


def assert_nothing_is_uncounted(folder, client):
    """The last ledger of a client has every charge that any of its lost ones made."""
    last = Path(folder, "clients", f"{client:03d}")
    lost = sorted(Path(folder, "gone").glob(f"{client}-*"))
    assert lost
    for partition in account(last).partitions:
        all_own = [charge for place in (*lost, last) for charge in own_charges(place, partition)]
        assert covers(account(last).charges(partition), all_own), (client, partition)


def test_a_client_that_lost_its_ledger_goes_on_with_a_new_one(tmp_path, caplog):
    server = served(tmp_path, 3, 2, deleted=[(4, 1)], privacy=BUDGET, share=0)
    assert server.absences == []
    assert "client 1 lost its last state, and begins anew" in caplog.text
    new = account(tmp_path / "clients/001")
    assert new.owner == "client-1"
    assert server.heads.account(1).lost == 1
    assert {each.purpose for each in new.entries} >= {LOST, "gradient"}
    assert_nothing_is_uncounted(tmp_path, 1)


def test_a_new_ledger_counts_exactly_what_the_last_reply_told(tmp_path):
    served(tmp_path, 3, 2, deleted=[(4, 1)], privacy=BUDGET, share=0)
    (gone,) = Path(tmp_path, "gone").iterdir()
    old, new = account(gone), account(tmp_path / "clients/001")
    for partition in old.partitions:
        taken = [each for each in new.entries if each.purpose == LOST and partition in each.scope]
        before = old.charges(partition)
        steps = sum(each.charge([partition]).steps for each in taken)
        assert steps == sum(each.steps for each in before) > 0
        assert {each.noise_multiplier for each in taken} == {c.noise_multiplier for c in before}


def test_the_budget_holds_for_both_ledgers_together(tmp_path):
    server = served(tmp_path, 3, 2, deleted=[(1, 1), (4, 2)], privacy=BUDGET, share=0)
    found = server.client_epsilons()
    assert sorted(found) == [0, 1, 2]
    for client, statement in found.items():
        own = account(tmp_path / f"clients/00{client}")
        assert statement == own.statement(BUDGET.delta)
        assert 4 < statement.epsilon <= BUDGET.epsilon
        assert statement.simulated
    assert sorted(Path(tmp_path, "gone").iterdir())


def test_tasks_without_a_reply_are_counted_as_charged(tmp_path):
    """The client trained twice, its replies were lost, and then its disk."""
    options = {"privacy": BUDGET, "share": 0, "lost": [(1, 1), (2, 1)]}
    server = served(tmp_path, 3, 3, deleted=[(4, 1)], **options)
    assert {each.client for each in server.absences} == {1}
    assert len(server.absences) == 2
    assert_nothing_is_uncounted(tmp_path, 1)
    (gone,) = Path(tmp_path, "gone").iterdir()
    known = server.heads.account(1)
    assert known.lost == 1
    assert known.continues_from(replace(known, charges={}))
    assert sum(len(own_charges(gone, name)) for name in account(gone).partitions) >= 3


def test_a_disk_that_is_lost_twice_is_counted_twice(tmp_path):
    deleted, lost = [(1, 1), (2, 1), (5, 1)], [(1, 1)]
    server = served(tmp_path, 3, 3, deleted=deleted, lost=lost, privacy=BUDGET, share=0)
    assert server.heads.account(1).lost == 2
    assert server.client_epsilons()[1].epsilon <= BUDGET.epsilon
    assert_nothing_is_uncounted(tmp_path, 1)


def test_tasks_of_a_killed_server_are_counted(tmp_path):
    """The server is killed after the clients have trained, before it writes what it got."""
    kept = served(tmp_path / "kept", 3, 3, privacy=BUDGET, share=0, kills=[2])

    def dies_and_loses():
        chaos.lose(tmp_path / "run", 1, 2)
        raise KilledError

    try:
        chaos.serve(
            tmp_path / "run",
            3,
            3,
            privacy=BUDGET,
            share=0,
            kills=[2],
            kill=dies_and_loses,
            readmit=True,
        )
    except KilledError:
        server = served(tmp_path / "run", 3, 3, privacy=BUDGET, share=0)
    assert server.absences == []
    assert_nothing_is_uncounted(tmp_path / "run", 1)
    assert kept.client_epsilons()[0] == server.client_epsilons()[0]


def test_a_readmitted_client_resumes_to_the_bit(tmp_path):
    options = {"privacy": BUDGET, "share": 0.3, "deleted": [(3, 1)]}
    whole = served(tmp_path / "whole", 4, 3, **options)
    again = served(tmp_path / "again", 4, 3, kills=[2, 5, 7], **options)
    assert outcome(again.learner) == outcome(whole.learner)
    assert again.client_epsilons() == whole.client_epsilons()


@pytest.mark.deep(reason="chaos: the server is killed five times in processes of its own")
def test_chaos_never_leaves_a_charge_out(tmp_path):
    """30 % of replies are lost, 10 % come late, and two clients lose their folders."""
    helpers = str(Path(chaos.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([helpers, *sys.path])}
    command = [sys.executable, "-m", "helpers.chaos", str(tmp_path), "readmit", *"24589"]
    codes = []
    while not codes or codes[-1] != 0:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        codes.append(done.returncode)
        assert done.returncode in (0, -9), done.stderr
    assert codes == [-9] * 5 + [0]
    assert Store(tmp_path).load().facts["exchange"] == 10
    told = reported_accounts(tmp_path)
    lost = {client for client, (_, account) in told.items() if account.lost}
    assert lost
    assert lost <= {1, 4}
    for client in lost:
        assert_nothing_is_uncounted(tmp_path, client)


def test_the_command_shows_what_clients_have_reported(tmp_path, capsys):
    server = served(tmp_path, 3, 2, deleted=[(4, 1)], privacy=BUDGET, share=0)
    show_clients(tmp_path, as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert [(row["client"], row["lost"], row["exchange"]) for row in rows] == [
        (0, 0, 5),
        (1, 1, 5),
        (2, 0, 5),
    ]
    for row in rows:
        told = server.client_epsilons()[row["client"]]
        assert row["statement"]["epsilon"] == told.epsilon
        assert (row["statement"]["unit"], row["statement"]["delta"]) == ("record", BUDGET.delta)
    show_clients(tmp_path, as_json=False)
    assert "lost ledgers" in capsys.readouterr().out
    with pytest.raises(RunError, match="has no client with a reported epsilon"):
        show_clients(tmp_path / "clients", as_json=False)


@pytest.mark.deep(reason="chaos: six runs with random losses")
def test_random_losses_never_leave_a_charge_out(tmp_path):
    for seed in range(6):
        folder = tmp_path / str(seed)
        drawn = torch.randint(0, 1000, (100,), generator=generator(seed, "losses"))
        numbers = iter(drawn.tolist())
        deleted = [(1 + next(numbers) % 6, next(numbers) % 3) for _ in range(3)]
        lost = [(next(numbers) % 6, next(numbers) % 3) for _ in range(3)]
        kills = sorted({1 + next(numbers) % 5 for _ in range(2)})
        server = served(
            folder, 3, 3, deleted=deleted, lost=lost, kills=kills, privacy=BUDGET, share=0
        )
        assert server.exchange == 8
        gone = {int(each.name.split("-")[0]) for each in Path(folder, "gone").iterdir()}
        for client in gone & {int(name) for name in server.heads.accounts}:
            if server.heads.account(client).lost:
                assert_nothing_is_uncounted(folder, client)


def test_a_loss_without_permission_says_how_to_give_it(tmp_path):
    options = {"deleted": [(3, 1)], "privacy": BUDGET, "share": 0}
    server = chaos.serve(tmp_path, 3, 2, kill=killed, **options)
    reasons = [each.reason for each in server.absences]
    assert reasons
    assert all("set federation.readmit = true on the server" in each for each in reasons)
    assert not (tmp_path / "clients/001/private").exists()


def test_a_client_decides_itself_about_a_new_ledger(tmp_path):
    """Its charges would be those that the server tells, which a hostile server may leave out."""
    options = {"deleted": [(3, 1)], "privacy": BUDGET, "share": 0, "consents": False}
    server = served(tmp_path, 3, 2, **options)
    reasons = [each.reason for each in server.absences]
    assert reasons
    assert all("the client's own app does not" in each for each in reasons)
    assert not (tmp_path / "clients/001/private").exists()


def test_permission_may_be_given_when_the_run_is_resumed(tmp_path):
    options = {"deleted": [(3, 1)], "privacy": BUDGET, "share": 0, "kills": [4]}
    with pytest.raises(KilledError):
        chaos.serve(tmp_path, 3, 2, kill=killed, **options)
    server = served(tmp_path, 3, 2, **options)
    assert server.absences == []
    assert server.heads.account(1).lost == 1
    assert_nothing_is_uncounted(tmp_path, 1)


def test_a_restored_old_folder_is_refused_after_a_readmission(tmp_path):
    """The old disk comes back, with a ledger that does not know the new one."""
    options = {"privacy": BUDGET, "share": 0, "kills": [2, 4]}
    with pytest.raises(KilledError):
        chaos.serve(tmp_path, 3, 3, kill=killed, readmit=True, **options)
    shutil.copytree(tmp_path / "clients/001", tmp_path / "old")
    chaos.lose(tmp_path, 1, 2)
    with pytest.raises(KilledError):
        chaos.serve(tmp_path, 3, 3, kill=killed, readmit=True, **options)
    shutil.rmtree(tmp_path / "clients/001")
    shutil.copytree(tmp_path / "old", tmp_path / "clients/001")
    server = served(tmp_path, 3, 3, **options)
    assert {each.client for each in server.absences} == {1}
    assert all("LedgerError" in type(each.error).__name__ for each in server.absences)


def test_a_spent_budget_leaves_the_client_out(tmp_path):
    """Server and disk are lost three times in the same round, so nothing is left for the rest."""

    def dies_and_loses():
        chaos.lose(tmp_path, 1, 2)
        (tmp_path / "killed-3").unlink()
        raise KilledError

    options = {"privacy": BUDGET, "share": 0, "kills": [3], "readmit": True}
    for _ in range(3):
        with pytest.raises(KilledError):
            chaos.serve(tmp_path, 3, 1, kill=dies_and_loses, **options)
    server = served(tmp_path, 3, 1, privacy=BUDGET, share=0)
    assert {type(each.error) for each in server.absences} == {BudgetError}
    assert {each.client for each in server.absences} == {1}
    assert server.client_epsilons()[1].epsilon <= BUDGET.epsilon


def test_a_cap_gives_no_bound_for_lost_tasks(tmp_path):
    cap = Privacy(epsilon=50.0, noise_multiplier=1.0, seed=5)
    options = {"privacy": cap, "share": 0, "lost": [(2, 1)]}
    server = served(tmp_path, 3, 2, deleted=[(3, 1)], **options)
    assert {each.client for each in server.absences} == {1}
    assert any("a cap (epsilon and" in each.reason for each in server.absences)


def test_given_noise_is_used_again_after_a_loss(tmp_path):
    server = served(tmp_path, 3, 2, deleted=[(3, 1)], lost=[(2, 1)], privacy=SIMULATED, share=0)
    assert server.heads.account(1).lost == 1
    assert_nothing_is_uncounted(tmp_path, 1)


def test_a_journal_with_missing_lines_is_refused(tmp_path):
    options = {"privacy": BUDGET, "share": 0, "kills": [3]}
    with pytest.raises(KilledError):
        chaos.serve(tmp_path, 3, 2, kill=killed, readmit=True, **options)
    path = tmp_path / FILE
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1]))
    with pytest.raises(RunError, match=r"sent.jsonl has 1 lines, but the checkpoint"):
        served(tmp_path, 3, 2, **options)
    path.write_text("".join(["{}\n", *lines[1:]]))
    with pytest.raises(RunError, match=r"sent.jsonl is damaged"):
        served(tmp_path, 3, 2, **options)


def test_a_line_that_was_not_complete_was_never_sent(tmp_path):
    sent = SentTasks(tmp_path)
    sent.add(0, [0, 1])
    sent.add(1, [0, 1])
    with (tmp_path / FILE).open("a") as file:
        file.write('{"exchange":2,"cli')
    again = SentTasks(tmp_path, least=2)
    again.add(2, [0])
    assert again.lines == 3
    assert again.after(0, -1) == [(0, False), (1, False)]
    assert again.after(0, 0) == [(1, False)]
    assert again.after(1, -1) == [(0, False)]
    assert SentTasks(tmp_path).after(0, -1) == again.after(0, -1)


def test_a_task_that_was_refused_counts_only_as_begun_anew(tmp_path):
    sent = SentTasks(tmp_path)
    sent.add(3, [1])
    sent.add(3, [1], anew=True)
    sent.add(4, [1])
    assert sent.after(1, 2) == [(3, True)]
    sent.settle(1, 3)
    assert sent.after(1, 2) == []


def example():
    return PublicAccount.parse(
        json.dumps(
            {
                "owner": "client-0",
                "unit": "record",
                "relation": "add-remove",
                "delta": 1e-5,
                "simulated": True,
                "sampling": "Poisson sampling",
                "independence": "by construction",
                "public_facts": [],
                "continues": False,
                "lost": 0,
                "noise": [1.0],
                "sizes": {"a": 100},
                "charges": {"a": [[0.1, 1.0, 5, "grid-gaussian"]]},
                "outside": {},
            }
        ),
        where="the test",
    )


def test_an_account_survives_its_text():
    assert PublicAccount.parse(example().text(), where="x") == example()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("delta", 0.0),
        ("delta", 2.0),
        ("delta", None),
        ("unit", "client"),
        ("relation", "replace-one"),
        ("lost", -1),
        ("lost", 1.5),
        ("lost", True),
        ("noise", []),
        ("noise", [0.0]),
        ("noise", ["1"]),
        ("sizes", {"a": 0}),
        ("sizes", {"b": 100}),
        ("sizes", []),
        ("charges", {"a": [[0.1, -1.0, 5, "grid-gaussian"]]}),
        ("charges", {"a": [[0.1, 1.0, -5, "grid-gaussian"]]}),
        ("charges", {"a": [[0.1, 1.0, 5, "no noise"]]}),
        ("charges", {"a": 3}),
        ("outside", {"b": []}),
        ("sampling", "none at all"),
        ("independence", "sure"),
        ("public_facts", [3]),
        ("owner", 3),
        ("simulated", 1),
    ],
)
def test_a_wrong_account_is_refused(field, value):
    facts = json.loads(example().text()) | {field: value}
    with pytest.raises(LedgerError, match="client 4 reports an account that cannot be read"):
        PublicAccount.parse(json.dumps(facts), where="client 4")


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", "[" * 100_000, "x" * 1_000_001])
def test_a_text_that_is_no_account_is_refused(text):
    with pytest.raises(PerdureError, match="cannot be read"):
        PublicAccount.parse(text, where="client 4")
