"""The built packages: one top-level name and every file, from the tree and from the sdist."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REGISTRY_HOSTS = re.compile(
    rb"py[p]i\.org|python[h]osted\.org|download\.py[t]orch\.org|npm[j]s\.(org|com)|anacon[d]a\.org"
)


def python(*args, cwd, executable=sys.executable):
    """Run Python in `cwd` as a user's shell would, without the settings of the test process."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    return subprocess.run(
        [executable, *args], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def build(source, target, *kinds):
    """Build without isolation, and so without a network, and return the one wheel."""
    done = python(
        "-m", "build", "--no-isolation", *kinds, "--outdir", str(target), str(source), cwd=target
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("wheel"), "--wheel")


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Return an environment with the wheel, which sees the dependencies of the test environment."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    executable = folder / "bin" / "python"
    pip = (
        "-m",
        "pip",
        "--python",
        str(executable),
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        str(wheel),
    )
    done = python(*pip, cwd=folder)
    assert done.returncode == 0, done.stderr
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    assert {path.name for path in site.iterdir()} == {
        "perdure",
        f"perdure-{PROJECT['version']}.dist-info",
    }
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return executable


# ---------------------------------------------------------------- what is in it


def test_the_wheel_has_only_perdure_as_top_level_name(names):
    tops = {name.split("/")[0] for name in names}
    assert tops == {"perdure", f"perdure-{PROJECT['version']}.dist-info"}


def test_the_wheel_contains_every_file_of_both_packages(names):
    packages = {"perdure": ROOT / "src" / "perdure", "perdure/strategies": ROOT / "strategies"}
    expected = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in packages.items()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {name for name in names if name.startswith("perdure/")} == expected
    assert {
        "perdure/py.typed",
        "perdure/experiment/demo.toml",
        "perdure/report/page.css",
        "perdure/strategies/ewc.py",
    } <= expected


def test_the_wheel_contains_the_licence(names):
    assert f"perdure-{PROJECT['version']}.dist-info/licenses/LICENSE" in names


@pytest.mark.deep(reason="deployment: builds the sdist, and the wheel from it")
def test_the_sdist_builds_the_same_wheel(wheel, tmp_path):
    again = build(ROOT, tmp_path)  # the sdist, and from it the wheel
    assert again.read_bytes() == wheel.read_bytes()
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt", "tests/conftest.py"} <= inside


# --------------------------------------------------------------- what it does where it is installed


@pytest.mark.deep(reason="deployment: installs the wheel into a fresh environment")
def test_a_users_strategies_folder_does_not_hide_the_package(installed, tmp_path):
    decoy = tmp_path / "strategies"
    decoy.mkdir()
    (decoy / "__init__.py").write_text("raise SystemExit('the decoy was imported')\n")
    code = "import perdure.strategies as s; print(s.__file__, *s.names()); s.find('ewc')"
    done = python("-c", code, cwd=tmp_path, executable=installed)
    assert done.returncode == 0, done.stderr
    file, *found = done.stdout.split()
    assert Path(file).is_relative_to(installed.parent.parent), (
        "from the wheel, not from the editable install"
    )
    assert found == sorted(path.stem for path in (ROOT / "strategies").glob("[a-z]*.py"))


def test_the_strategies_folder_refuses_another_import_name():
    done = python("-c", "import strategies", cwd=ROOT)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == "ImportError: import this package as perdure.strategies, not as strategies"


@pytest.mark.deep(reason="deployment: installs the wheel into a fresh environment")
def test_the_perdure_command_is_installed(installed, tmp_path):
    done = python(str(installed.with_name("perdure")), "--help", cwd=tmp_path, executable=installed)
    assert done.returncode == 0, done.stderr
    for command in ("run", "demo", "report"):
        assert command in done.stdout


# ---------------------------------------------------------------- what the tree says


def files_of_the_project():
    """List every file except those that .gitignore names and git's own files."""
    ignored = {line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()} | {".git"}
    for folder, inner, names in os.walk(ROOT):
        inner[:] = set(inner) - ignored
        yield from (Path(folder, name) for name in names)


def test_no_project_file_names_a_package_registry_host():
    files = list(files_of_the_project())
    assert {Path(__file__), ROOT / ".ci" / "run", ROOT / "constraints.txt"} <= set(files)
    assert [path for path in files if REGISTRY_HOSTS.search(path.read_bytes())] == []


def test_only_the_simulation_extra_requires_ray():
    asking = {
        name
        for name, needs in PROJECT["optional-dependencies"].items()
        if any("ray" in need for need in needs)
    }
    assert asking == {"simulation"}
    assert not [need for need in PROJECT["dependencies"] if need.startswith("ray")]


def test_constraints_pin_all_needed_packages():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [line for line in pins if not re.match(r"[a-z0-9-]+==[\w.]+( ; .*)?$", line)] == []
    pinned = {line.partition("==")[0] for line in pins}
    assert needed_by("perdure", extras=("dev", "docs")) - {"perdure"} - pinned == set()


def needed_by(name, extras=()):
    """Return the names of all installed distributions that `name` with its extras needs, with
    itself.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    seen = set()
    waiting = [(name, extra) for extra in ("", *extras)]
    while waiting:
        if (item := waiting.pop()) in seen:
            continue
        seen.add(item)
        for line in metadata.requires(item[0]) or ():
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": item[1]}):
                waiting += [(canonicalize_name(need.name), extra) for extra in ("", *need.extras)]
    return {name for name, _ in seen}
