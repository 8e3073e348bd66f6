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
from helpers.federations import without_spending
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
SIMULATED = """private = true
[privacy]
epsilon = 8.0
delta = 1e-4
seed = 5
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


class Deployment:
    """SuperLink of an app on the loopback, with two registered sites and a key of a third.

    Args:
        folder: folder of the app, of the sites and of the logs.
        config: TOML text of the config.
    """

    def __init__(self, folder, config):
        self.folder = folder
        self.app = folder / "app"
        write_app(self.app, config)
        self.address = f"localhost:{free_port()}"
        self.authority = self.app / "server" / "certificates" / "ca.crt"
        self.keys = [folder / f"node{k}" for k in range(3)]
        self._ports = [free_port(), free_port()]
        subprocess.run(script(self.app, "make_certificates", "localhost"), check=True)
        for key in self.keys:
            subprocess.run(script(self.app, "make_node_key", "--key", key), check=True)

    @contextmanager
    def superlink(self):
        """Run the SuperLink, and register both sites."""
        host, port = ("127.0.0.1", self.address.rpartition(":")[2])
        command = script(self.app, "start_superlink", "--host", host, "--port", port)
        with program(command, self.folder / "superlink.log"):
            until(lambda: connects(self.address, self.authority), "SuperLink")
            for key in self.keys[:2]:
                public = key.with_suffix(".pub")
                subprocess.run(script(self.app, "register_site", self.address, public), check=True)
            yield

    def supernode(self, k):
        """Run the SuperNode of a site."""
        key = ("--authority", self.authority, "--key", self.keys[k])
        own = ("--state", self.folder / f"state{k}", "--port", self._ports[k])
        command = script(self.app, "start_supernode", self.address, "--partition", k, *key, *own)
        return program(command, self.folder / f"node{k}.log")

    def run(self, name):
        """Start a run, with its output in a file."""
        return program(script(self.app, "start_run", self.address), self.folder / f"{name}.log")

    def trains(self, k, times):
        """Tell if a site has got so many messages to train."""
        log = self.folder / f"node{k}.log"
        text = log.read_text() if log.exists() else ""
        return len(re.findall("Receiving: train message", text)) >= times

    def same_as_undisturbed(self, config):
        """Assert that result and states are those of a run in this process."""
        undisturbed = run(parse(config), config, self.folder / "here")
        there = self.app / "server" / "runs" / "loopback"
        found, wanted = untimed(read_result(there)), untimed(undisturbed)
        assert without_spending(found) == without_spending(wanted)
        own = states(self.folder / "here")
        sites = [states(self.folder / f"state{k}" / "loopback") for k in (0, 1)]
        deployed = sites[0] | sites[1]
        assert own and {name: deployed.get(name) for name in own} == own
        assert (there / "report.html").exists()


@pytest.mark.deep(reason="deployment: every message starts a process that imports torch")
def test_a_killed_supernode_changes_no_result(tmp_path):
    site = Deployment(tmp_path, CONFIG)
    with site.superlink():
        refusals(site.address, site.authority, site.keys[2], tmp_path)
        with site.supernode(0):
            with site.supernode(1) as victim, site.run("run") as first:
                until(lambda: site.trains(1, 2), "second round")
                kill(victim)
                until(lambda: first.poll() is not None, "end of the run without a client")
            assert "federation.quorum" in (tmp_path / "run.log").read_text()
            with site.supernode(1), site.run("again") as second:
                until(lambda: second.poll() is not None, "end of the run")
    site.same_as_undisturbed(CONFIG)


@pytest.mark.deep(reason="deployment: every message starts a process that imports torch")
def test_a_restarted_supernode_is_asked_again_in_its_round(tmp_path):
    """Without a deadline the run does not end: it waits for the site, and asks it once more."""
    config = CONFIG.replace("deadline = 240.0\n", "") + SIMULATED
    site = Deployment(tmp_path, config)
    with site.superlink(), site.supernode(0), site.supernode(1) as victim, site.run("run") as only:
        until(lambda: site.trains(1, 2), "second round")
        kill(victim)
        with site.supernode(1):
            until(lambda: only.poll() is not None, "end of the run")
    assert (
        "counts the last SuperNode of this site as connected"
        in (tmp_path / "node1.log").read_text()
    )
    site.same_as_undisturbed(config)


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
