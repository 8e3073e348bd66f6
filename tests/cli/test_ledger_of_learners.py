"""Ledgers of learners and federations without a config, read with the command line."""

import json
import shutil
from functools import partial

import pytest
import torch

from helpers.ledger_cli import shown
from perdure.data import Experience, Records, Stream
from perdure.federated import Federation, fit_federated
from perdure.learner.learner import Learner
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.ledger.merged import merge
from perdure.privacy.noise.key import NoiseKey
from perdure.privacy.settings import Privacy
from perdure.strategies import EWC, Naive

SECRET = Privacy(noise_multiplier=1.0, delta=1e-3)
MORE = ("--noise-multiplier", 1.1, "--sampling-rate", 0.1, "--steps", 5)


def site(toy_data, client, partition="stays"):
    """Return a hospital's stream of every other record, with a partition name that other hospitals
    use too.
    """
    own = toy_data.train.take(torch.arange(client, len(toy_data.train), 2))
    own = Records(inputs=own.inputs, labels=own.labels, ids=own.ids, partition=partition)
    one = Experience(index=0, train=own, test=toy_data.test, classes=(0, 1, 2, 3))
    return Stream(
        name="hospital",
        scenario="domain",
        num_classes=4,
        input_shape=(5,),
        experiences=(one,),
        assigned_by_record=True,
    )


@pytest.fixture
def federated_in(toy_data, toy_model):
    """Train two hospitals in a folder."""

    def train(folder, **changes):
        streams = [site(toy_data, client) for client in (0, 1)]
        options = {"optimizer": partial(torch.optim.SGD, lr=0.1), "iterations": 2} | changes

        def make(client):
            model = toy_model(streams[0])
            return Learner(
                model=model, strategy=Naive(), batch_size=8, **{"privacy": SECRET} | options
            )

        fit_federated(make, streams, Federation(clients=2, rounds=1), folder=folder)
        return folder

    return train


# --------------------------------------------------------------------------- one statement


def test_show_prints_the_same_privacy_statement_as_python(
    perdure, learner_of, toy_stream, tmp_path
):
    learner = learner_of(
        EWC(strength=1.0),
        privacy=Privacy(noise_multiplier=1.5, delta=1e-3),
        folder=tmp_path / "run",
        iterations=2,
    )
    learner.fit(toy_stream())
    told = str(learner.private_sum.ledger.statement(delta=1e-3))
    assert "delta 0.001" in told and told.count("trusted curator,") == 1
    out = shown(perdure("show", tmp_path / "run"))
    assert f"worst partition by itself: {told}\n" in out
    assert "delta 0.001, PLD" in shown(perdure("project", tmp_path / "run", *MORE))
    # also where only the ledger and its head were sent
    sent = tmp_path / "sent"
    sent.mkdir()
    for name in ("ledger.jsonl", "ledger.head.json"):
        shutil.copy(tmp_path / "run" / name, sent)
    assert told in shown(perdure("show", sent))


def test_raw_diagnostics_make_the_printed_epsilon_infinite(
    perdure, learner_of, toy_stream, tmp_path
):
    privacy = Privacy(noise_multiplier=1.5, delta=1e-3, diagnostics="raw")
    learner = learner_of(privacy=privacy, folder=tmp_path / "run", iterations=2)
    learner.fit(toy_stream())
    told = str(learner.private_sum.ledger.statement(delta=1e-3))
    assert "infinite" in told and told in shown(perdure("show", tmp_path / "run"))


def test_show_prints_the_privacy_statement_of_all_clients(perdure, federated_in, tmp_path):
    folder = federated_in(tmp_path / "run")
    ledgers = sorted(folder.glob("clients/*/ledger.jsonl"))
    told = str(merge(ledgers).statement(delta=1e-3))
    assert "trusted curator per client" in told
    assert f"{told}\n" in shown(perdure("show", folder))
    alone = shown(perdure("show", folder, "--owner", "client-1"))
    assert "trusted curator," in alone and "per client" not in alone


def test_the_ledger_stores_the_latest_delta_given_at_opening(tmp_path):
    key = NoiseKey.from_seed(0)
    path = tmp_path / "ledger.jsonl"
    for delta in (1e-3, 1e-4, 1e-4):
        assert Ledger.open(path, key=key, delta=delta).delta == delta
    assert Ledger.open(path, key=key).delta == merge([path]).delta == 1e-4
    assert len(path.read_text().splitlines()) == 2


# --------------------------------------------------------------------------- clients by default


def test_client_ledgers_are_owned_by_client_n_by_default(perdure, federated_in, tmp_path):
    folder = federated_in(tmp_path / "run")
    lines = shown(perdure("head", folder)).splitlines()
    assert [line.partition("@")[0] for line in lines] == ["client-0", "client-1"]
    facts = json.loads(shown(perdure("show", folder, "--json")))
    assert [(row["owner"], row["partition"]) for row in facts["partitions"]] == [
        ("client-0", "stays"),
        ("client-1", "stays"),
    ]
    for line in lines:
        shown(perdure("verify", folder, "--at-least", line))


def test_a_ledger_is_owned_by_the_owner_given_to_the_learner(
    perdure, toy_data, toy_model, tmp_path
):
    streams = [site(toy_data, client) for client in (0, 1)]

    def make(client):
        return Learner(
            model=toy_model(streams[0]),
            strategy=Naive(),
            optimizer=partial(torch.optim.SGD, lr=0.1),
            iterations=1,
            privacy=SECRET,
            owner=f"hospital-{client}",
        )

    fit_federated(make, streams, Federation(clients=2, rounds=1), folder=tmp_path)
    out = shown(perdure("head", tmp_path))
    assert [line.partition("@")[0] for line in out.splitlines()] == ["hospital-0", "hospital-1"]


# --------------------------------------------------------------------------- ledgers of one name


@pytest.fixture
def namesakes(tmp_path):
    """Return a folder with two client ledgers of the same owner and partition name, each with its
    own secret key.
    """
    for client in (0, 1):
        folder = tmp_path / "clients" / f"{client:03d}"
        key = NoiseKey.from_os(folder / "private" / "key")
        ledger = Ledger.open(folder / "ledger.jsonl", key=key, owner="curator")
        ledger.declare("stays", 12 + client)
    return tmp_path


def test_verify_matches_heads_to_ledgers_with_the_same_owner(perdure, namesakes):
    lines = shown(perdure("head", namesakes)).splitlines()
    assert [line.partition("@")[0] for line in lines] == ["curator", "curator"]
    for line in lines:
        shown(perdure("verify", namesakes, "--at-least", line))
    # without one of the keys, the other ledger is no reason for an alarm either
    (namesakes / "clients" / "000" / "private" / "key").unlink()
    for line in lines:
        code, out, _ = perdure("verify", namesakes, "--at-least", line)
        assert code != 1 and "WRONG" not in out


def test_verify_finds_a_rollback_among_ledgers_of_one_owner(perdure, namesakes, monkeypatch):
    monkeypatch.setenv("PERDURE_STATE", "off")
    folder = namesakes / "clients" / "001"
    before = namesakes / "before"
    shutil.copytree(folder, before)
    key = NoiseKey.from_os(folder / "private" / "key")
    Ledger.open(folder / "ledger.jsonl", key=key, owner="curator").declare("more", 3)
    lines = shown(perdure("head", namesakes)).splitlines()
    shutil.rmtree(folder)
    shutil.copytree(before, folder)
    shutil.rmtree(before)
    shown(perdure("verify", namesakes, "--at-least", lines[0]))
    code, out, _ = perdure("verify", namesakes, "--at-least", lines[1])
    assert code == 1 and out.count("WRONG") == 1 and "clients/001" in out


def test_show_names_folders_if_ledgers_have_the_same_owner(perdure, namesakes):
    facts = json.loads(shown(perdure("show", namesakes, "--json")))
    owners = [row["owner"] for row in facts["partitions"]]
    assert owners == ["clients/000/curator", "clients/001/curator"]
    assert "per client" in facts["statement"]["text"]
    one = json.loads(shown(perdure("show", namesakes, "--json", "--owner", owners[1])))
    assert [row["declared_size"] for row in one["partitions"]] == [13]
    both = json.loads(shown(perdure("show", namesakes, "--json", "--owner", "curator")))
    assert len(both["partitions"]) == 2
    assert shown(perdure("project", namesakes, *MORE)).count("\n  stays") == 2
