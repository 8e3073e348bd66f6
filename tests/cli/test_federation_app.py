"""Commands `perdure app`."""

import sys
import warnings

import pytest

with warnings.catch_warnings():
    # typer takes names from click that click is about to move
    warnings.filterwarnings("ignore", message="'click", category=DeprecationWarning)
    from perdure.cli import main as cli


@pytest.fixture
def federated_app(monkeypatch, capfd):
    """Call `perdure app`; return (exit code, standard output, standard error)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["perdure", "app", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capfd.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return call


def test_app_new_writes_the_example_and_says_what_is_next(federated_app, tmp_path):
    code, out, _ = federated_app("new", tmp_path / "app")
    assert code == 0 and out.splitlines()[-1] == f"next: follow {tmp_path / 'app' / 'README.md'}"
    readme = (tmp_path / "app" / "README.md").read_text()
    assert "start_supernode.py HOST:9092 --partition 0       # 0 to 1:" in readme


def test_app_errors_are_one_line_with_exit_code_2(federated_app, tmp_path):
    federated_app("new", tmp_path / "app")
    code, _, err = federated_app("new", tmp_path / "app")
    assert code == 2 and "has files; give a new folder, or an empty one" in err
    code, _, err = federated_app("check", tmp_path / "app", "localhost:1")
    assert code == 2 and len(err.splitlines()) == 1 and "allowed: the server's ca.crt" in err
