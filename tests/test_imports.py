"""Imports: libraries that `import perdure` loads, and libraries that training needs."""

import subprocess
import sys
from pathlib import Path

import pytest

import perdure
from perdure import strategies

HEAVY = (
    "flwr",
    "avalanche",
    "opacus",
    "ray",
    "matplotlib",
    "sklearn",
    "torchvision",
    "dp_accounting",
    "typer",
)


def python(*args):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False)


def test_import_perdure_loads_no_heavy_library():
    done = python(
        "-c", "import sys, perdure; print(*{name.partition('.')[0] for name in sys.modules})"
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "perdure" in loaded
    assert loaded & {"torch", "numpy", *HEAVY} == set()


def test_the_public_names_of_perdure_load_no_heavy_library():
    done = python(
        "-c",
        "import sys; from perdure import *; "
        "print(*{name.partition('.')[0] for name in sys.modules})",
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"perdure", "torch"} <= loaded
    assert loaded & set(HEAVY) == set()


def test_dir_lists_public_names_that_are_not_loaded_yet():
    done = python("-c", "import perdure; print(*sorted({*perdure.__all__} - {*dir(perdure)}))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    "words",
    [[], ["run"], ["demo"], ["report"], ["audit"], ["strategies"], ["ledger"], ["ledger", "show"]],
    ids=" ".join,
)
def test_help_does_not_import_torch(words):
    program = (
        "import sys; from perdure.cli.main import main\n"
        "try: main()\n"
        "finally: print('loaded', {'torch', 'numpy'} & {*sys.modules}, file=sys.stderr)"
    )
    done = python("-c", program, *words, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert done.stderr == "loaded set()\n"


@pytest.mark.parametrize("words", [[], ["ledger"]], ids=["perdure", "perdure ledger"])
def test_help_of_a_group_of_commands_does_not_import_rich(words):
    program = (
        "import sys; from perdure.cli.main import main\n"
        "try: main()\n"
        "finally: print('rich' in sys.modules, file=sys.stderr)"
    )
    done = python("-c", program, *words, "--help")
    assert "Commands:" in done.stdout
    assert done.stderr == "False\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("ewc", "slda"), id="a penalty and a closed-form head"),
        pytest.param(
            strategies.names(),
            marks=pytest.mark.deep(reason="deployment: trains every strategy in a fresh process"),
            id="all strategies",
        ),
    ],
)
def test_training_works_without_the_heavy_libraries(names):
    program = Path(__file__).parent / "programs" / "engine_without_extras.py"
    done = python("-W", "error", str(program), *names)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name in names:
        assert f"trained {name} without privacy" in lines
        private = [line for line in lines if line.startswith(f"trained {name} epsilon")]
        assert len(private) == (not strategies.find(name).couples_records)
        assert all("simulation: not a private release" in line for line in private)
    assert [line.split()[0] for line in lines[-2:]] == ["trained", "explained"]


def test_the_version_equals_that_of_the_installed_package():
    from importlib.metadata import version

    assert perdure.__version__ == version("perdure")
