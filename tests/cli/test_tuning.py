"""The command `perdure tune`: what it prints and writes, and its refusals."""

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
name = "helpers.own_data:blobs"
experiences = 2
[model]
hidden = [4]
[training]
optimizer = "SGD"
learning_rate = 1e-6
iterations = 6
[search]
trials = 9
[search.space]
"training.learning_rate" = [0.01, 1.0]
[[arms]]
strategy = "naive"
"""


@pytest.fixture
def called(monkeypatch, capfd, tmp_path):
    """Call perdure with a config; return exit code and output."""
    monkeypatch.chdir(tmp_path)

    def call(text, *words):
        (tmp_path / "c.toml").write_text(text)
        monkeypatch.setattr(sys, "argv", ["perdure", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capfd.readouterr()
        return ended.value.code or 0, printed.out + printed.err

    return call


def test_the_tune_command_prints_trials_and_writes_a_config(called, tmp_path):
    code, text = called(CONFIG, "tune", "c.toml", "--trials", "2", "--apply", "better.toml")
    assert code == 0
    lines = text.splitlines()
    assert [line.partition(":")[0] for line in lines[:3]] == ["default", "trial 1/2", "trial 2/2"]
    assert "config with the best values: better.toml" in lines[-1]
    assert 'name = "small-tuned"' in (tmp_path / "better.toml").read_text()
    assert (tmp_path / "runs" / "small-search" / "study.db").exists()
    assert called((tmp_path / "better.toml").read_text(), "config", "c.toml")[0] == 0


@pytest.mark.parametrize(
    ("old", "new", "words", "told"),
    [
        ("[search]", "[search]\nprivacy = 'select'", ("--apply", "o.toml"), "--apply"),
        ("a", "a", ("--sampler", "grid"), "--sampler = 'grid'"),
        ("[search]\ntrials = 9\n[search.space]\n", "#", (), "[search.space]"),
        ('"training.learning_rate" = [0.01, 1.0]', "", (), "search.space"),
    ],
)
def test_the_tune_command_refuses_a_wrong_search(called, old, new, words, told):
    code, text = called(CONFIG.replace(old, new), "tune", "c.toml", *words)
    assert code == 2 and told in text
    assert text.count("\n") == 1
