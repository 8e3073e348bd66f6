"""Lost and late replies, deleted client folders and a killed server do not end or change a run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import chaos
from helpers.federations import SIMULATED, outcome
from perdure.federated.client_store import FRESH, older_state
from perdure.learner.checkpoint import Store
from perdure.privacy.accounting.charges import Charge


class KilledError(RuntimeError):
    pass


def killed():
    raise KilledError


def until_done(folder, *args, **options):
    """Start the server again after every kill, and return the last one and the number of kills."""
    kills = 0
    while True:
        try:
            return chaos.serve(folder, *args, kill=killed, **options), kills
        except KilledError:
            kills += 1


def charged(folder, client):
    """Return the gradient steps that a client's ledger charges."""
    lines = Path(folder, "clients", f"{client:03d}", "ledger.jsonl").read_text().splitlines()
    entries = map(json.loads, lines)
    return sum(each["steps"] for each in entries if each.get("purpose") == "gradient")


def test_a_run_with_faults_and_kills_equals_one_with_faults(tmp_path):
    deleted = [(4, 1)]
    whole, none = until_done(tmp_path / "whole", 3, 2, deleted=deleted)
    again, kills = until_done(tmp_path / "again", 3, 2, deleted=deleted, kills=[2, 4])
    assert (none, kills) == (0, 2)
    assert outcome(again.learner) == outcome(whole.learner)
    assert {each.cause for each in whole.absences} == {"late"}
    assert 2 <= len(whole.absences) <= 10


def test_a_client_with_a_damaged_state_goes_on_from_the_older(tmp_path, caplog):
    """Eight bytes inside Adam's moments are overwritten."""

    def damage():
        store = Store(tmp_path / "clients" / "002")
        path = store.public / f"{store.numbers()[-1]:06d}.safetensors"
        data = bytearray(path.read_bytes())
        data[-40:-32] = bytes(8 * [77])
        path.write_bytes(data)

    server = chaos.serve(tmp_path, 3, 3, kills=[2], share=0, kill=damage)
    assert "client 2 lost its last state, and goes on from exchange 0" in caplog.text
    assert "a saved state of client 2 is left out" in caplog.text
    assert server.absences == []


def test_a_client_that_lost_its_folder_begins_anew(tmp_path, caplog):
    server = chaos.serve(tmp_path, 3, 2, deleted=[(4, 1)], share=0)
    assert "client 1 lost its last state, and begins anew" in caplog.text
    assert server.absences == []
    assert len(Store(tmp_path / "clients" / "001").numbers()) == 2


def test_a_private_client_without_its_ledger_stays_out(tmp_path):
    server, _ = until_done(tmp_path, 3, 1, deleted=[(2, 1)], privacy=SIMULATED, share=0)
    assert len(server.learner.matrix) == 2
    refused = {each.client for each in server.absences if "server records" in each.reason}
    assert refused == {1}


def test_a_client_that_lost_its_first_reply_and_folder_stays_out(tmp_path):
    """The server has no head of its ledger, which begins anew with the charges made elsewhere."""
    privacy = replace(SIMULATED, spent=(Charge(0.1, 1.0, 5),))
    options = {"privacy": privacy, "share": 0, "lost": [(0, 1)], "kills": [2]}
    server, kills = until_done(tmp_path, 3, 2, deleted=[(1, 1)], **options)
    assert kills == 1
    assert sorted(server.heads.texts) == ["0", "2"]
    assert {each.client for each in server.absences} == {1}
    reasons = {each.reason for each in server.absences}
    assert all("has sent a private task to this client" in each for each in reasons), reasons


def test_a_client_that_lost_its_first_reply_only_goes_on(tmp_path):
    server = chaos.serve(tmp_path, 3, 1, privacy=SIMULATED, share=0, lost=[(0, 1)])
    assert [(each.exchange, each.client, each.cause) for each in server.absences] == [
        (0, 1, "late")
    ]
    assert sorted(server.heads.texts) == ["0", "1", "2"]


def test_only_an_older_state_is_read_from_an_error():
    assert older_state("LostStateError: last state 3: the client", 7) == 3
    assert older_state(f"LostStateError: last state {FRESH}: the client", 7) == FRESH
    for reason in ("last state 7: x", "last state -2: x", "last state x: y", "something"):
        assert older_state(f"LostStateError: {reason}", 7) is None
    assert older_state("FederationError: last state 3: the client", 7) is None


@pytest.mark.deep(reason="chaos: the server is killed five times in processes of its own")
@pytest.mark.parametrize("privacy", ["plain", "private"])
def test_a_server_killed_five_times_gives_the_same_result(tmp_path, privacy):
    """30 % of replies are lost, 10 % come late, and two clients lose their folders."""
    helpers = str(Path(chaos.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([helpers, *sys.path])}

    def finish(name, *kills):
        codes = []
        while not codes or codes[-1] != 0:
            command = [sys.executable, "-m", "helpers.chaos", str(tmp_path / name), privacy, *kills]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            codes.append(done.returncode)
            assert done.returncode in (0, -9), done.stderr
        return codes

    assert finish("whole") == [0]
    assert finish("killed", "2", "4", "5", "8", "9") == [-9] * 5 + [0]
    whole, again = (Store(tmp_path / name).load() for name in ("whole", "killed"))
    assert whole.facts["exchange"] == 10
    assert whole.tensors.keys() == again.tensors.keys()
    timings = {"clients.seconds"}
    names = whole.tensors.keys() - timings
    assert not [
        name for name in sorted(names) if not whole.tensors[name].equal(again.tensors[name])
    ]
    if privacy == "private":
        for client in (0, 2, 3, 5):
            assert charged(tmp_path / "killed", client) >= charged(tmp_path / "whole", client) > 0
