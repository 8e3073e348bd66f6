"""Strategies in the user's own folder: `perdure run` finds them, and readers of the results do not
need them.
"""

import sys
from pathlib import Path

import pytest

from helpers.ledger_cli import CONFIG, cli, shown

STRATEGY = '''
"""A strategy that stands beside the config."""

from pathlib import Path

from perdure.strategies import Naive

Path("imported").touch()


class Mine(Naive):
    """Train on."""
'''
MINE = f"""{CONFIG.partition("[[arms]]")[0]}
[[arms]]
strategy = "mine_beside:Mine"
private = true
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a finished run of a strategy in a file beside its config; the file is deleted."""
    folder = tmp_path_factory.mktemp("beside")
    (folder / "mine_beside.py").write_text(STRATEGY)
    (folder / "mine.toml").write_text(MINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # as the installed command: unlike `python -m`, it finds nothing in the current folder by
        # itself
        patch.setattr(sys, "path", [place for place in sys.path if Path(place).is_absolute()])
        patch.setattr(sys, "argv", ["perdure", "run", "mine.toml"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code
    del sys.modules["mine_beside"]
    (folder / "mine_beside.py").unlink()
    (folder / "imported").unlink()
    return folder / "runs" / "small"


@pytest.mark.slow
def test_a_run_finds_a_strategy_in_the_current_folder(finished):
    assert (finished / "arms" / "mine_beside.Mine-private" / "ledger.jsonl").exists()
    assert (finished / "result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["show", "verify", "head"])
def test_a_ledger_is_read_without_importing_its_strategy(perdure, finished, command):
    assert "mine_beside.Mine-private" in shown(perdure(command, finished))
    assert "mine_beside" not in sys.modules


@pytest.mark.slow
def test_a_report_is_written_without_importing_the_strategy(finished, monkeypatch, capsys):
    from perdure.report import write_report

    assert "mine_beside" in write_report(finished).read_text()
    assert "mine_beside" not in sys.modules


@pytest.mark.slow
def test_show_imports_no_module_beside_the_ledger(perdure, finished, monkeypatch):
    """This also holds if the current folder contains a module of that name."""
    folder = finished.parent.parent
    (folder / "mine_beside.py").write_text(STRATEGY)
    monkeypatch.chdir(folder)
    shown(perdure("show", finished))
    assert not (folder / "imported").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[privacy", "is not valid TOML"),
        ("privacy = 3", "privacy = 3"),
        ("arms = 3", "arms = 3"),
        ("[privacy]\ndelta = 'x'", "privacy.delta = 'x'"),
    ],
)
def test_show_refuses_a_damaged_config_beside_a_ledger(perdure, tmp_path, text, told):
    (tmp_path / "config.toml").write_text(text)
    code, _, err = perdure("show", tmp_path)
    assert code == 2 and told in err
