"""Measures of the code that must stay at their best; `make measure` prints the others too.

The checker is tested on snippets first: it must find each violation, and nothing else.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "measure.py"


@pytest.fixture(scope="module")
def measure():
    """Import the script as a module; its dataclass finds the module by name."""
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[SCRIPT.stem] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[SCRIPT.stem]


@pytest.fixture(scope="module")
def whole(measure):
    return measure.sources(measure.EVERYTHING)


@pytest.fixture(scope="module")
def library(measure, whole):
    return [source for source in whole if source.name.startswith(measure.LIBRARY)]


# -------------------------------------------------------------------------------- the checker


def test_the_style_measure_reads_every_source_file_once(measure, whole):
    names = [source.name for source in whole]
    assert len(set(names)) == len(names)
    assert {"src/perdure/errors.py", "strategies/ewc.py", "tests/conftest.py"} <= set(names)
    assert not [name for name in names if name.startswith("src/perdure/strategies/")], "a link"


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("a, b = 1, 2", 1),
        ("self.a, self.b = x, y", 1),
        ("a, b = b, a", 1),
        ("(a, b), c = f(), 2", 1),
        ("a = b, c = 1, 2", 1),
        ("a, b = f()", 0),
        ("a, *b = 1, 2, 3", 0),
        ("a = 1, 2", 0),
        ("a = b = 1", 0),
        ("for a, b in ((1, 2), (3, 4)):\n    pass", 0),
    ],
)
def test_the_style_measure_finds_unrelated_tuple_assignments(measure, code, count):
    assert len(measure.packed(measure.Source(code))) == count


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("a = 1  # fmt: skip", 1),
        ("# fmt: off\na = 1\n# fmt: on", 1),
        ("a = 1  #fmt:skip", 1),
        ("a = '# fmt: skip'", 0),
        ("a = 1  # the format: skip it", 0),
    ],
)
def test_the_style_measure_finds_comments_for_the_formatter(measure, code, count):
    assert len(measure.unformatted(measure.Source(code))) == count


OWN_CLASS = """
class A:
    limit: int
    _fixed = 3

    def __init__(self, x):
        self._x = x
        object.__setattr__(self, "_y", x)

    def _method(self):
        return self._x

def f(other):
    return other._x, other._y, other._fixed, other._method(), getattr(other, "_x")
"""


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from m import _x", ["_x"]),
        ("from m import _x as x", ["_x"]),
        ("from m import x, _y", ["_y"]),
        ("obj._x", ["_x"]),
        ("obj._x = 1", ["_x"]),
        ("self.inner._x", ["_x"]),
        ("a.b()._x()", ["_x"]),
        ("getattr(obj, '_x')", ["_x"]),
        ("getattr(obj, '_x', None)", ["_x"]),
        ("monkeypatch.setattr(obj, '_x', 1)", ["_x"]),
        ("monkeypatch.setattr('perdure.m._x', 1)", ["perdure.m._x"]),
        ("self._x", []),
        ("cls._x", []),
        ("super()._x()", []),
        ("setattr(self, '_x', 1)", []),
        ("getattr(obj, 'x')", []),
        ("obj.__class__", []),
        ("from m import __version__", []),
        ("_x = 1\nprint(_x)", []),
        ("for _ in obj.x_: pass", []),
        ("point._replace(x=1)", []),
        (OWN_CLASS, []),
        (OWN_CLASS + "\nother._z", ["_z"]),
    ],
)
def test_the_style_measure_finds_uses_of_private_names(measure, code, found):
    lines = measure.private_accesses(measure.Source(code), {})
    assert [line.split()[1].rstrip(":") for line in lines] == found


def test_the_style_measure_accepts_listed_private_names(measure):
    source = measure.Source("nn.modules.dropout._DropoutNd, obj._x")
    assert len(measure.private_accesses(source, {})) == 2
    assert len(measure.private_accesses(source, {"_DropoutNd": "why"})) == 1


def test_listed_private_names_are_foreign_used_and_justified(measure, library, whole):
    defined = {name for source in library for name in measure.own_names(source)}
    assert not defined & set(measure.FOREIGN), "a name of perdure's own needs no exception"
    used = "\n".join(line for source in whole for line in measure.private_accesses(source, {}))
    assert [name for name in measure.FOREIGN if f" {name}: " not in used] == []
    assert all(": " in reason for reason in measure.FOREIGN.values())


def test_function_lengths_leave_out_the_docstring(measure):
    source = measure.Source('def f():\n    """One.\n\n    Two.\n    """\n    return 1\n')
    assert measure.functions(source) == {"snippet.py:1 f": 2}
    nested = measure.Source("def f():\n    def g():\n        return 1\n    return g\n")
    assert measure.functions(nested) == {"snippet.py:1 f": 4, "snippet.py:2 g": 2}


def test_comment_counts_leave_out_rulers_and_linter_settings(measure):
    text = "# why\na = 1  # because\n# ------- part\nb = 2  # noqa: E501\nc = '# no'\n# type of c\n"
    assert measure.comments(measure.Source(text)) == ["# why", "# because", "# type of c"]


def test_the_style_measure_script_prints_its_table(measure, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["measure.py"])
    measure.main()
    shown = capsys.readouterr().out
    for name in ("functions per 1,000 lines", "comments per 1,000 lines", "docs pages"):
        assert name in shown


# ----------------------------------------------------------------------------------- the code


def test_no_file_switches_off_the_formatter(measure, whole):
    assert [place for source in whole for place in measure.unformatted(source)] == []


def test_at_most_1_percent_of_assignments_join_unrelated_values(measure, library):
    found = [line for source in library for line in measure.packed(source)]
    every = sum(len(measure.assignments(source)) for source in library)
    assert every > 1000
    assert len(found) < 0.01 * every, "\n".join(found)


def test_no_function_is_longer_than_60_lines(measure, whole):
    every = [
        (name, lines)
        for source in whole
        if not source.name.startswith("tests/")
        for name, lines in measure.functions(source).items()
    ]
    assert len(every) > 1000
    assert [pair for pair in every if pair[1] > measure.LONGEST] == []


def test_no_file_uses_private_names_of_another_module(measure, whole):
    assert [line for source in whole for line in measure.private_accesses(source)] == []
