"""The command `perdure compare`: its tables, its files, and its refusals."""

import json
import sys

import pytest

from helpers.stored_runs import stored_run
from perdure.cli import main as cli

ARMS = {"naive-plain": {0: 70.0, 1: 66.0, 2: 70.5}, "ewc-plain": {0: 71.0, 1: 69.5, 2: 74.0}}


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """Call `perdure compare` in a folder with a finished run: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)
    stored_run(tmp_path / "run", ARMS)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["perdure", "compare", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capfd.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return call


def test_compare_prints_its_tables_and_writes_them_to_four_files(command, tmp_path):
    names = ("table.csv", "table.tex", "all.json", "shown.svg")
    options = ("--csv", names[0], "--latex", names[1], "--json", names[2], "--plot", names[3])
    code, out, err = command("run", *options, "--metric", "forgetting")
    assert (code, err) == (0, "")
    assert "Paired differences at the same seeds, forgetting, points" in out
    assert "ewc-plain − naive-plain" in out
    assert {f"written: {name}" for name in names} <= set(out.splitlines())
    assert (tmp_path / "table.csv").read_text().startswith("metric,unit,arm,minus,seeds,mean")
    assert r"\begin{tabular}" in (tmp_path / "table.tex").read_text()
    assert json.loads((tmp_path / "all.json").read_text())["runs"] == ["run"]
    assert "<svg" in (tmp_path / "shown.svg").read_text()


def test_compare_writes_a_png_picture_with_plot(command, tmp_path):
    assert command("run", "--plot", "shown.png", "--baseline", "naive-plain")[0] == 0
    assert (tmp_path / "shown.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--plot", "shown.bmp", "--csv", "table.csv"], "a file that ends in .svg or .png"),
        (["run", "run"], "run is given twice; give every run once"),
        (["run", "--metric", "speed", "--csv", "table.csv"], "metric = 'speed' is not allowed"),
        (["nowhere"], "nowhere/result.json cannot be read"),
    ],
)
def test_compare_refuses_mistakes_in_one_line_and_writes_nothing(command, tmp_path, words, message):
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    assert err.startswith("perdure: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
