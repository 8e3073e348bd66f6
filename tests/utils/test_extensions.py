"""Extensions by name: files of a package, entry points of distributions, and module:name."""

import itertools
import sys
from textwrap import dedent

import pytest

from helpers.distributions import distribution
from perdure.errors import ConfigError
from perdure.utils.extensions import Extensions, is_proper_subclass

FILES = {
    "__init__.py": "",
    "base.py": """
        from abc import ABC, abstractmethod

        class Shape(ABC):
            @abstractmethod
            def area(self): ...
    """,
    "square.py": """
        from PACKAGE.base import Shape

        class _Hidden(Shape):
            def area(self): return 0

        class Square(Shape):
            def area(self): return 1

        Same = Square
    """,
    "right_circle.py": """
        from PACKAGE.base import Shape
        from PACKAGE.square import Square

        class RightCircle(Shape):
            def area(self): return 3
    """,
    "empty.py": "from PACKAGE.base import Shape",
    "two.py": """
        from PACKAGE.base import Shape

        class One(Shape):
            def area(self): return 1

        class Two(Shape):
            def area(self): return 2
    """,
    "broken.py": "import no_such_module_at_all",
    "_helper.py": "raise RuntimeError('a helper was imported')",
    "folder/__init__.py": "",
}
NAMES = ("broken", "empty", "right_circle", "square", "two")
OUTSIDE = """
    from PACKAGE.base import Shape

    class Triangle(Shape):
        def area(self): return 0.5

    class Abstract(Shape):
        pass

    number = 3
"""


class Shapes:
    """A separate package for every test, with its registry and a folder for other distributions."""

    def __init__(self, folder, number):
        self.folder = folder
        self.package = f"shapes_{number}"
        self.group = f"{self.package}.extensions"
        self.outside = f"outside_{number}"
        modules = {f"{self.package}/{file}": self.own(text) for file, text in FILES.items()}
        distribution(folder, f"{self.package}-host", modules, {})

    def own(self, text):
        return dedent(text).replace("PACKAGE", self.package)

    def add(self, name, entries, text=OUTSIDE):
        """Add a distribution with one module to the path."""
        modules = {f"{self.outside}.py": self.own(text)}
        distribution(self.folder / name, name, modules, {self.group: entries})
        sys.path.insert(0, str(self.folder / name))

    def registry(self, **options):
        return Extensions(
            kind="shape",
            package=self.package,
            group=self.group,
            fits=self.is_shape,
            wanted=f"a subclass of {self.package}.base.Shape",
            helpers=("base",),
            **options,
        )

    def is_shape(self, value):
        return is_proper_subclass(value, sys.modules[f"{self.package}.base"].Shape)

    def refusal(self, name, **options):
        with pytest.raises(ConfigError) as caught:
            self.registry().find(name, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)


NUMBER = itertools.count()


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    made = Shapes(tmp_path, next(NUMBER))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return made


# --------------------------------------------------------------------------- files


def test_extension_files_are_listed_without_an_import(shapes):
    assert shapes.registry().names() == NAMES
    loaded = {name for name in sys.modules if name.startswith(f"{shapes.package}.")}
    assert loaded == set()


def test_an_extension_file_is_found_as_the_one_class_in_the_file(shapes):
    registry = shapes.registry()
    assert registry.find("square").__name__ == "Square"
    assert registry.find("right_circle")().area() == 3


def test_an_extension_class_is_an_attribute_of_its_package(shapes):
    registry = shapes.registry()
    assert registry.attribute("RightCircle") is registry.find("right_circle")
    for name in ("Rightcircle", "right_circle", "Circle", "On"):
        with pytest.raises(AttributeError, match=f"has no '{name}'; its shape files are broken, "):
            registry.attribute(name)


@pytest.mark.parametrize(("name", "count"), [("empty", 0), ("two", 2)])
def test_an_extension_file_must_define_exactly_one_extension(shapes, name, count):
    message = shapes.refusal(name)
    assert message.startswith(f"{shapes.package}/{name}.py defines {count} objects that are a sub")
    assert "allowed: exactly one; " in message


def test_the_error_names_an_extension_file_that_fails_to_import(shapes):
    message = shapes.refusal("broken")
    assert message.startswith(f"{shapes.package}/broken.py cannot be imported (ModuleNotFoundError")
    assert "no_such_module_at_all" in message


def test_an_unknown_extension_is_refused_with_the_known_names(shapes):
    assert shapes.refusal("sqare") == (
        "shape = 'sqare' is not allowed; allowed: broken, empty, right_circle, square, two, or "
        "\"module:name\"; did you mean 'square'?"
    )
    assert shapes.refusal("zzzz", field="table.name").startswith("table.name = 'zzzz' is not")
    for name in ("base", "_helper", "folder", "../square", ""):
        assert "is not allowed; allowed: broken, " in shapes.refusal(name)


def test_an_extension_function_is_found_by_its_file_name(shapes):
    package = shapes.folder / shapes.package
    (package / "load.py").write_text("def helper(): ...\ndef load(): return 7\n")
    (package / "other.py").write_text("def another(): ...\n")
    registry = Extensions(
        kind="loader",
        package=shapes.package,
        group=shapes.group,
        fits=callable,
        wanted="a function",
        named_as_file=True,
    )
    assert registry.find("load")() == 7
    with pytest.raises(ConfigError, match=r"other\.py defines 0 objects .* exactly one called oth"):
        registry.find("other")


# --------------------------------------------------------------------------- entry points


def test_an_entry_point_extension_is_listed_and_found(shapes):
    shapes.add("tri-angles", {"triangle": f"{shapes.outside}:Triangle"})
    registry = shapes.registry()
    assert registry.names() == (*NAMES[:4], "triangle", "two")
    assert shapes.outside not in sys.modules
    assert registry.find("triangle")().area() == 0.5
    assert registry.files() == NAMES


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no_such_package:Mine", "ModuleNotFoundError"),
        ("OUTSIDE:Missing", "AttributeError"),
        ("OUTSIDE", "is not allowed; allowed: a subclass of "),
        ("OUTSIDE:Abstract", "is not allowed; allowed: a subclass of "),
        ("OUTSIDE:number", "is not allowed; allowed: a subclass of "),
    ],
)
def test_the_error_of_a_wrong_entry_point_names_its_distribution(shapes, value, reason):
    __import__(f"{shapes.package}.base")
    shapes.add("bad-shapes", {"bad": value.replace("OUTSIDE", shapes.outside)})
    message = shapes.refusal("bad")
    assert message.startswith("entry point 'bad' of distribution bad-shapes")
    assert reason in message
    assert message.endswith("repair or uninstall that distribution")


def test_an_import_error_of_an_extension_is_one_line(shapes):
    shapes.add("bad-shapes", {"bad": f"{shapes.outside}:X"}, "raise ValueError('two\\nlines')")
    message = shapes.refusal("bad")
    assert "distribution bad-shapes" in message
    assert "(ValueError: two lines)" in message


def test_an_entry_point_with_the_name_of_a_file_is_refused(shapes):
    shapes.add("squares", {"square": f"{shapes.outside}:Triangle"})
    message = shapes.refusal("square", field="arms[0].shape")
    assert message == (
        f"arms[0].shape = 'square' is claimed by {shapes.package} (square.py) and distribution "
        'squares; allowed: one shape per name; uninstall one of them, or give "module:name"'
    )
    assert shapes.registry().names() == NAMES
    assert shapes.registry().find(f"{shapes.package}.square:Square").__name__ == "Square"


def test_two_distributions_with_one_extension_name_are_refused(shapes):
    shapes.add("first", {"triangle": f"{shapes.outside}:Triangle"})
    shapes.add("second", {"triangle": f"{shapes.outside}:Triangle"})
    assert "claimed by distribution first and distribution second" in shapes.refusal("triangle")


# --------------------------------------------------------------------------- module:name


def test_an_extension_is_found_by_module_and_name(shapes):
    shapes.add("others", {})
    assert shapes.registry().find(f"{shapes.outside}:Triangle")().area() == 0.5
    assert shapes.registry().find(f"{shapes.package}.right_circle:Square").__name__ == "Square"


@pytest.mark.parametrize(
    "name",
    [":", "a:", ":A", "a b:C", "a:b c", "a:b:c", "a..b:C", "1a:B", "a:B.C", "a:B[x]", "é-:A"],
)
def test_an_extension_name_that_is_not_valid_python_is_refused(shapes, name):
    assert shapes.refusal(name) == (
        f'shape = {name!r} is not allowed; allowed: "package.module:Name", both of them importable'
    )


def test_a_missing_extension_module_or_name_is_refused(shapes):
    shapes.add("others", {})
    message = shapes.refusal("no_such_package.inside:Mine")
    assert message.startswith("shape = 'no_such_package.inside:Mine' cannot be imported (ModuleNot")
    assert message.endswith("install the package")
    assert "(AttributeError: " in shapes.refusal(f"{shapes.outside}:Missing")


@pytest.mark.parametrize("name", ["OUTSIDE:number", "OUTSIDE:Abstract", "PACKAGE.base:Shape"])
def test_an_object_of_the_wrong_kind_is_refused_as_extension(shapes, name):
    __import__(f"{shapes.package}.base")
    shapes.add("others", {})
    given = shapes.own(name).replace("OUTSIDE", shapes.outside)
    assert shapes.refusal(given) == (
        f"shape = {given!r} is not allowed; allowed: a subclass of {shapes.package}.base.Shape; "
        "name such an object after the colon"
    )
