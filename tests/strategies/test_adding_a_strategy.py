"""Adding an extension is adding one file: a strategy, an attack, an explainer, a data set and a
clipping rule are added to a copy of the project, and no other file is changed.

The strategy is the example of its page in docs/how-to, saved as it stands there; the others are in
additions/, and their pages show them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.pages import blocks

ROOT = Path(__file__).parents[2]
THIS_FILE = Path(__file__).relative_to(ROOT)
FILES = ROOT / "tests" / "additions"
COPIED = (
    ".ci",
    "src",
    "strategies",
    "tests",
    "benchmarks",
    "docs",
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "SECURITY.md",
    "constraints.txt",
    "mkdocs.yml",
)
"""Files and folders of the project."""
LEFT_OUT = shutil.ignore_patterns("*.pytest-*.pyc")
"""Bytecode is copied: it stays good, and four programs need not compile everything anew."""


def shown(page: str, part: str) -> str:
    """Return the one Python block of a page that contains `part`."""
    [block] = [block for block in blocks(ROOT / page, "python") if part in block]
    return block


@dataclass(frozen=True, kw_only=True)
class Addition:
    """One file that is added.

    Args:
        path: of the file, in the project.
        text: of the file.
        program: a file of the project that uses the extension, and fails where it does not work.
        tests: arguments of pytest for the tests that look at all extensions of its kind.
    """

    path: str
    text: str
    program: str
    tests: tuple[str, ...]


ADDITIONS = {
    "strategy": Addition(
        path="strategies/tether.py",
        text=shown("docs/how-to/add-a-strategy.md", "class Tether(Strategy):"),
        program="tests/additions/use_tether.py",
        # this file would add what is there already
        tests=("tests", f"--ignore={THIS_FILE}", "-k", "tether"),
    ),
    "attack": Addition(
        path="src/perdure/adversarial/random_point.py",
        text=(FILES / "random_point.py").read_text(),
        program="tests/additions/use_random_point.py",
        tests=("tests/adversarial",),
    ),
    "explainer": Addition(
        path="src/perdure/explain/leave_one_out.py",
        text=(FILES / "leave_one_out.py").read_text(),
        program="tests/additions/use_leave_one_out.py",
        tests=("tests/explain",),
    ),
    "data set": Addition(
        path="src/perdure/data/datasets/rings.py",
        text=(FILES / "rings.py").read_text(),
        program="tests/additions/use_rings.py",
        tests=("tests/data/test_datasets.py",),
    ),
    "clipping rule": Addition(
        path="src/perdure/privacy/clipping/rules/prelu.py",
        text=(FILES / "prelu.py").read_text(),
        program="tests/additions/use_prelu.py",
        tests=("tests/privacy/clipping", "tests/privacy/guard"),
    ),
}
every_addition = pytest.mark.parametrize("addition", ADDITIONS.values(), ids=ADDITIONS)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a copy of the project with the added files."""
    folder = tmp_path_factory.mktemp("project")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=LEFT_OUT)
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, folder / name)
    for addition in ADDITIONS.values():
        assert not (folder / addition.path).exists()
        (folder / addition.path).write_text(addition.text)
    return folder


def python(project, *words):
    """Run Python in the copy, which comes before the installed package."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "addition",
    [
        addition
        if kind == "strategy"
        else pytest.param(
            addition, marks=pytest.mark.deep(reason="deployment: a fresh process for every kind")
        )
        for kind, addition in ADDITIONS.items()
    ],
    ids=ADDITIONS,
)
def test_an_added_extension_file_is_found_and_works(project, addition):
    python(project, addition.program)


REPORTS = {
    "types": ["tests/helpers/typed_list.py"],
    "strategies": ["perdure.cli.main", "strategies", "--json"],
    "tables": ["perdure.experiment.tables", "--report"],
}
ALL_REPORTS = f"""
import runpy, sys

for name, words in {REPORTS!r}.items():
    print("====", name, flush=True)
    sys.argv = words
    try:
        if words[0].endswith(".py"):
            runpy.run_path(words[0], run_name="__main__")
        else:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        assert not ended.code, (name, ended.code)
"""
"""Programs one after another: a process for each would import everything three times."""


@pytest.fixture(scope="module")
def reports(project):
    """Everything that the three programs print, by name."""
    parts = python(project, "-c", ALL_REPORTS).split("==== ")[1:]
    return {name: text for name, _, text in (part.partition("\n") for part in parts)}


def test_make_lint_reports_classes_unknown_to_type_checkers(reports):
    printed = reports["types"]
    for package, name in (
        ("strategies", "Tether"),
        ("adversarial", "RandomPoint"),
        ("explain", "LeaveOneOut"),
    ):
        line = rf"^perdure\.{package}: type checkers do not know .*\b{name}\b"
        assert re.search(line, printed, flags=re.MULTILINE)


def test_an_added_strategy_is_listed_with_its_costs(reports):
    printed = reports["strategies"]
    [row] = [row for row in json.loads(printed) if row["name"] == "tether"]
    assert row["strategy"] == "Tether(strength=0.1)"
    assert row["summary"].startswith("Tether: ")
    assert (row["privacy"], row["memory"]) == ("gradient", "1 x parameters")
    assert row["not_vmappable_because"] is None


def test_the_readme_check_reports_a_missing_strategy_row(reports):
    printed = reports["tables"]
    assert re.search(r"^README\.md, table of strategies: missing: .*\bTether\b", printed)


def test_added_files_pass_the_linter_and_the_formatter(project):
    paths = [addition.path for addition in ADDITIONS.values()]
    python(project, "-m", "ruff", "check", *paths)
    python(project, "-m", "ruff", "format", "--check", *paths)


# ------------------------------------------------------------------------------- in full, minutes


@pytest.mark.deep(reason="deployment: lints and type-checks a copy of the whole project")
def test_the_project_with_added_files_passes_lint_and_mypy(project):
    python(project, "-m", "ruff", "check")
    python(project, "-m", "ruff", "format", "--check")
    # with the cache of `make lint` mypy needs seconds instead of minutes
    if (ROOT / ".mypy_cache").is_dir():
        shutil.copytree(ROOT / ".mypy_cache", project / ".mypy_cache")
    python(project, "-m", "mypy")


def run_tests(project, *words):
    """Run the short tests of the copy; pytest fails if it finds none."""
    python(project, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not deep", *words)


@pytest.mark.deep(reason="deployment: runs a copy's tests over all extensions")
@every_addition
def test_the_tests_of_each_extension_pass_with_an_added_file(project, addition):
    run_tests(project, *addition.tests)


@pytest.mark.deep(reason="deployment: runs a copy's tests of names, layers and documents")
def test_the_tests_of_names_and_documents_pass_with_added_files(project):
    top = [path for path in project.glob("tests/test_*.py") if path.stem != "test_packaging"]
    lists = [
        f"tests/experiment/test_{name}.py"
        for name in ("config", "config_fields", "strategy_catalogue", "tables")
    ]
    run_tests(project, "tests/docs", "tests/benchmarks", *lists, *map(str, top))
    run_tests(project, "tests/cli/test_main.py", "-k", "strategies")
