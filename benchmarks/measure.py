"""Measures of the code's shape: length of functions, comments, packing, docstrings, private access.

The table is printed by `make measure`, for `src/perdure` and `strategies` where it names no other
folder. `tests/test_measures.py` holds the measures that must stay at their best.

    python benchmarks/measure.py
    python benchmarks/measure.py --private      # every private access, with file and line
"""

import argparse
import ast
import io
import re
import statistics
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ("src/perdure", "strategies")
EVERYTHING = (*LIBRARY, "benchmarks", "tests")
LONGEST = 60
"""Largest number of lines of a function, without its docstring."""
QUESTIONS = re.compile(r"(What|Whether|How|Who)\b")
FORMATTER_OFF = re.compile(r"#\s*fmt:\s*(skip|off)")
RULER = re.compile(r"#\s*-{5}")
DOCUMENTED = frozenset({"_asdict", "_exit", "_fields", "_getframe", "_make", "_replace"})
"""Names of the standard library that begin with an underscore but are documented."""
FOREIGN = {
    "_ConvNd": "torch: the only common class of convolutions",
    "_DropoutNd": "torch: the only common class of dropout layers",
    "_BatchNorm": "torch: the only common class of batch normalisation",
    "_InstanceNorm": "torch: the only common class of instance normalisation",
    "_NormBase": "torch: the only common class of normalisation by running statistics",
    "_SpectralNorm": "torch: the class that `spectral_norm` registers; the guard refuses it",
    "_pytree": "torch: the only walk over the arguments of an operation",
    "_make_wrapper_subclass": "torch: the one way to a tensor that holds no rows of its own",
    "_compiled_call_impl": "torch: the only sign that `module.compile()` was called",
    "_C": "torch: the only switch that keeps a tensor subclass out of an operation",
    "_schema": "torch: the only list of the arguments that an operation writes to",
    "_dynamo": "torch: the package that compiles modules, whose caches tests empty",
    "_index_put_impl_": "torch: the operation behind an assignment to indexed elements",
    "_to_copy": "torch: the operation behind `tensor.to`",
    "_parameters": "torch: a layer's own parameters by name, None included, without a copy",
    "_base": "torch: the tensor that a view looks at, whose gradient an in-place operation moves",
    "_buffers": "torch: a module's own buffers by name, without a copy",
    "_forward_hooks": "torch: the only list of a module's hooks",
    "_forward_pre_hooks": "torch: as `_forward_hooks`",
    "_backward_hooks": "torch: as `_forward_hooks`",
    "_post_accumulate_grad_hooks": "torch: the only list of a parameter's hooks of that kind",
    "_backward_pre_hooks": "torch: as `_forward_hooks`",
    "_global_forward_hooks": "torch: the only list of the hooks of all modules",
    "_input_metadata": "torch: the only shape of a tensor that left a node of the graph",
    "_saved_alpha": "torch: the only word on what a node of the graph did",
    "_saved_dims": "torch: as `_saved_alpha`",
    "_saved_other": "torch: as `_saved_alpha`",
    "_saved_self": "torch: as `_saved_alpha`",
    "_foreach_add": "torch: one pass over many tensors; torch's own optimisers use it",
    "_foreach_add_": "torch: as `_foreach_add`",
    "_foreach_copy_": "torch: as `_foreach_add`",
    "_foreach_mul": "torch: as `_foreach_add`",
    "_foreach_mul_": "torch: as `_foreach_add`",
    "_foreach_norm": "torch: as `_foreach_add`",
    "_foreach_sign": "torch: as `_foreach_add`",
    "_foreach_sub_": "torch: as `_foreach_add`",
    "_version": "torch: tells whether a tensor was changed in place since it was recorded",
    "_adjusted_noise_multiplier": "Opacus: the one mark of optimisers that move their clip norm",
    "_module": "Opacus: the model inside its wrappers and inside data-parallel ones",
    "_criterion": "Avalanche: a template keeps its loss under this name only",
    "_datasets": "Avalanche: the parts below a data set, to trace rows to their source",
    "_flat_data": "Avalanche: as `_datasets`",
    "_indices": "Avalanche: as `_datasets`",
}
"""Private names of other libraries that are used because no public name exists, with reasons."""
BY_NAME = frozenset({"delattr", "getattr", "hasattr", "setattr"})
"""Functions, and methods such as pytest's `monkeypatch.setattr`, that take an attribute's name."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """Text of one file.

    Args:
        name: path below the root of the checkout.
        text: content.
    """

    text: str
    name: str = "snippet.py"

    @cached_property
    def tree(self) -> ast.Module:
        """Return the syntax tree of the text."""
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        """Return every node of the syntax tree."""
        return tuple(ast.walk(self.tree))

    @cached_property
    def comments(self) -> list[tuple[int, str]]:
        """Return every comment with its line."""
        words = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return [(word.start[0], word.string) for word in words if word.type == tokenize.COMMENT]


def sources(folders: Iterable[str], root: Path = ROOT) -> list[Source]:
    """Read every Python file of these folders; links are not followed."""
    root = root.resolve()
    found = []
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            if path.resolve() == path:
                found.append(read(path, str(path.relative_to(root))))
    return found


@cache
def read(path: Path, name: str) -> Source:
    """Read a file once, so that its syntax tree is made once."""
    return Source(path.read_text(), name)


# ---------------------------------------------------------------------------------- one file


def functions(source: Source) -> dict[str, int]:
    """Return the lines of every function without its docstring, by file, line and name."""
    found = {}
    for node in source.nodes:
        if isinstance(node, Function):
            first = node.body[0]
            docstring = first.lineno - 1 if ast.get_docstring(node) is None else first.end_lineno
            assert node.end_lineno is not None and docstring is not None
            lines = node.end_lineno - node.lineno + 1 - (docstring - first.lineno + 1)
            found[f"{source.name}:{node.lineno} {node.name}"] = lines
    return found


def comments(source: Source) -> list[str]:
    """Return the comments, without rulers and without settings of a tool."""
    tool = re.compile(r"#\s*(noqa|fmt:|type:|pragma:|mypy:|ruff:)")
    return [text for _, text in source.comments if not tool.match(text) and not RULER.match(text)]


def unformatted(source: Source) -> list[str]:
    """Return the places where ruff's formatter is switched off."""
    if not FORMATTER_OFF.search(source.text):
        return []
    return [f"{source.name}:{line}" for line, text in source.comments if FORMATTER_OFF.search(text)]


def assignments(source: Source) -> list[ast.Assign]:
    """Return every assignment, without annotated and augmented ones."""
    return [node for node in source.nodes if isinstance(node, ast.Assign)]


def packed(source: Source) -> list[str]:
    """Find assignments of a tuple of values to a tuple of names, such as `a, b = 1, 2`."""
    found = []
    for node in assignments(source):
        sizes = [len(part.elts) for part in node.targets if isinstance(part, ast.Tuple)]
        if isinstance(node.value, ast.Tuple) and len(node.value.elts) in sizes:
            found.append(f"{source.name}:{node.lineno} {ast.unparse(node)}")
    return found


def docstrings(source: Source) -> list[str]:
    """Return the docstrings of the module, its classes and its functions."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in source.nodes if isinstance(node, kinds)]
    return [text for node in nodes if (text := ast.get_docstring(node))]


def public_functions(source: Source) -> list[Function]:
    """Return the functions and methods whose names do not begin with an underscore."""
    nodes = [node for node in source.nodes if isinstance(node, Function)]
    return [node for node in nodes if not node.name.startswith("_")]


# ----------------------------------------------------------------------------- private access


def private_accesses(source: Source, allowed: Mapping[str, str] = FOREIGN) -> list[str]:
    """Find uses of private names of other modules.

    Examples are `from m import _x`, `obj._x` and `getattr(obj, "_x")`.

    A name is the file's own if one of its classes defines it, in the body or through `self`; what
    is reached through `self`, `cls` or `super()` is fine too.

    Args:
        source: the file.
        allowed: names that may be used all the same, each with its reason.
    """
    own = own_names(source) | DOCUMENTED | set(allowed)
    found = []
    for node in source.nodes:
        for name in private_names(node):
            if name.rpartition(".")[2] not in own:
                found.append((getattr(node, "lineno", 0), name, ast.unparse(node)))
    return [f"{source.name}:{line} {name}: {code[:80]}" for line, name, code in sorted(found)]


def private_names(node: ast.AST) -> Iterator[str]:
    """Return the private names that a node uses, including the file's own names."""
    if isinstance(node, ast.ImportFrom):
        yield from (alias.name for alias in node.names if is_private(alias.name))
    elif isinstance(node, ast.Attribute):
        if is_private(node.attr) and not is_own(node.value):
            yield node.attr
    elif isinstance(node, ast.Call) and called(node.func) in BY_NAME:
        yield from names_in_call(node)


def names_in_call(node: ast.Call) -> Iterator[str]:
    """Return the private names in texts: the second argument, or a dotted path as the first."""
    texts = [arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant)]
    if not node.args or is_own(node.args[0]):
        return
    for text in texts:
        if isinstance(text, str) and is_private(text.rpartition(".")[2]):
            yield text


def called(function: ast.expr) -> str:
    """Return the last part of the name of a called function, as in `monkeypatch.setattr`."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def is_private(name: str) -> bool:
    """Return True for `_x`, not for `_` and `__x__`."""
    return name.startswith("_") and name.strip("_") != "" and not name.endswith("__")


def is_own(value: ast.expr) -> bool:
    """Return True for `self`, `cls` and `super()`."""
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "super"
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def own_names(source: Source) -> set[str]:
    """Return the names that the file's classes define, in their bodies or through `self`."""
    found: set[str] = set()
    for node in source.nodes:
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                found |= defined(part)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if is_own(node.value) else set()
        elif isinstance(node, ast.Call) and called(node.func) in ("__setattr__", "setattr"):
            owner, name = [*node.args[:2], None, None][:2]
            if owner and is_own(owner) and isinstance(name, ast.Constant):
                found.add(str(name.value))
    return found


def defined(part: ast.stmt) -> set[str]:
    """Return the names that a statement of a class body defines."""
    if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {part.name}
    targets = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", None)]
    names = [node for target in targets if target for node in ast.walk(target)]
    return {node.id for node in names if isinstance(node, ast.Name)}


# ---------------------------------------------------------------------------------- the table


def table(root: Path = ROOT) -> dict[str, str]:
    """Compute every measure, by the name under which it is printed."""
    whole = sources(EVERYTHING, root)
    library = [source for source in whole if source.name.startswith(LIBRARY)]
    tests = [source for source in whole if source.name.startswith("tests/")]
    lengths = [n for source in library for n in functions(source).values()]
    lines = line_count(library)
    texts = [text for source in library for text in docstrings(source)]
    public = [node for source in library for node in public_functions(source)]
    tuples = sum(len(packed(source)) for source in library)
    middle = statistics.median(lengths)
    ninth = statistics.quantiles(lengths, n=10)[-1]
    remarks = sum(len(comments(source)) for source in library)
    return {
        "function median / 9 in 10 below / longest": f"{middle:.0f} / {ninth:.0f} / {max(lengths)}",
        "functions per 1,000 lines": f"{1000 * len(lengths) / lines:.0f}",
        "comments per 1,000 lines": f"{1000 * remarks / lines:.1f}",
        "`fmt: skip` and `fmt: off`, everywhere": str(
            sum(len(unformatted(source)) for source in whole)
        ),
        "assignments that pack unrelated values into a tuple": share(
            tuples, sum(len(assignments(source)) for source in library)
        ),
        "docstrings that open with What/Whether/How/Who": share(
            sum(bool(QUESTIONS.match(text)) for text in texts), len(texts)
        ),
        "docs pages": str(len(list((root / "docs").rglob("*.md")))),
        "public functions documented": share(
            sum(ast.get_docstring(node) is not None for node in public), len(public)
        ),
        "public functions with return types": share(
            sum(node.returns is not None for node in public), len(public)
        ),
        "tests to code": f"{line_count(tests) / lines:.2f}",
        "private names of other modules used, everywhere": str(
            sum(len(private_accesses(source)) for source in whole)
        ),
        "lines of code / of tests": f"{lines:,} / {line_count(tests):,}",
    }


def line_count(files: Iterable[Source]) -> int:
    """Return the number of lines of all files together."""
    return sum(source.text.count("\n") for source in files)


def share(part: int, whole: int) -> str:
    """Compute a percentage, with one decimal."""
    return f"{100 * part / whole:.1f} %"


def main() -> None:
    """Print the table, or the private accesses with `--private`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--private", action="store_true", help="list every private access instead")
    if parser.parse_args().private:
        for source in sources(EVERYTHING):
            for access in private_accesses(source):
                print(access)
        return
    shown = Table("measure", "value", title="shape of src/perdure and strategies")
    for name, value in table().items():
        shown.add_row(name, value)
    Console(width=100).print(shown)


if __name__ == "__main__":
    main()
