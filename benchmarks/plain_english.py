"""Plain English in docstrings, messages and names of tests: rules that a program can check.

No sentence opens with What, Whether, How or Who. Tests are named `test_<subject>_<behaviour>`, in
at most 60 characters. Public functions document their arguments, errors and shapes. This program
prints the breaches of these rules; `tests/test_plain_english.py` asserts that there are none.

    python benchmarks/plain_english.py
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from measure import EVERYTHING, LIBRARY, Function, Source, docstrings, is_private, sources

LONGEST_NAME = 60
"""Largest number of characters in the name of a test."""
OPENING = re.compile(r"(?:^|[.!?:;]\s+|\n\s*\n\s*|\n\s*- )(What|Whether|How|Who)\b")
"""Start of a sentence as a noun clause: at the start of a text, after a stop, or in a list."""
MESSAGE = re.compile(r"(?:^|[.!?:;]\s+)(what|whether|how|who)\b", re.IGNORECASE)
"""Start of a noun clause in an error message, which begins with a small letter."""
TEST_NAME = re.compile(r"test(_[a-z0-9]+){2,}")
DIMENSION = r"(?:\d \+ [A-Z]|[A-Za-z]|\d+|\d?[a-z_]+|\.\.\.)"
FIRST = r"(?:\d?[A-Za-z]|\.\.\.|bins|channels|components|features|filters|rank|rows)"
SHAPE = re.compile(rf"\({FIRST},(?: {DIMENSION},?)*\)|\bshapes?\b|\bscalar\b|\bone number\b")
"""A shape such as (n,) or (n, d), or words for one."""


def noun_clauses(source: Source) -> list[str]:
    """Find sentences that open with What, Whether, How or Who, in all texts and messages."""
    found = []
    for node in source.nodes:
        texts: list[tuple[ast.AST, re.Pattern[str]]] = (
            [(node, OPENING)] if isinstance(node, ast.Constant) else []
        )
        if isinstance(node, ast.Raise):
            texts = [(each, MESSAGE) for each in ast.walk(node)]
        for each, pattern in texts:
            text = each.value if isinstance(each, ast.Constant) else None
            if isinstance(text, str) and (match := pattern.search(text)):
                part = text[match.start(1) : match.start(1) + 60]
                found.append(f"{source.name}:{getattr(each, 'lineno', 0)} {part!r}")
    return found


def badly_named_tests(source: Source) -> list[str]:
    """Find tests with names above 60 characters, or other than `test_<subject>_<behaviour>`."""
    names = [node.name for node in source.nodes if isinstance(node, Function)]
    tests = [name for name in names if name.startswith("test")]
    return [
        f"{source.name} {n}" for n in tests if len(n) > LONGEST_NAME or not TEST_NAME.fullmatch(n)
    ]


def shared_lines(source: Source) -> list[str]:
    """Find lines of a section Args that name several arguments, such as `a, b: ...`."""
    shared = re.compile(r"^ +\w+(?:, \w+)+: .*", re.MULTILINE)
    texts = [section(text, "Args") for text in docstrings(source)]
    return [f"{source.name} {line.strip()}" for text in texts for line in shared.findall(text)]


@dataclass(frozen=True)
class PublicFunction:
    """Public function, listed in a package's `__all__`, or public method of a class listed there.

    Args:
        place: file, line and name.
        node: definition of the function.
        owner: class of a method; None for a function.
    """

    place: str
    node: Function
    owner: ast.ClassDef | None = None

    @property
    def arguments(self) -> list[str]:
        """Names of all arguments except `self` and `cls`."""
        every = self.node.args
        named = [*every.posonlyargs, *every.args, *every.kwonlyargs]
        rest = [arg for arg in (every.vararg, every.kwarg) if arg]
        return [arg.arg for arg in named + rest if arg.arg not in ("self", "cls")]

    @property
    def docstring(self) -> str:
        """Docstring of the function; for a constructor together with the docstring of its class."""
        own = ast.get_docstring(self.node) or ""
        if self.owner is None or self.node.name != "__init__":
            return own
        return f"{own}\n\n{ast.get_docstring(self.owner) or ''}"

    @property
    def undocumented(self) -> list[str]:
        """Arguments without a line of their own in the section Args.

        Fewer than three need no line.
        """
        named = re.findall(r"^ +\*{0,2}(\w+): ", section(self.docstring, "Args"), re.MULTILINE)
        missing = [name for name in self.arguments if name not in named]
        return missing if len(self.arguments) >= 3 else []

    @property
    def raises_unsaid(self) -> bool:
        """True if the function raises an error itself and its docstring has no section Raises."""
        errors = [each.exc for each in own_nodes(self.node) if isinstance(each, ast.Raise)]
        said = "NotImplementedError"
        named = [error for error in errors if error and not ast.unparse(error).startswith(said)]
        return bool(named) and not section(self.docstring, "Raises")

    @property
    def shapes_unsaid(self) -> bool:
        """True if the function takes or returns tensors and its docstring names no shape."""
        every = self.node.args
        hints = [arg.annotation for arg in [*every.posonlyargs, *every.args, *every.kwonlyargs]]
        names = {
            each.id
            for hint in [*hints, self.node.returns]
            if hint
            for each in ast.walk(hint)
            if isinstance(each, ast.Name)
        }
        return "Tensor" in names and not SHAPE.search(self.docstring)


def section(docstring: str, title: str) -> str:
    """Return the indented lines below `Args:` or another title; "" without such a section."""
    found = re.search(rf"^{title}:\n((?: +.*\n?|\n)+)", docstring, re.MULTILINE)
    return found[1] if found else ""


def own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Return the nodes of a function, without the bodies of functions and classes inside."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, Function | ast.ClassDef | ast.Lambda):
            yield child
            yield from own_nodes(child)


def public_interface(files: Iterable[Source]) -> list[PublicFunction]:
    """Return the public functions of the library and of its strategies.

    A method that overrides one of a base class is left out: the base class documents it.
    """
    files = [source for source in files if source.name.startswith(LIBRARY)]
    bodies = {source.name: source.tree.body for source in files}
    listed = {name: names_in_all(body) for name, body in bodies.items()}
    classes = {n.name: n for body in bodies.values() for n in body if isinstance(n, ast.ClassDef)}
    found = []
    for name, body in bodies.items():
        names = set(listed[name])
        for folder in Path(name).parents:
            names |= listed.get(str(folder / "__init__.py"), set())
        for node in body:
            place = f"{name}:{node.lineno} {getattr(node, 'name', '')}"
            if isinstance(node, Function) and node.name in names:
                found.append(PublicFunction(place, node))
            if isinstance(node, ast.ClassDef) and is_public_class(node, name, names):
                found += methods(node, place, classes)
    return found


def names_in_all(body: Iterable[ast.stmt]) -> set[str]:
    """Return the texts in the assignments to `__all__`."""
    found = [
        node.value
        for node in body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    parts = [part for value in found for part in ast.walk(value)]
    return {str(part.value) for part in parts if isinstance(part, ast.Constant)}


def is_public_class(node: ast.ClassDef, file: str, names: set[str]) -> bool:
    """Return True if a class is in the given names, or is a public class in a strategy's file."""
    return node.name in names or (file.startswith("strategies") and not is_private(node.name))


def methods(
    node: ast.ClassDef, place: str, classes: Mapping[str, ast.ClassDef]
) -> Iterator[PublicFunction]:
    """Yield public methods and constructor of a class, without those that a base class has, too."""
    above = {part.name for base in bases(node, classes) for part in base.body if is_def(part)}
    for part in node.body:
        if is_def(part) and part.name not in above:
            public = not part.name.startswith("_") or part.name in ("__init__", "__call__")
            if public:
                yield PublicFunction(f"{place}.{part.name}", part, node)


def is_def(part: ast.stmt) -> TypeGuard[Function]:
    """Return True if a statement defines a function."""
    return isinstance(part, Function)


def bases(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> Iterator[ast.ClassDef]:
    """Yield the base classes of a class that are classes of this library."""
    for hint in node.bases:
        name = ast.unparse(hint).partition("[")[0].rpartition(".")[2]
        if name in classes and classes[name] is not node:
            yield classes[name]
            yield from bases(classes[name], classes)


def breaches(files: Iterable[Source]) -> dict[str, list[str]]:
    """Collect the breaches of each rule, by rule."""
    files = list(files)
    code = [source for source in files if not source.name.startswith("tests/")]
    tests = [source for source in files if source.name.startswith("tests/")]
    public = public_interface(files)
    return {
        "sentences that open with What/Whether/How/Who": [
            line for source in code for line in noun_clauses(source)
        ],
        "names of tests": [line for source in tests for line in badly_named_tests(source)],
        "arguments without a line in Args": [
            f"{each.place}: {', '.join(each.undocumented)}" for each in public if each.undocumented
        ],
        "arguments that share a line in Args": [
            line for source in code for line in shared_lines(source)
        ],
        "errors without a section Raises": [each.place for each in public if each.raises_unsaid],
        "tensors without a shape": [each.place for each in public if each.shapes_unsaid],
    }


def main() -> None:
    """Print the breaches of every rule."""
    for rule, lines in breaches(sources(EVERYTHING)).items():
        print(f"{rule}: {len(lines)}")
        for line in lines:
            print(f"    {line}")


if __name__ == "__main__":
    main()
