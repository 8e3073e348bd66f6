"""Calls of the command `perdure` in this process, and what it prints."""

import sys
import warnings

import pytest

with warnings.catch_warnings():
    # typer takes names from click that click is about to move
    warnings.filterwarnings("ignore", message="'click", category=DeprecationWarning)
    from perdure.cli import main as cli

CONFIG = """
name = "small"
[data]
experiences = 2
[model]
hidden = [4]
[training]
optimizer = "SGD"
learning_rate = 0.1
epochs = 1
[[arms]]
strategy = "naive"
"""


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """Call the command in an empty folder; return (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["perdure", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capfd.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return call


def assert_refused(answer, *words):
    """Assert exit code 2 and one line on standard error that contains `words`."""
    code, out, err = answer
    assert (code, out) == (2, "")
    assert err.startswith("perdure: ")
    assert err.endswith("\n") and err.count("\n") == 1
    for word in words:
        assert word in err


def plain(text):
    """Text without the lines of tables, in one line."""
    return " ".join(text.replace("│", " ").split())
