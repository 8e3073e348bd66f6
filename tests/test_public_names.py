"""Public is what a package lists in `__all__`: sorted, complete, documented, and all that users need."""

import ast
import importlib
import inspect
import pkgutil
import re
import types
from collections.abc import Iterator
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
    """Statements of a module, those in `with` and in the branches of `if` included."""
    for node in body:
        if isinstance(node, ast.If | ast.With):
            yield from statements([*node.body, *getattr(node, "orelse", [])])
        yield node


def source(name: str) -> list[ast.stmt]:
    return list(statements(ast.parse(inspect.getsource(importlib.import_module(name))).body))


def own_names(name: str) -> dict[str, str]:
    """Name to the module that defines it, of all that a face defines or takes from its own files."""
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
    """Constants first, then classes, then the rest: the order that ruff keeps."""
    constant = name.isupper() and len(name) > 1
    return (0 if constant else 1 if name[0].isupper() else 2), name


@every
def test_all_is_sorted_and_there(name):
    module = importlib.import_module(name)
    assert module.__doc__
    assert list(module.__all__) == sorted(set(module.__all__), key=order)
    assert all(hasattr(module, public) for public in module.__all__)


@every
def test_all_is_complete(name):
    listed = set(importlib.import_module(name).__all__)
    unlisted = {key for key in own_names(name) if f"{name}.{key}" not in MODULES} - listed
    assert not unlisted, f"{name} has public names that __all__ does not list: {sorted(unlisted)}"


@every
def test_all_is_documented(name):
    module = importlib.import_module(name)
    for public in module.__all__:
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__module__.startswith("perdure."), f"{public} is of another library"
            text = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
            assert text, f"{public} has no docstring of its own"
            assert not text.startswith(f"{public}("), f"dataclass made the docstring of {public}"
        else:
            assert_constant_is_documented(own_names(name)[public], public)


def assert_constant_is_documented(module: str, name: str) -> None:
    body = source(module)
    [place] = [
        index
        for index, node in enumerate(body)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and name in ast.unparse(node).partition("=")[0].replace(":", " ").split()
    ]
    after = body[place + 1] if place + 1 < len(body) else None
    assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), (
        f"{name} has no docstring below it in {module}"
    )


@every
def test_a_public_name_is_not_its_file(name):
    """`perdure.experiment.run` stays the function once the file run.py is imported."""
    for module in [found for found in MODULES if found.rpartition(".")[0] == name]:
        importlib.import_module(module)
    face = importlib.import_module(name)
    values = {public: getattr(face, public) for public in face.__all__}
    assert not [public for public, value in values.items() if isinstance(value, types.ModuleType)]


def texts() -> Iterator[tuple[str, str]]:
    """What users read and copy: file and Python source."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        blocks = re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)
        yield path.name, "\n".join(blocks)
    for folder in ("benchmarks", "strategies"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text()


@pytest.mark.parametrize("file", [file for file, _ in texts()])
def test_users_import_from_packages(file):
    """A strategy may take helpers from the file of another one."""
    modules = {target for _, target in imported(dict(texts())[file], "perdure", MODULES)}
    siblings = {name for name in modules if name.startswith("perdure.strategies.")}
    allowed = {*PUBLIC, *(siblings if file.startswith("strategies/") else ())}
    assert modules <= allowed, f"{file} imports {sorted(modules - allowed)}"


@pytest.mark.parametrize("file", [file for file, _ in texts()])
def test_users_import_public_names(file):
    for node in ast.walk(ast.parse(dict(texts())[file])):
        if isinstance(node, ast.ImportFrom) and node.module in FACES:
            for alias in node.names:
                public = {*importlib.import_module(node.module).__all__, *_strategies(node.module)}
                public |= {found.rpartition(".")[2] for found in FACES}
                assert alias.name in public, f"{file}: {alias.name} of {node.module}"


def _strategies(module: str) -> set[str]:
    """Classes that perdure.strategies finds in its files."""
    from perdure import strategies

    found = {strategies.find(name).__name__ for name in strategies.names()}
    return found if module == "perdure.strategies" else set()


def test_packages_load_when_they_are_first_used():
    assert perdure.data is importlib.import_module("perdure.data")
    with pytest.raises(AttributeError, match="module 'perdure' has no attribute 'date'"):
        perdure.date  # noqa: B018
