"""Apps of a deployment: their files, their keys, and a run of both app objects."""

import math
import re
import runpy
import socket
import ssl
import stat
import sys
import threading
import tomllib
from contextlib import contextmanager, suppress

import pytest

import perdure.federated  # noqa: F401 - first, because it knows which warnings to let pass
from helpers.federations import without_spending
from perdure.deployment import (
    check_port,
    check_superlink,
    client_app_of,
    make_certificates,
    make_node_key,
    new_app,
    server_app_of,
    supernode_command,
)
from perdure.deployment.apps import configured
from perdure.errors import ConfigError, FederationError, RunError
from perdure.experiment import parse, read_result, run, untimed
from perdure.federated import InProcessGrid
from perdure.federated.flower_adapter import error_reply
from perdure.privacy.ledger import merge

CONFIG = """
name = "Two sites"
[data]
experiences = 2
[model]
hidden = [4]
[training]
optimizer = "SGD"
learning_rate = 0.1
epochs = 1
batch_size = 128
[federation]
clients = 2
rounds = 1
[[arms]]
strategy = "replay"
memory_size = 20
""".replace("Two sites", "two-sites")


@pytest.fixture
def app(tmp_path):
    new_app(tmp_path / "app", CONFIG)
    return tmp_path / "app"


def tensors(folder):
    """Return the contents of all files of clients' state, by their paths."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.glob("arms/*/clients/*/**/*.safetensors"))
    }


def serve(config, nodes, settings, app=None):
    """Run the server app and the client app of a config in this process."""
    from flwr.app import Context, RecordDict

    app = app or client_app_of(config)
    with InProcessGrid(app, 2, node_config=nodes).running() as grid:
        server_app_of(config)(grid, Context(1, 0, {}, RecordDict(), settings))


def test_apps_in_this_process_give_the_result_of_a_run(app, tmp_path, monkeypatch):
    config = app / "federation_two_sites" / "config.toml"
    monkeypatch.chdir(tmp_path)
    settings = {"run-folder": str(tmp_path / "there"), "training.epochs": 1}
    serve(config, {"state": str(tmp_path / "state")}, settings)
    here = run(parse(CONFIG), CONFIG, tmp_path / "here")
    assert untimed(read_result(tmp_path / "there")) == untimed(here)
    own = tensors(tmp_path / "here")
    assert own and tensors(tmp_path / "state" / "two-sites") == own
    assert (tmp_path / "there" / "report.html").exists()


WARDS = """
name = "wards"
[data]
name = "helpers.own_data:blobs"
experiences = 2
[model]
name = "mlp"
hidden = [4]
[training]
optimizer = "Adam"
learning_rate = 0.01
batch_size = 8
[federation]
clients = 2
rounds = 2
local_epochs = 2
split = "by_attribute"
attribute = "domain"
client_sizes = [[12, 12], [12, 12]]
[[arms]]
strategy = "replay"
memory_size = 8
"""


def test_sites_that_hold_only_their_records_train_alike(tmp_path):
    """The sites' sizes are public, and their records are on no other machine."""
    here = run(parse(WARDS), WARDS, tmp_path / "here")
    new_app(tmp_path / "app", WARDS.replace(":blobs", ":wards"))
    sites = [tmp_path / f"site{k}" for k in (0, 1)]
    for ward, site in enumerate(sites):
        site.mkdir()
        (site / "ward").write_text(str(ward))
    places = [{"state": str(site / "state"), "data": str(site)} for site in sites]
    config = tmp_path / "app" / "federation_wards" / "config.toml"
    serve(config, places, {"run-folder": str(tmp_path / "there")})
    (mine,), (theirs,) = here["arms"], read_result(tmp_path / "there")["arms"]
    assert mine["accuracy_matrix"] == theirs["accuracy_matrix"]
    own = tensors(tmp_path / "here")
    deployed = {k: v for site in sites for k, v in tensors(site / "state" / "wards").items()}
    assert own and deployed == own


def test_settings_of_a_run_replace_those_of_the_config(app):

    config = app / "federation_two_sites" / "config.toml"
    table = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert table["federation"] == {"clients": 2, "rounds": 1} and table["name"] == "two-sites"
    unchanged = {"run-folder": "", "name": "two-sites", "federation.rounds": 1}
    assert configured(config, unchanged)[1] == CONFIG
    changed, text = configured(config, {"federation.rounds": 3, "name": "second"})
    assert (changed.federation.rounds, changed.name) == (3, "second")
    assert parse(text) == changed
    with pytest.raises(ConfigError, match=r"rounds = 0 is not allowed"):
        configured(config, {"federation.rounds": 0})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--node-config has no state; add state=FOLDER"),
        ({"state": "x", "partition-id": "3"}, "partition-id=3 num-partitions=2; allowed: .*0 .. 1"),
    ],
)
def test_a_site_with_a_wrong_node_config_is_named(app, given, message):
    config = app / "federation_two_sites" / "config.toml"
    with InProcessGrid(client_app_of(config), 2, node_config=given).running() as grid:
        from flwr.app import Message, RecordDict

        from perdure.federated.trials import TrialGrid

        asked = [Message(RecordDict(), 1, "query.partition")]
        (bare,) = grid.send_and_receive(asked)
        assert "the message names no training" in bare.error.reason
        asked = [Message(RecordDict(), 1, "query.partition")]
        (reply,) = TrialGrid(grid, "replay-plain").send_and_receive(asked)
    assert re.search(message, reply.error.reason)


def test_a_full_folder_and_a_config_without_clients_are_refused(app, tmp_path):
    with pytest.raises(RunError, match=r"has files; give a new folder"):
        new_app(app, CONFIG)
    alone = CONFIG.replace("[federation]\nclients = 2\nrounds = 1\n", "")
    with pytest.raises(ConfigError, match=r"no table \[federation\]; allowed"):
        new_app(tmp_path / "other", alone, source="mine.toml")
    assert not (tmp_path / "other").exists()


def test_scripts_of_an_app_are_programs_without_a_shell(app):
    scripts = sorted((app / "scripts").glob("*.py"))
    assert len(scripts) == 6
    for script in scripts:
        text = script.read_text()
        compile(text, script.name, "exec")
        assert "shell" not in text and "os.system" not in text


@pytest.mark.parametrize(
    ("script", "words", "line"),
    [
        ("make_certificates", ["host", "--days", "0"], "days = 0 is not allowed"),
        ("make_certificates", ["höst"], "hosts = 'höst' is not allowed; allowed: names and addr"),
        ("make_node_key", ["--key", "README.md"], "key = 'README.md' .* a file that does not exi"),
        ("start_superlink", [], r"ca.crt is missing; run scripts/make_certificates.py HOST"),
        ("register_site", ["localhost:1", "none.pub"], r"key = 'none.pub' .*\(No such file or di"),
        ("register_site", ["localhost:1", "README.md"], r"'README.md' .* site/keys/node.pub of a"),
        ("start_run", ["localhost:1"], "ca.crt is no certificate .*get the newest ca.crt"),
        ("start_run", ["localhost:1", "--set", "x"], "--set = 'x' .* such as training.epochs=3"),
        (
            "start_run",
            ["localhost:1", "--set", "training.epoch=3"],
            "--set = 'training.epoch' .* did you mean 'training.epochs'",
        ),
        ("start_run", ["localhost:1", "--set", "federation.rounds=0"], "federation.rounds = 0 is"),
        ("start_supernode", ["localhost:1", "--partition", "2"], "--partition 2 is not allowed"),
        ("start_supernode", ["localhost", "--partition", "1"], "ca.crt cannot be read"),
    ],
)
def test_a_mistake_ends_a_script_with_one_line(app, monkeypatch, script, words, line):
    monkeypatch.chdir(app)
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(app / "scripts" / f"{script}.py"), run_name="__main__")
    told = str(ended.value.code)
    assert told.startswith(f"{script}: ") and "\n" not in told and re.search(line, told), told


def test_a_port_in_use_is_refused_before_a_program_starts():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port = {port} .* a free port of 127.0.0.1"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


@contextmanager
def answering(handle):
    """Run a server on the loopback that passes its first connection to a function."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            connection, _ = listening.accept()
            with connection:
                handle(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        thread.join(5)


def with_tls(folder):
    """Return a function that answers a connection with TLS and the certificate of a folder."""

    def handle(connection):
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(folder / "server.pem", folder / "server.key")
        with suppress(OSError):  # the other side may refuse the certificate
            context.wrap_socket(connection, server_side=True).close()

    return handle


def test_certificates_need_their_authority(tmp_path):
    own, foreign = (make_certificates(tmp_path / name, ["site.example"]) for name in "ab")
    with answering(with_tls(own.parent)) as address:
        check_superlink(address, authority=own)
    with (
        answering(with_tls(own.parent)) as address,
        pytest.raises(FederationError, match=r"does not fit .*b/ca.crt .*get the newest ca.crt"),
    ):
        check_superlink(address, authority=foreign)
    with (
        answering(with_tls(own.parent)) as address,
        pytest.raises(FederationError, match=r"accepts TLS only"),
    ):
        check_superlink(address, authority=None)
    with (
        answering(lambda connection: connection.sendall(b"HTTP/1.1 400\r\n\r\n")) as address,
        pytest.raises(FederationError, match=r"does not answer with TLS"),
    ):
        check_superlink(address, authority=own)
    with pytest.raises(FederationError, match=r"no connection to 127.0.0.1:1 within 1 seconds"):
        check_superlink("127.0.0.1:1", authority=own, timeout=1)
    own.write_text("no certificate")
    with pytest.raises(FederationError, match=r"ca.crt is no certificate .*get the newest ca.crt"):
        check_superlink("127.0.0.1:1", authority=own, timeout=1)


def test_keys_can_be_read_by_their_owner_only(tmp_path):
    from cryptography.hazmat.primitives.serialization import (
        load_ssh_private_key,
        load_ssh_public_key,
    )

    make_certificates(tmp_path / "server", ["site.example"])
    public = make_node_key(tmp_path / "keys" / "node")
    for key in (tmp_path / "server" / "server.key", tmp_path / "keys" / "node"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    private = load_ssh_private_key((tmp_path / "keys" / "node").read_bytes(), None)
    assert private.public_key() == load_ssh_public_key(public.read_bytes())
    for make in (
        lambda: make_node_key(tmp_path / "keys" / "node"),
        lambda: make_certificates(tmp_path / "server", ["site.example"]),
    ):
        with pytest.raises(ConfigError, match=r"a file that does not exist"):
            make()


def test_a_supernode_command_quotes_folders_with_spaces(tmp_path):
    from flwr.common.config import parse_config_args

    words = supernode_command(
        "host:1",
        authority="ca.crt",
        key="node",
        partition=1,
        partitions=3,
        state=tmp_path / "my state",
    )
    assert words[0].startswith(sys.exec_prefix)
    given = words[words.index("--node-config") + 1]
    assert parse_config_args([given]) == {
        "partition-id": 1,
        "num-partitions": 3,
        "state": str(tmp_path / "my state"),
    }


PRIVATE = (
    CONFIG.replace("rounds = 1", "rounds = 3")
    + """private = true
[privacy]
epsilon = 8.0
delta = 1e-4
"""
)


def deployed(tmp_path, text, config="federation_two_sites/config.toml"):
    """Run the app of a config in this process, and return its result."""
    new_app(tmp_path / "app", text)
    serve(
        tmp_path / "app" / config,
        {"state": str(tmp_path / "state")},
        {"run-folder": str(tmp_path / "there")},
    )
    return read_result(tmp_path / "there")


def test_private_arms_are_trained_at_the_sites_alike(tmp_path):
    """The ledgers stay at the sites, and the server states what they have reported."""
    simulated = PRIVATE + "seed = 5\n"
    there = deployed(tmp_path, simulated)
    here = run(parse(simulated), simulated, tmp_path / "here")
    assert without_spending(untimed(there)) == without_spending(untimed(here))
    (mine,), (theirs,) = here["arms"], there["arms"]
    spent, reported = mine["spending"], theirs["spending"]
    assert 7.5 < theirs["epsilon"]["value"] <= 8
    assert "simulation" in theirs["epsilon"]["text"]
    assert {each["purpose"] for each in reported} == {"reported by the client"}
    assert sum(each["steps"] for each in reported) == sum(each["steps"] for each in spent)
    assert tensors(tmp_path / "state" / "two-sites") == tensors(tmp_path / "here")
    assert not list((tmp_path / "there").rglob("ledger.jsonl"))
    assert not list((tmp_path / "there").rglob("key"))
    page = (tmp_path / "there" / "report.html").read_text()
    assert "8.00" in page and "reported by the client" in page


def test_secret_noise_of_sites_is_stated_by_the_server(tmp_path):
    (arm,) = deployed(tmp_path, PRIVATE)["arms"]
    sites = merge(sorted((tmp_path / "state").rglob("ledger.jsonl")))
    assert len(sites.parts) == 2
    assert arm["epsilon"]["value"] == sites.statement(1e-4).epsilon
    assert arm["epsilon"]["text"] == str(sites.statement(1e-4))
    assert arm["epsilon_over_time"][0] <= arm["epsilon_over_time"][1] == arm["epsilon"]["value"]


def test_sites_calibrate_for_the_rounds_in_which_they_are_asked(tmp_path):
    """Each site trains in half of the rounds, and spends the whole budget in them."""
    text = PRIVATE.replace("rounds = 3", "rounds = 6\nfraction = 0.5")
    (arm,) = deployed(tmp_path, text)["arms"]
    assert 7 < arm["epsilon"]["value"] <= 8


def test_epsilon_is_infinite_if_a_site_never_reported(tmp_path):
    """A site that was sent private tasks may have trained; nobody knows what it has charged."""
    new_app(tmp_path / "app", PRIVATE)
    config = tmp_path / "app" / "federation_two_sites" / "config.toml"
    sites = client_app_of(config)

    def loses_replies(message, context):
        reply = sites(message, context)
        lost = context.node_config["partition-id"] == 1 and "task" in message.content
        told = "exchange" in message.content["task"] if lost else False
        return error_reply(message, FederationError("the line broke")) if told else reply

    serve(
        config,
        {"state": str(tmp_path / "state")},
        {"run-folder": str(tmp_path / "there")},
        app=loses_replies,
    )
    (arm,) = read_result(tmp_path / "there")["arms"]
    assert (tmp_path / "state/two-sites/arms/replay-private/clients/001/ledger.jsonl").exists()
    assert arm["epsilon"]["value"] == math.inf
    assert "epsilon infinite" in arm["epsilon"]["text"]


def test_a_value_that_is_not_finite_stays_at_the_private_site(tmp_path, caplog):
    broken = PRIVATE.replace("[data]\n", '[data]\nname = "helpers.own_data:with_nan"\n')
    (arm,) = deployed(tmp_path, broken)["arms"]
    assert {each["cause"] for each in arm["seeds"][0]["absences"]} == {"absent"}
    assert arm["epsilon"]["value"] <= 8  # of the other site, because this one has begun nothing
    told = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert "node 1 is left out: DataError: see the client's log" in told
    assert not any("row 1" in each for each in told)
