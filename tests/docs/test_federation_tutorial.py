"""The tutorial of a federation: Adult by work class, from `perdure app new` to the report."""

import os
import re
import sys
import tomllib
from importlib import import_module

import pytest

import perdure.federated  # noqa: F401 - first, because it knows which warnings to let pass
from helpers.pages import ROOT, blocks
from perdure.cli import main as cli
from perdure.data.datasets.adult import ADULT_CATEGORIES
from perdure.experiment import parse, read_result, run, untimed
from perdure.federated import InProcessGrid

PAGE = ROOT / "docs/tutorials/federation.md"
PACKAGE = "federation_adult_by_work_class"


def config_of_page():
    (text,) = [each for each in blocks(PAGE, "toml") if 'name = "adult"' in each]
    return text


def rows_of_page():
    """Return the rows of the page's table: accuracy and forgetting of each strategy."""
    found = re.findall(r"^\| (naive|lwf) \| ([\d.]+) \| ([\d.]+) \|$", PAGE.read_text(), re.M)
    return {name: (float(accuracy), float(forgetting)) for name, accuracy, forgetting in found}


def perdure_command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["perdure", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


def follow(tmp_path, monkeypatch, text, **changed):
    """Follow the page with a config, and return the folder of the deployment's run.

    Args:
        changed: settings of the run to replace, as with `start_run.py --set`.
    """
    from flwr.app import Context, RecordDict

    (tmp_path / "adult.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    perdure_command(monkeypatch, "app", "new", "adult-app", "--config", "adult.toml")
    monkeypatch.syspath_prepend(tmp_path / "adult-app")
    apps = {side: import_module(f"{PACKAGE}.{side}_app").app for side in ("server", "client")}
    project = tomllib.loads((tmp_path / "adult-app" / "pyproject.toml").read_text())
    given = project["tool"]["flwr"]["app"]["config"]
    tables = [name for name, value in given.items() if isinstance(value, dict)]
    settings = {name: value for name, value in given.items() if name not in tables}
    settings |= {f"{name}.{key}": value for name in tables for key, value in given[name].items()}
    settings |= {path.replace("__", "."): value for path, value in changed.items()}
    sites = [{"state": str(tmp_path / f"site{number}" / "state")} for number in range(9)]
    (tmp_path / "adult-app" / "server").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "adult-app" / "server")
    with InProcessGrid(apps["client"], 9, node_config=sites).running() as grid:
        apps["server"](grid, Context(1, 0, {}, RecordDict(), settings))
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        del sys.modules[name]
    monkeypatch.chdir(tmp_path / "adult-app")
    return tmp_path / "adult-app" / "server" / "runs" / "adult-by-work-class"


def reported(folder, monkeypatch, capsys):
    """Return the rows that `perdure report` prints, as the cells of each line."""
    capsys.readouterr()
    perdure_command(monkeypatch, "report", folder)
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def small_adult(folder):
    """Write tables of invented people of every work class."""
    folder.mkdir(parents=True)
    classes = (*ADULT_CATEGORIES[1], "?")
    for name, stop, number in (("adult.data", "", 108), ("adult.test", ".", 36)):
        lines = [
            f"{20 + k % 50}, {classes[k % 9]}, {100_000 + k}, Bachelors, {k % 16 + 1}, "
            f"Never-married, Sales, Unmarried, Other, {('Female', 'Male')[k // 9 % 2]}, 0, 0, "
            f"{30 + k % 20}, Japan, {'>50K' if k % 16 > 9 else '<=50K'}{stop}"
            for k in range(number)
        ]
        (folder / name).write_text("\n".join(lines) + "\n")


def test_the_federation_tutorial_runs_on_a_small_table(tmp_path, monkeypatch, capsys):
    small_adult(tmp_path / "data" / "adult")
    monkeypatch.setenv("PERDURE_DATA", str(tmp_path / "data"))
    one_arm, _, _ = config_of_page().rpartition("[[arms]]")
    folder = follow(tmp_path, monkeypatch, one_arm, federation__rounds=1)
    rows = reported(folder, monkeypatch, capsys)
    assert [row[0] for row in rows if row and row[0] in ("naive", "lwf")] == ["naive"]
    assert (folder / "report.html").exists()
    scripts = re.findall(r"^python (scripts/\w+\.py) ", "".join(blocks(PAGE, "sh")), re.M)
    assert len(scripts) == 6 and all((tmp_path / "adult-app" / name).exists() for name in scripts)
    assert read_result(folder)["federation"]["declared_sizes"] == [[6, 6]] * 9


@pytest.mark.deep(reason="docs: trains what the tutorial trains, in an app and in one process")
def test_the_federation_tutorial_has_the_printed_numbers(tmp_path, monkeypatch, capsys):
    """With PERDURE_DATA the published table is read, whose numbers are on the page; without it
    small files in the same format.
    """
    real = "PERDURE_DATA" in os.environ
    if not real:
        small_adult(tmp_path / "data" / "adult")
        monkeypatch.setenv("PERDURE_DATA", str(tmp_path / "data"))
    text = config_of_page()
    folder = follow(tmp_path, monkeypatch, text)
    assert untimed(read_result(folder)) == untimed(run(parse(text), text, tmp_path / "here"))
    rows = {row[0]: row for row in reported(folder, monkeypatch, capsys) if row}
    printed = rows_of_page()
    assert set(printed) == {"naive", "lwf"} <= set(rows)
    for strategy, numbers in printed.items():
        found = [float(cell.replace("−", "-")) for cell in rows[strategy][2:4]]
        assert not real or found == pytest.approx(numbers, abs=0.5)
