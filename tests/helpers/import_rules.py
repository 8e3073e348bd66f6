"""Imports of a source tree, read without running it, and the rules they must keep.

Type-only imports and imports inside functions count. A tree is a folder with src/perdure and
strategies/, which is the package perdure.strategies.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

LAYERS = (
    {"errors"},
    {"types"},
    {"utils"},
    {"tasks"},
    {"data"},
    {"models", "metrics"},
    {"privacy", "contract"},
    {"queries"},
    {"adversarial", "explain"},
    {"planning", "strategies"},
    {"curator"},
    {"learner"},
    {"federated", "auditing", "avalanche", "loggers", "export"},
    {"testing", "doctor"},
    {"experiment"},
    {"report"},
    {"deployment"},
    {"cli"},
)
"""Packages, bottom layer first: a package imports packages of lower layers only."""

STRATEGIES_MAY_IMPORT = {
    "errors",
    "types",
    "utils",
    "tasks",
    "data",
    "models",
    "metrics",
    "contract",
    "queries",
    "adversarial",
    "explain",
}
"""A strategy reaches records through releases only: no privacy, no curator, no learner."""

TOP_FILES = {"__init__.py", "errors.py", "types.py", "metrics.py"}
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
IMPORTERS = ("import_module", "__import__")


@dataclass(frozen=True, order=True)
class Import:
    """One import: the file, its line, and the module or package that it loads."""

    file: str
    line: int
    target: str

    @property
    def package(self) -> str:
        """Package under perdure that is imported; "" for perdure itself."""
        return package_of(self.target)


def package_of(module: str) -> str:
    """Package of a dotted module name: the word after perdure, "" for perdure itself."""
    return ".".join(module.split(".")[1:2])


@dataclass(frozen=True)
class Tree:
    """The modules of a source tree and the imports between them."""

    root: Path

    @cached_property
    def modules(self) -> dict[str, Path]:
        """Dotted name to file; a package is named without `__init__`."""
        found = {}
        for folder, prefix in (("src/perdure", "perdure"), ("strategies", "perdure.strategies")):
            base = self.root / folder
            for path in sorted(base.rglob("*.py")):
                # src/perdure/strategies is a link to strategies
                if (base / "strategies").is_symlink() and base / "strategies" in path.parents:
                    continue
                parts = path.relative_to(base).with_suffix("").parts
                found[".".join([prefix, *parts]).removesuffix(".__init__")] = path
        return found

    @cached_property
    def imports(self) -> dict[str, list[Import]]:
        """Module to its imports of perdure."""
        return {module: self._imports_of(module) for module in self.modules}

    def _imports_of(self, module: str) -> list[Import]:
        path = self.modules[module]
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        return sorted(
            Import(path.relative_to(self.root).as_posix(), line, target)
            for line, target in imported(path.read_text(), package, self.modules)
        )

    @cached_property
    def graph(self) -> dict[str, set[str]]:
        """Module to the modules that it loads.

        Importing a file of a sub-package loads the sub-package's `__init__` as well.
        """
        return {
            module: {name for found in imports for name in self._loaded(module, found.target)}
            for module, imports in self.imports.items()
        }

    def _loaded(self, module: str, target: str) -> set[str]:
        """Modules that one import of `module` loads, as far as they share its package."""
        own = package_of(module)
        words = target.split(".")
        above = {".".join(words[:end]) for end in range(3, len(words))}
        around = {name for name in above if package_of(name) == own and name != module}
        around -= {name for name in around if module.startswith(f"{name}.")}
        return ({target, *around} & set(self.modules)) - {module}

    def unknown_packages(self) -> list[str]:
        """List packages that no layer has: those of the tree and those that are imported."""
        own = {package_of(module): path for module, path in self.modules.items()}
        lost = [
            f"perdure.{name} is in no layer: {path.relative_to(self.root).as_posix()}"
            for name, path in own.items()
            if name and name not in RANK
        ]
        return sorted(lost) + [
            f"{found.file}:{found.line} imports perdure.{found.package}, which is in no layer"
            for found in self._all_imports()
            if found.package and found.package not in RANK
        ]

    def upward_imports(self) -> list[str]:
        """List imports of a package in the same or a higher layer; perdure itself is the top."""
        return [
            f"{found.file}:{found.line} imports {found.target}"
            for module, imports in self.imports.items()
            for found in imports
            if package_of(module) in RANK
            and found.package != package_of(module)
            and RANK.get(found.package, len(LAYERS)) >= RANK[package_of(module)]
            and (found.package in RANK or not found.package)
        ]

    def forbidden_to_strategies(self) -> list[str]:
        """List imports of strategies that the allow-list does not name."""
        return [
            f"{found.file}:{found.line} imports {found.target}"
            for module, imports in self.imports.items()
            if package_of(module) == "strategies"
            for found in imports
            if found.package not in STRATEGIES_MAY_IMPORT | {"strategies"}
        ]

    def circles_of_files(self) -> list[str]:
        """List groups of files that import each other, each in alphabetical order."""
        return circles(self.graph)

    def circles_of_packages(self) -> list[str]:
        """List groups of packages that import each other."""
        graph: dict[str, set[str]] = {}
        for module, targets in self.graph.items():
            own = package_of(module)
            graph.setdefault(own, set()).update({package_of(other) for other in targets} - {own})
        return circles({f"perdure.{name}": {f"perdure.{n}" for n in graph[name]} for name in graph})

    def misplaced_at_the_top(self) -> list[str]:
        """List what src/perdure holds at its top beside packages, TOP_FILES and data files."""
        top = self.root / "src" / "perdure"
        return sorted(
            path.relative_to(self.root).as_posix()
            for path in top.iterdir()
            if path.name != "__pycache__"
            and not (path / "__init__.py").is_file()
            and (path.is_dir() or (path.suffix == ".py" and path.name not in TOP_FILES))
        )

    def _all_imports(self) -> Iterator[Import]:
        for imports in self.imports.values():
            yield from imports


def imported(text: str, package: str, modules: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Line and module of every import of perdure in a source text, wherever it stands.

    `from perdure.data import records` imports the module perdure.data.records where there is one,
    else the package perdure.data.

    Args:
        text: the source.
        package: package that relative imports start from.
        modules: names of all modules.
    """
    known = set(modules)
    for node in ast.walk(ast.parse(text)):
        for target in _targets(node, package):
            base, _, name = target.rpartition(".")
            found = target if target in known or name == target or not name else base
            if isinstance(node, ast.Import | ast.Call):
                found = target
            if found.split(".")[0] == "perdure":
                yield node.lineno, found


def _targets(node: ast.AST, package: str) -> list[str]:
    """Dotted names that a statement, or a call with a constant name, may load."""
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            return [f"{base}.{alias.name}" for alias in node.names]
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in IMPORTERS:
            return [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
    return []


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """Groups of nodes that reach each other, as text."""
    reach = {node: _reached(graph, node) for node in graph}
    groups = {
        tuple(sorted(other for other in reach[node] if node in reach.get(other, ())))
        for node in graph
        if node in reach[node]
    }
    return sorted(" <-> ".join(group) for group in groups)


def _reached(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """Nodes that a path of one step or more leads to."""
    seen: set[str] = set()
    todo = list(graph[start])
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(graph.get(node, ()))
    return seen
