"""Plain English in the code: openings of sentences, names of tests, sections of docstrings.

The checker is tested on snippets first: it must find each breach, and nothing else.
"""

import ast
import importlib
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def english():
    """Import the script as a module from its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("plain_english")


@pytest.fixture(scope="module")
def whole(english):
    return english.sources(english.EVERYTHING)


# -------------------------------------------------------------------------------- the checker


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ('"""What a step costs."""', 1),
        ('def f():\n    """Cost.\n\n    Whether it is paid."""', 1),
        ('class A:\n    """Cost. How it grows is tested."""', 1),
        (
            'def f():\n    """Cost.\n\n    Args:\n        x: one. Who pays: two.\n    """',
            1,
        ),
        ('x = 1\n"""How often it was asked."""', 1),
        ('raise ValueError("what is asked may not depend on records")', 1),
        ('raise ValueError(f"{x} is missing: what was spent would be forgotten")', 1),
        ('"""Tell what a step costs, and how."""', 0),
        ('"""Somewhat. Whatever comes. However it is."""', 0),
        ('raise ValueError("nobody knows what a step costs")', 0),
        ("x = 1  # What a step costs", 0),
    ],
)
def test_the_english_check_finds_what_whether_how_and_who(english, code, count):
    assert len(english.noun_clauses(english.Source(code))) == count


@pytest.mark.parametrize(
    ("name", "count"),
    [
        (f"test_a_{'x' * 53}", 0),
        (f"test_a_{'x' * 54}", 1),
        ("test_shapes", 1),
        ("testShapes", 1),
        ("test_Shapes_are_right", 1),
        ("test_shapes_are_right_when_empty", 0),
        ("tests_of", 1),
        ("shapes", 0),
    ],
)
def test_the_english_check_finds_long_and_invalid_test_names(english, name, count):
    source = english.Source(f"def {name}():\n    pass\n")
    assert len(english.badly_named_tests(source)) == count


def test_the_english_check_finds_arguments_on_a_shared_line(english):
    text = 'def f(a, b):\n    """Add.\n\n    Args:\n        a, b: numbers.\n    """\n'
    assert english.shared_lines(english.Source(text)) == ["snippet.py a, b: numbers."]
    apart = text.replace("a, b: numbers.", "a: number.\n        b: number, of a, b: any.")
    assert english.shared_lines(english.Source(apart)) == []


PACKAGE = '__all__ = ["A", "f"]\n'
MODULE = '''
class Base:
    """Base."""

    def inherited(self, a, b, c):
        """Documented below, as nobody sees this class."""

class A(Base):
    """A.

    Args:
        a: one.
        b: two.
        c: three.
    """

    def __init__(self, a, b, c):
        pass

    def inherited(self, a, b, c):
        """See the base class."""

    def method(self, x: Tensor) -> Tensor:
        """Return it."""
        def inside():
            raise ValueError
        raise NotImplementedError("override it")

    def _hidden(self, a, b, c):
        """Do it."""

def f(a, b, *c, d=1):
    """Do it.

    Args:
        a: one.
        c: more.
    """
    raise ValueError("no")

def g(a, b, c):
    """Do it, beside the public interface."""
'''
STRATEGY = 'class S:\n    """S."""\n    def hook(self, x, y, z):\n        """Do it."""\n'


@pytest.fixture
def interface(english):
    files = [
        english.Source(PACKAGE, "src/perdure/part/__init__.py"),
        english.Source(MODULE, "src/perdure/part/module.py"),
        english.Source(STRATEGY, "strategies/s.py"),
        english.Source(MODULE, "benchmarks/module.py"),
    ]
    return {each.place.split()[1]: each for each in english.public_interface(files)}


def test_the_english_check_finds_the_listed_public_functions(interface):
    assert sorted(interface) == ["A.__init__", "A.method", "S.hook", "f"]


def test_the_english_check_finds_missing_docstring_sections(interface):
    assert interface["f"].undocumented == ["b", "d"]
    assert interface["S.hook"].undocumented == ["x", "y", "z"]
    assert interface["A.__init__"].undocumented == []
    assert [name for name, each in interface.items() if each.raises_unsaid] == ["f"]
    assert [name for name, each in interface.items() if each.shapes_unsaid] == ["A.method"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("(n,) labels", True),
        ("rows (n, ...)", True),
        ("(n, 1 + T, width)", True),
        ("(filters, channels, size, size) float32", True),
        ("in the shape of the parameter", True),
        ("a scalar", True),
        ("called as f(forward, batch)", False),
        ("many (or none, as it is)", False),
    ],
)
def test_the_english_check_recognises_tensor_shapes(english, text, named):
    assert bool(english.SHAPE.search(text)) is named


# ----------------------------------------------------------------------------------- the code


def test_the_english_check_reads_the_whole_public_interface(english, whole):
    places = [each.place.split()[1] for each in english.public_interface(whole)]
    assert len(places) > 400
    assert {"Strategy.losses", "clipped_sum", "run_federation"} <= set(places)


def test_the_code_and_the_tests_keep_the_rules_of_plain_english(english, whole):
    found = english.breaches(whole)
    assert {rule: lines for rule, lines in found.items() if lines} == {}


def test_error_messages_have_no_unfilled_braces():
    """A string without the f prefix would show a name in braces to the user."""
    bare = []
    root = FOLDER.parent
    for path in [*(root / "src").rglob("*.py"), *(root / "strategies").glob("*.py")]:
        for error in ast.walk(ast.parse(path.read_text())):
            if not isinstance(error, ast.Raise):
                continue
            filled = {
                id(part)
                for text in ast.walk(error)
                if isinstance(text, ast.JoinedStr)
                for part in ast.walk(text)
            }
            bare += [
                f"{path.name}:{part.lineno}"
                for part in ast.walk(error)
                if isinstance(part, ast.Constant)
                and id(part) not in filled
                and re.search(r"\{[a-z_]+[.(\[!}]", str(part.value))
            ]
    assert not bare
