"""A deployment on the loopback: TLS, node keys, two SuperNodes, one of them killed in a round."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest

import perdure.federated  # noqa: F401 - first, because it knows which warnings to let pass
from perdure.deployment import check_site, check_superlink, make_certificates, make_node_key
from perdure.deployment import new_app as write_app
from perdure.errors import FederationError
from perdure.experiment import parse, read_result, run, untimed

CONFIG = """
name = "loopback"
[data]
experiences = 2
[model]
hidden = [8]
[training]
optimizer = "Adam"
learning_rate = 0.003
epochs = 2
batch_size = 64
[federation]
clients = 2
rounds = 2
quorum = 1.0
deadline = 240.0
[[arms]]
strategy = "replay"
memory_size = 20
"""
PATIENCE = 900.0
REFUSED_WITHIN = 15.0
"""Seconds to wait for a step of Flower on a busy machine, and for a refusal."""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def script(app, name, *words):
    return [sys.executable, str(app / "scripts" / f"{name}.py"), *map(str, words)]


@contextmanager
def program(command, log):
    """Run a program and its children, with the output in a file, and kill all at the end."""
    with log.open("ab") as out:
        started = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        yield started
    finally:
        kill(started)


def kill(started):
    with suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    started.wait()


def until(condition, what):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"no {what} within {PATIENCE:g} seconds"
        time.sleep(0.5)


def connects(address, authority):
    with suppress(FederationError):
        check_superlink(address, authority=authority, timeout=2)
        return True
    return False


def states(folder):
    """Return the files of the clients' state, by their paths."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.glob("arms/*/clients/*/**/*.safetensors"))
    }


@pytest.fixture
def app(tmp_path):
    write_app(tmp_path / "app", CONFIG)
    return tmp_path / "app"


@pytest.mark.deep(reason="deployment: every message starts a process that imports torch")
def test_a_killed_supernode_changes_no_result(app, tmp_path):
    address = f"localhost:{free_port()}"
    authority = app / "server" / "certificates" / "ca.crt"
    subprocess.run(script(app, "make_certificates", "localhost"), check=True)
    keys = [tmp_path / f"node{k}" for k in range(3)]
    for key in keys:
        subprocess.run(script(app, "make_node_key", "--key", key), check=True)

    def supernode(k, port):
        words = (address, "--partition", k, "--authority", authority, "--key", keys[k])
        own = ("--state", tmp_path / f"state{k}", "--port", port)
        return script(app, "start_supernode", *words, *own)

    def trains(k, times):
        log = tmp_path / f"node{k}.log"
        return len(re.findall("Receiving: train message", log.read_text())) >= times

    host, port = ("127.0.0.1", address.rpartition(":")[2])
    superlink = script(app, "start_superlink", "--host", host, "--port", port)
    start_run = script(app, "start_run", address)
    ports = [free_port(), free_port()]
    with program(superlink, tmp_path / "superlink.log"):
        until(lambda: connects(address, authority), "SuperLink")
        for k in (0, 1):
            public = keys[k].with_suffix(".pub")
            subprocess.run(script(app, "register_site", address, public), check=True)
        refusals(address, authority, keys[2], tmp_path)
        with program(supernode(0, ports[0]), tmp_path / "node0.log"):
            with (
                program(supernode(1, ports[1]), tmp_path / "node1.log") as victim,
                program(start_run, tmp_path / "run.log") as first,
            ):
                until((tmp_path / "node1.log").exists, "log")
                until(lambda: trains(1, 2), "second round")
                kill(victim)
                until(lambda: first.poll() is not None, "end of the run without a client")
            assert "federation.quorum" in (tmp_path / "run.log").read_text()
            with (
                program(supernode(1, ports[1]), tmp_path / "node1.log"),
                program(start_run, tmp_path / "again.log") as second,
            ):
                until(lambda: second.poll() is not None, "end of the run")
    undisturbed = run(parse(CONFIG), CONFIG, tmp_path / "here")
    there = app / "server" / "runs" / "loopback"
    assert untimed(read_result(there)) == untimed(undisturbed)
    own = states(tmp_path / "here")
    deployed = states(tmp_path / "state0" / "loopback") | states(tmp_path / "state1" / "loopback")
    assert own and {name: deployed.get(name) for name in own} == own
    assert (there / "report.html").exists()


def refusals(address, authority, unknown, tmp_path):
    """Check that wrong sites are refused in time, each with a line that names the wrong part."""
    foreign = make_certificates(tmp_path / "foreign", ["localhost"])
    make_node_key(tmp_path / "other")
    for attempt, line in (
        (lambda: check_site(address, authority=authority, key=unknown), "refuses the key .*regist"),
        (lambda: check_site(address, authority=foreign, key=unknown), "certificate .*does not fit"),
        (lambda: check_superlink(address, authority=None), "accepts TLS only"),
    ):
        began = time.monotonic()
        with pytest.raises(FederationError, match=line):
            attempt()
        assert time.monotonic() - began < REFUSED_WITHIN
