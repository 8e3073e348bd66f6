"""Public names: `__all__` of each package is sorted, complete, documented, and sufficient for
users.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import types
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import perdure
from helpers.import_rules import imported

ROOT = Path(__file__).parents[1]
FILES = ("errors", "metrics", "types")
"""Modules that are public as they are."""
MODULES = {found.name: found.ispkg for found in pkgutil.walk_packages(perdure.__path__, "perdure.")}
FACES = ["perdure", *(name for name, is_package in MODULES.items() if is_package)]
PUBLIC = [*FACES, *(f"perdure.{name}" for name in FILES)]
every = pytest.mark.parametrize("name", PUBLIC)


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Return the statements of a module, with those inside `with` and `if`."""
    for node in body:
        if isinstance(node, ast.If | ast.With):
            yield from statements([*node.body, *getattr(node, "orelse", [])])
        yield node


def source(name: str) -> list[ast.stmt]:
    return list(statements(ast.parse(inspect.getsource(importlib.import_module(name))).body))


def own_names(name: str) -> dict[str, str]:
    """Map every name that a package defines or takes from its own files to its module."""
    found = {}
    for node in source(name):
        match node:
            case ast.ImportFrom(module=str(module)) if module.startswith(f"{name}."):
                found |= {alias.asname or alias.name: module for alias in node.names}
            case ast.FunctionDef() | ast.ClassDef():
                found[node.name] = name
            case (
                ast.Assign(targets=[ast.Name(id=target)])
                | ast.AnnAssign(target=ast.Name(id=target))
            ):
                found[target] = name
    return {key: module for key, module in found.items() if not key.startswith("_")}


def order(name: str) -> tuple[int, str]:
    """Return a sort key: constants, then classes, then other names, as ruff sorts."""
    constant = name.isupper() and len(name) > 1
    return (0 if constant else 1 if name[0].isupper() else 2), name


@every
def test_the_list_of_public_names_is_sorted_and_exists(name):
    module = importlib.import_module(name)
    assert module.__doc__
    assert list(module.__all__) == sorted(set(module.__all__), key=order)
    assert all(hasattr(module, public) for public in module.__all__)


@every
def test_every_public_name_of_a_package_is_listed_in_all(name):
    listed = set(importlib.import_module(name).__all__)
    unlisted = {key for key in own_names(name) if f"{name}.{key}" not in MODULES} - listed
    assert not unlisted, f"{name} has public names that __all__ does not list: {sorted(unlisted)}"


@every
def test_every_listed_public_name_is_documented(name):
    module = importlib.import_module(name)
    found = {public: fault(name, public) for public in module.__all__}
    assert not any(found.values()), {key: value for key, value in found.items() if value}


def fault(face: str, name: str) -> str | None:
    """Return the reason why a public name does not count as documented."""
    value = inspect.unwrap(getattr(importlib.import_module(face), name))  # of a cache
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return None if name in documented(own_names(face)[name]) else "no docstring below it"
    text = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    if not value.__module__.startswith("perdure."):
        return "of another library"
    if not text:
        return "no docstring of its own"
    return "a docstring made up by dataclass" if text.startswith(f"{name}(") else None


def documented(module: str) -> set[str]:
    """Return the constants of a module that have a docstring below them."""
    body = source(module)
    return {
        target.id
        for node, after in pairwise(body)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        for target in getattr(node, "targets", [getattr(node, "target", None)])
        if isinstance(target, ast.Name)
    }


@every
def test_no_public_name_is_replaced_by_a_module(name):
    """`perdure.experiment.run` is still the function after the file run.py is imported."""
    for module in [found for found in MODULES if found.rpartition(".")[0] == name]:
        importlib.import_module(module)
    face = importlib.import_module(name)
    values = {public: getattr(face, public) for public in face.__all__}
    assert not [public for public, value in values.items() if isinstance(value, types.ModuleType)]


def texts() -> dict[str, str]:
    """Map each file that users read and copy to its Python source.

    Files that a page says to save inside a package take helpers of that package.
    """
    found = {}
    inside = {path.read_text() for path in (ROOT / "tests" / "additions").glob("*.py")}
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        blocks = re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)
        blocks = [block for block in blocks if block not in inside]
        found[path.relative_to(ROOT).as_posix()] = "\n".join(blocks)
    for path in [*sorted((ROOT / "benchmarks").rglob("*.py")), *(ROOT / "strategies").glob("*.py")]:
        found[path.relative_to(ROOT).as_posix()] = path.read_text()
    return found


@pytest.mark.parametrize("file", sorted(texts()))
def test_strategies_and_docs_import_only_public_names(file):
    """A strategy may import helpers from the file of another strategy."""
    lost = []
    for _, target in imported(texts()[file], "perdure", MODULES):
        package, _, name = target.rpartition(".")
        sibling = package == "perdure.strategies" and file.startswith("strategies/")
        if not (target in PUBLIC or sibling or name in public_names(package)):
            lost.append(target)
    for node in ast.walk(ast.parse(texts()[file])):
        if isinstance(node, ast.ImportFrom) and node.module in PUBLIC:
            names = {alias.name for alias in node.names} - public_names(node.module)
            lost += [f"{node.module}.{name}" for name in names]
    assert not lost, f"{file} imports what is not public: {sorted(lost)}"


def public_names(package: str) -> set[str]:
    """Return the names that may be imported from a package: its `__all__` and its packages."""
    if package not in PUBLIC:
        return set()
    below = {face.rpartition(".")[2] for face in PUBLIC if face.rpartition(".")[0] == package}
    return below | {*importlib.import_module(package).__all__}


def test_packages_load_only_when_they_are_first_used():
    assert perdure.data is importlib.import_module("perdure.data")
    with pytest.raises(AttributeError, match="module 'perdure' has no attribute 'date'"):
        perdure.date  # noqa: B018
