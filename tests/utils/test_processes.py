"""Processes of one machine meet where nobody else can join, and leave nothing behind."""

import json
import os
import signal
import stat
import sys
import tempfile
from pathlib import Path

import pytest

from helpers import listening as program
from helpers.listening import listening
from helpers.shared_training import in_two_processes
from perdure.errors import RunError
from perdure.utils.processes import with_processes

LOOPBACK = "0100007F"
"""Address 127.0.0.1 in `/proc/net/tcp`."""


def test_started_processes_meet_in_a_folder_of_their_user(tmp_path):
    report = tmp_path / "report.json"
    before = listening(os.getpid())
    with (
        pytest.raises(RunError, match="ended before the training began"),
        with_processes([sys.executable, program.__file__, str(report)], 2),
    ):
        pass
    found = json.loads(report.read_text())
    assert found["given"] == ["1", "2"]
    assert set(found["listening"]) <= set(before)
    assert found["mode"] == stat.S_IRWXU
    assert not Path(found["folder"]).exists()


@pytest.mark.deep(reason="deployment: a forked second process")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_group_listens_on_the_loopback_interface_only(error, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "another")
    before = signal.getsignal(signal.SIGINT)
    met = []

    def work():
        met.extend(tmp_path.iterdir())
        assert {each.partition(":")[0] for each in listening(os.getpid())} == {LOOPBACK}
        if error:
            raise error

    try:
        in_two_processes(work)
    except KeyboardInterrupt:
        assert error is KeyboardInterrupt
    assert len(met) == 1
    assert list(tmp_path.iterdir()) == []
    assert os.environ["GLOO_SOCKET_IFNAME"] == "another"
    assert signal.getsignal(signal.SIGINT) is before
