"""The command `perdure doctor`: table, JSON, exit codes, and the findings of `perdure run`."""

import json
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
options = {{spread = {spread}}}
experiences = 2
[model]
hidden = [16]
[training]
optimizer = "SGD"
learning_rate = 0.1
iterations = 6
[[arms]]
strategy = "naive"
"""


@pytest.fixture
def called(monkeypatch, capfd, tmp_path):
    """Call perdure with a config whose data have this spread; return exit code and output."""
    monkeypatch.chdir(tmp_path)

    def call(spread, *words):
        (tmp_path / "c.toml").write_text(CONFIG.format(spread=spread))
        monkeypatch.setattr(sys, "argv", ["perdure", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capfd.readouterr()
        return ended.value.code or 0, printed.out + printed.err

    return call


def test_the_doctor_ends_with_0_for_a_sound_config(called):
    assert called(0.3, "doctor", "c.toml") == (0, "no findings\n")


def test_the_doctor_prints_findings_as_table_and_json(called):
    code, table = called(90.0, "doctor", "c.toml", "--quick")
    assert code == 1
    assert "unscaled input" in " ".join(table.split())
    code, text = called(90.0, "doctor", "c.toml", "--quick", "--json")
    assert code == 1
    assert json.loads(text)["naive-plain"][0]["rule"] == "unscaled input"


@pytest.mark.deep(reason="deployment: the whole command, with its report and figures")
def test_a_run_prints_the_findings_of_the_quick_rules(called):
    code, text = called(90.0, "run", "c.toml")
    assert code == 0
    assert "unscaled input" in " ".join(text.split())


@pytest.mark.parametrize("option", ["--restarts", "--total-epsilon"])
def test_options_of_healing_are_refused_without_it(called, option):
    code, text = called(0.3, "run", "c.toml", option, "2")
    assert code == 2
    assert "only together with --heal" in text
