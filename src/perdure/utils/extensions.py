"""Search for extensions by name: one per file of a package, or one per entry point.

Entry points are registered by other distributions.
    kind="attack",                   # the word that messages use
    package="perdure.adversarial",   # every file of its folder is one extension
    group="perdure.attacks",         # entry-point group of other distributions
    fits=_is_attack,                 # a TypeGuard: gives `find` its return type
    wanted="a subclass of perdure.adversarial.Attack",
    helpers=("base", "robust_accuracy"),
)
EXTENSIONS.names()                          # ("fgsm", "pgd"); imports none of them
EXTENSIONS.find("pgd")                      # the class of adversarial/pgd.py
EXTENSIONS.find("my_package.attacks:Mine")  # the class of any module
"""

import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Any, Generic, TypeGuard, TypeVar

from perdure.errors import ConfigError
from perdure.utils.near_names import did_you_mean

T = TypeVar("T")

MODULE_AND_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


@dataclass(frozen=True, kw_only=True)
class Extensions(Generic[T]):
    """Find the extensions of one kind by their names.

    A name is the stem of a file in the package's folder, the name of an entry point in the group,
    or `"module:name"`. Files that begin with an underscore are helpers.

    Args:
        kind: noun for one extension, for error messages.
        package: dotted name of the package whose files are the extensions.
        group: entry-point group in which other distributions register their extensions.
        fits: function that returns True if an object is such an extension.
        wanted: description of such an extension in words, for error messages.
        helpers: stems of other files in the folder, which have no extension.
        named_as_file: True if an extension must have the name of its file; the file may then have
            other public functions, too.
    """

    kind: str
    package: str
    group: str
    fits: Callable[[object], TypeGuard[T]]
    wanted: str
    helpers: tuple[str, ...] = ()
    named_as_file: bool = False

    def names(self) -> tuple[str, ...]:
        """Return the sorted names of all files and entry points; none of them is imported."""
        return tuple(sorted({*self.files(), *(entry.name for entry in self._entries())}))

    def files(self) -> tuple[str, ...]:
        """Return the sorted names of the extensions in the package's own folder."""
        folder = importlib.import_module(self.package).__path__
        return tuple(
            sorted(
                found.name
                for found in pkgutil.iter_modules(folder)
                if not (found.ispkg or found.name.startswith("_") or found.name in self.helpers)
            )
        )

    def find(self, name: str, *, field: str | None = None) -> T:
        """Return the extension called `name`.

        Args:
            name: a name of `names()`, or "module:name".
            field: name of the setting or argument with this value, for the message; None for the
                kind.

        Raises:
            ConfigError: if nothing has this name, it cannot be imported, it is of another kind, its
                file does not define exactly one, or two sources have the same name.
        """
        if ":" in name:
            return self._of_module(name, field or self.kind)
        in_folder = name in self.files()
        entries = [entry for entry in self._entries() if entry.name == name]
        if in_folder + len(entries) > 1:
            own = [f"{self.package} ({name}.py)"] if in_folder else []
            raise self._ambiguous(name, field or self.kind, [*own, *map(_source, entries)])
        if in_folder:
            return self._of_file(name)
        if entries:
            return self._of_entry(entries[0])
        raise self._unknown(name, field or self.kind)

    def _entries(self) -> list[EntryPoint]:
        """Entry points of the group, ordered by name and distribution."""
        entries = _installed(self.group, tuple(sys.path))
        return sorted(entries, key=lambda entry: (entry.name, _source(entry)))

    def attribute(self, name: str) -> T:
        """Return the extension in the package's own folder whose class is called `name`.

        It is for the package's `__getattr__`: `from perdure.strategies import EWC` finds ewc.py.

        Raises:
            AttributeError: if no file defines it.
        """
        by_class_name = {file.replace("_", ""): file for file in self.files()}
        file = by_class_name.get(name.lower())
        found = self._of_file(file) if file else None
        if found is None or getattr(found, "__name__", None) != name:
            raise AttributeError(
                f"{self.package} has no {name!r}; its {self.kind} files are "
                f"{', '.join(self.files())}"
            )
        return found

    def _of_file(self, name: str) -> T:
        place = f"{self.package.rpartition('.')[2]}/{name}.py"
        module = _imported(
            lambda: importlib.import_module(f"{self.package}.{name}"),
            place,
            "a module that can be imported; correct the file",
        )
        found = {
            id(value): value
            for key, value in vars(module).items()
            if not key.startswith("_")
            and (key == name or not self.named_as_file)
            and self.fits(value)
            and getattr(value, "__module__", None) == f"{self.package}.{name}"
        }
        if len(found) != 1:
            exactly = f"one called {name}" if self.named_as_file else "one"
            raise ConfigError(
                f"{place} defines {len(found)} objects that are {self.wanted}; allowed: exactly "
                f"{exactly}; move the others to other files; the name of a file with helpers "
                "begins with an underscore"
            )
        return next(iter(found.values()))

    def _of_entry(self, entry: EntryPoint) -> T:
        given = f"entry point {entry.name!r} of {_source(entry)}"
        found = _imported(
            entry.load,
            f"{given} in group {self.group}",
            f"an importable {entry.value!r}; repair or uninstall that distribution",
        )
        if not self.fits(found):
            raise ConfigError(
                f"{given} = {entry.value!r} is not allowed; allowed: {self.wanted}; "
                "repair or uninstall that distribution"
            )
        return found

    def _of_module(self, name: str, field: str) -> T:
        if not MODULE_AND_NAME.fullmatch(name):
            raise ConfigError.of(field, name, '"package.module:Name", both of them importable')
        found = _imported(
            EntryPoint(name=name, value=name, group=self.group).load,
            f"{field} = {name!r}",
            '"package.module:Name", both of them importable; install the package',
        )
        if not self.fits(found):
            raise ConfigError.of(field, name, f"{self.wanted}; name such an object after the colon")
        return found

    def _ambiguous(self, name: str, field: str, sources: list[str]) -> ConfigError:
        return ConfigError(
            f"{field} = {name!r} is claimed by {' and '.join(sources)}; allowed: one {self.kind} "
            f""
            'per name; uninstall one of them, or give "module:name"'
        )

    def _unknown(self, name: str, field: str) -> ConfigError:
        known = self.names()
        hint = did_you_mean(name, known)
        return ConfigError.of(field, name, f'{", ".join(known)}, or "module:name"{hint}')


def is_proper_subclass(value: object, base: type[Any]) -> bool:
    """Return True if a value is a subclass of `base` that can be instantiated."""
    return (
        isinstance(value, type)
        and issubclass(value, base)
        and value is not base
        and not inspect.isabstract(value)
    )


@cache
def _installed(group: str, path: tuple[str, ...]) -> EntryPoints:
    """Entry points of a group in the distributions on `path`, which is `sys.path`.

    They are cached, because reading them can take a tenth of a second.
    """
    return entry_points(group=group)


def _source(entry: EntryPoint) -> str:
    """Return the name of the distribution that registers an entry point, for messages."""
    return f"distribution {entry.dist.name}" if entry.dist is not None else "an unnamed source"


def _imported(load: Callable[[], object], given: str, allowed: str) -> object:
    """Import an object, and turn any error of its code into a ConfigError of one line.

    The original error is kept as the cause.
    """
    try:
        return load()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{given} cannot be imported ({type(error).__name__}: {reason}); allowed: {allowed}"
        ) from error
