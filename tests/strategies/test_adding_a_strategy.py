"""Adding an extension is adding one file: each file is added to a copy of the project, and no other
file is changed.

The strategy is the README's own example, saved as it stands there.
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

ROOT = Path(__file__).parents[2]
THIS_FILE = Path(__file__).relative_to(ROOT)
COPIED = (
    "src",
    "strategies",
    "tests",
    "benchmarks",
    "docs",
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "Makefile",
    "constraints.txt",
    ".mypy_cache",
)
"""Files and folders of the project, and mypy's cache where there is one: with it mypy needs seconds
instead of minutes.
"""
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")


def readme_example(part):
    """The one Python block of the README that contains `part`."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    [block] = [block for block in blocks if part in block]
    return block


@dataclass(frozen=True, kw_only=True)
class Addition:
    """One file that is added.

    Args:
        path: of the file, in the project.
        text: of the file.
        program: uses the extension, and fails where it does not work.
    """

    path: str
    text: str
    program: str

    @property
    def name(self):
        """Name under which the extension is found, and the tests of all of its kind run on it."""
        return Path(self.path).stem


USE_THE_STRATEGY = """
from functools import partial

import torch

from perdure import Learner, Privacy
from perdure.data import digits, split
from perdure.models import mlp
from perdure.strategies import Combine, Replay, Tether, find, names
from perdure.testing import CHECKS, check_strategy

assert "tether" in names() and find("tether") is Tether
stream = split(digits(), scenario="class", experiences=5)
for privacy in (None, Privacy(noise_multiplier=1.0, seed=0)):
    model = mlp(input_shape=stream.input_shape, num_classes=10, hidden=(8,), seed=0)
    optimizer = partial(torch.optim.SGD, lr=0.1)
    learner = Learner(
        model=model, strategy=Tether(), optimizer=optimizer, iterations=3, privacy=privacy
    )
    assert learner.fit(stream).shape == (5, 5)
for strategy in (Tether.example(), Combine(Tether(strength=0.1), Replay(memory_size=12))):
    assert set(check_strategy(strategy).passed) == set(CHECKS)
"""

ADDITIONS = {
    "strategy": Addition(
        path="strategies/tether.py",
        text=readme_example("(Strategy):"),
        program=USE_THE_STRATEGY,
    ),
}
every_addition = pytest.mark.parametrize("addition", ADDITIONS.values(), ids=ADDITIONS)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project, with the added files."""
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
    """Run the interpreter in the copy, which comes before the installed package."""
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
@every_addition
def test_an_added_file_is_found_and_works(project, addition):
    python(project, "-c", addition.program)


@pytest.mark.slow
def test_a_new_file_that_type_checkers_do_not_know_is_reported(project):
    script = Path(__file__).parents[1] / "helpers" / "typed_list.py"
    assert python(project, str(script)) == (
        "perdure.strategies: type checkers do not know Tether; add to its __init__.py\n"
    )


def test_an_added_strategy_is_listed_with_its_costs(project):
    printed = python(project, "-m", "perdure.cli.main", "strategies", "--json")
    [row] = [row for row in json.loads(printed) if row["name"] == "tether"]
    assert row["strategy"] == "Tether(strength=0.1)"
    assert row["summary"].startswith("Tether: ")
    assert (row["privacy"], row["memory"]) == ("gradient", "1 x parameters")
    assert row["not_vmappable_because"] is None


def test_a_row_that_the_readme_lacks_is_reported_only(project):
    printed = python(project, "-m", "perdure.experiment.tables", "--report")
    assert re.search(r"^README\.md, table of strategies: missing: .*\bTether\b", printed)


def test_added_files_pass_the_linter_and_the_formatter(project):
    paths = [addition.path for addition in ADDITIONS.values()]
    python(project, "-m", "ruff", "check", *paths)
    python(project, "-m", "ruff", "format", "--check", *paths)


# ------------------------------------------------------------------------------- in full, minutes


@pytest.mark.deep
def test_the_project_with_added_files_passes_every_check_of_lint(project):
    python(project, "-m", "ruff", "check")
    python(project, "-m", "ruff", "format", "--check")
    python(project, "-m", "mypy")


def run_tests(project, *words):
    """Run tests of the copy; pytest fails where it finds none."""
    python(project, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words)


@pytest.mark.deep
@every_addition
def test_tests_over_all_extensions_pass_with_an_added_file(project, addition):
    # this file would add what is there already
    run_tests(project, "tests", f"--ignore={THIS_FILE}", "-k", addition.name)


@pytest.mark.deep
def test_tests_of_names_layers_and_documents_pass_with_added_files(project):
    top = [path for path in project.glob("tests/test_*.py") if path.stem != "test_packaging"]
    lists = ("tests/experiment/test_strategy_catalogue.py", "tests/experiment/test_tables.py")
    run_tests(project, "tests/docs", "tests/benchmarks", *lists, *map(str, top))
    run_tests(project, "tests/cli/test_main.py", "-k", "strategies")
