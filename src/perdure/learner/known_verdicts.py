"""Cache of the guard's verdicts in this process, each with everything that it depends on.

Learners with equal structure, such as the clients of a federation, are tested once. A verdict is
cached if all code between rows and losses is this library's or a listed module of torch: the result
of other code may depend on anything, so it is tested every time.

A key contains the modules with their settings, hooks and the values of their tensors; the strategy,
the attack and the views with their settings; the state, the plans and the public facts of the
experiences; and every class with all its present attributes. So a replaced method gives another
key, and so does a replaced function of this library or of torch's layers. Objects are compared by
identity and kept alive, never by name.
"""

import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter, is_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perdure.contract.state import State
from perdure.learner.inspection import Inspection, Verdict
from perdure.privacy.clipping.rules.registry import clipping_rules
from perdure.privacy.guard.independence import foreign_rules, is_own, opacus_samplers, unlisted
from perdure.utils.hashing import digest

MOST = 256
"""Most verdicts in the cache; beyond them the oldest one is removed."""

_SKIPPED = frozenset({"_parameters", "_buffers", "_modules"})
"""Attributes of a module that the key contains in another way."""

_LIBRARIES = ("perdure", "torch")
"""Libraries whose functions may be settings; other functions may depend on anything."""


_CODE = (
    *("perdure.contract.", "perdure.strategies.", "perdure.models.", "perdure.adversarial."),
    *("perdure.data.", "perdure.queries.", "perdure.privacy.clipping.", "perdure.privacy.guard."),
    *("perdure.learner.", "perdure.tasks.", "perdure.utils."),
)
"""Modules of this library with functions and classes between rows and losses."""

_FOLLOWED = (*_CODE, "torch.nn.functional", "torch.nn.modules.")
"""Modules whose functions and classes are part of the keys, those of torch included."""

_SPECIAL = frozenset({"__call__", "__init__", "__post_init__", "__getattribute__", "__getattr__"})
"""Names with underscores that are part of the keys too."""


class UnknownKindError(Exception):
    """A value whose kind cannot be part of a key, so that its verdict is not cached."""


class Same:
    """Object as part of a key: equal only to itself, and kept alive by the key."""

    __slots__ = ("thing",)

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


@dataclass(kw_only=True)
class Known:
    """A cached verdict of the guard, and the declared sizes for which it holds.

    Args:
        verdict: the verdict.
        sizes: declared sizes of the experiences for which it was reached; None if no loss read
            them, so that it holds for all sizes.
    """

    verdict: Verdict
    sizes: set[tuple[int, ...]] | None = field(default_factory=set)

    def holds_for(self, sizes: tuple[int, ...]) -> bool:
        """Return True if the verdict holds for these declared sizes."""
        return self.sizes is None or sizes in self.sizes


class KnownVerdicts:
    """Cached verdicts by key, the oldest first."""

    def __init__(self) -> None:
        self._found: OrderedDict[Hashable, Known] = OrderedDict()

    def recall(self, key: Hashable, inspection: Inspection) -> Verdict | None:
        """Return the cached verdict for a key; None if there is none."""
        known = self._found.get(key)
        if known is None or not known.holds_for(_sizes(inspection)):
            return None
        return known.verdict

    def keep(self, key: Hashable, inspection: Inspection, verdict: Verdict) -> None:
        """Cache a verdict for these declared sizes, or for all sizes if none was read.

        A verdict "tested" is not cached.
        """
        if verdict.independence != "by construction" or verdict.alone:
            return
        known = self._found.setdefault(key, Known(verdict=verdict))
        if not inspection.rows.sizes_read:
            known.sizes = None
        elif known.sizes is not None:
            known.sizes.add(_sizes(inspection))
        while len(self._found) > MOST:
            self._found.popitem(last=False)

    def forget(self) -> None:
        """Remove all verdicts, for example after code of the library was replaced."""
        self._found.clear()


VERDICTS = KnownVerdicts()
"""Cached verdicts of this process."""


def key_of(inspection: Inspection) -> Hashable | None:
    """Return everything that a verdict depends on, except declared sizes.

    None if user code, or a value that cannot be part of a key, is involved.
    """
    if unlisted(inspection.model) or foreign_rules(inspection.model):
        return None
    if inspection.path.foreign_parts():
        return None
    try:
        return tuple(_facts(inspection))
    except (UnknownKindError, RecursionError):
        return None


def _facts(inspection: Inspection) -> Iterator[Hashable]:
    training = inspection.training
    path = inspection.path
    stream = training.stream
    yield from _modules(inspection.model)
    yield _state(inspection.state)
    yield described((path.strategy, path.adversary, path.views, path.precision, path.task))
    yield described(path.defence)
    privacy = training.privacy
    yield CODE.version()
    # the self test of clipping clips per layer or at once; the guard reads no other kind
    per_layer = privacy is not None and privacy.clipping == "per-layer"
    yield described((privacy and privacy.custom_forward, per_layer))
    yield described((stream.scenario, stream.num_classes, stream.input_shape, stream.task))
    for experience in stream:
        yield described((experience.index, experience.stage, experience.classes))
        yield described(inspection.domain_of(experience.index))
        yield described(training.of(experience))
    yield described((inspection.at_once, inspection.seed, str(inspection.device)))
    yield described((inspection.rows.seed, torch.get_default_dtype()))


def _sizes(inspection: Inspection) -> tuple[int, ...]:
    """Declared sizes of the experiences, which a loss may read as public facts."""
    return tuple(each.train.declared_size for each in inspection.training.stream)


def _modules(model: nn.Module) -> Iterator[Hashable]:
    """Yield the modules with settings and classes, their clipping rules, and all tensors."""
    rules = clipping_rules()
    samplers = opacus_samplers()
    kinds: dict[type, None] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        kinds[kind] = None
        own = {name: value for name, value in vars(module).items() if name not in _SKIPPED}
        rule = rules.get(kind)
        yield path, Same(kind), described(own), described(rule), Same(samplers.get(kind))
    for kind in kinds:
        yield _class(kind)
    tensors: dict[str, Tensor] = {}
    tensors |= dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    yield _tensors(tensors)


def _tensors(tensors: Mapping[str, Tensor]) -> Hashable:
    """Layout and values of named tensors, and which of them share memory."""
    storages: dict[int, int] = {}
    layouts = []
    for name, value in tensors.items():
        place = storages.setdefault(value.untyped_storage().data_ptr(), len(storages))
        layout = (tuple(value.shape), value.stride(), place, value.storage_offset())
        layouts.append((name, Same(type(value)), value.dtype, value.requires_grad, *layout))
    return tuple(layouts), digest(tensors)


def _state(state: State) -> Hashable:
    return Same(type(state)), described(state.rules), _tensors(state)


# --------------------------------------------------------------------------- code


@dataclass(frozen=True, kw_only=True)
class _Names:
    """Names in a module or class, and the objects that they referred to.

    A tool that reloads edited files, as IPython does, changes the code inside a function object; so
    the code is compared too.
    """

    space: Mapping[str, object]
    names: tuple[str, ...]
    values: tuple[object, ...]
    functions: tuple[types.FunctionType, ...]
    codes: tuple[types.CodeType, ...]

    @classmethod
    def of(cls, thing: object) -> "_Names":
        """Read the names in a module or class."""
        space = vars(thing)
        own = {n: v for n, v in space.items() if not n.startswith("__") or n in _SPECIAL}
        functions = tuple(filter(None, map(_function_of, own.values())))
        return cls(
            space=space,
            names=tuple(own),
            values=tuple(own.values()),
            functions=functions,
            codes=tuple(map(_CODE_OF, functions)),
        )

    def stand(self) -> bool:
        """Return True if all names still refer to the same objects and code."""
        same = all(map(is_, map(self.space.get, self.names), self.values))
        return same and all(map(is_, map(_CODE_OF, self.functions), self.codes))


_CODE_OF: Callable[[types.FunctionType], types.CodeType] = attrgetter("__code__")


def _function_of(value: object) -> types.FunctionType | None:
    """Return the function that a name refers to, also inside a method or property; or None."""
    if isinstance(value, property):
        value = value.fget
    value = getattr(value, "__func__", value)
    return value if isinstance(value, types.FunctionType) else None


class LibraryCode:
    """Functions and classes of this library and of torch, compared by identity.

    If one of them is replaced, the new function may couple records, so earlier verdicts are void.
    New names do not count, because modules are imported only when they are needed.
    """

    def __init__(self) -> None:
        self._seen: dict[str, list[_Names]] = {}
        self._imported = 0
        self._replacements = 0

    def version(self) -> int:
        """Return a number that changes with every replacement of code."""
        changed = [
            name for name, seen in self._seen.items() if not all(names.stand() for names in seen)
        ]
        self._replacements += bool(changed)
        new = changed if len(sys.modules) == self._imported else list(sys.modules)
        self._imported = len(sys.modules)
        for name in new:
            if name.startswith(_FOLLOWED) and (name in changed or name not in self._seen):
                module = sys.modules.get(name)
                self._seen[name] = [_Names.of(each) for each in _code_of(module)] if module else []
        return self._replacements


def _code_of(module: types.ModuleType) -> list[object]:
    """Return a module and the classes that it defines; for torch's layers only the module."""
    own = [value for value in vars(module).values() if isinstance(value, type)]
    ours = module.__name__.startswith(_CODE)
    return [module, *(kind for kind in own if ours and kind.__module__ == module.__name__)]


CODE = LibraryCode()
"""Code of this process, for the keys of verdicts."""


# --------------------------------------------------------------------------- values


def described(value: object) -> Hashable:
    """Convert a value to a part of a key; values that may behave differently are never equal.

    Raises:
        UnknownKindError: if the value is of a kind that settings do not have.
    """
    if value is None or isinstance(value, bool | int | str | bytes | Path):
        return type(value), value
    if isinstance(value, float):
        return float, value.hex()  # 0.0 and -0.0 apart, NaN equal to itself
    if isinstance(value, torch.dtype | torch.device):
        return value
    if isinstance(value, Tensor):
        return _tensors({"": value})
    if isinstance(value, Mapping | Sequence | Set):
        return type(value), _items(value)
    return Same(value) if isinstance(value, type) else _object(value)


def _items(values: Mapping[Any, Any] | Sequence[Any] | Set[Any]) -> Hashable:
    if isinstance(values, Mapping):
        return tuple((described(key), described(value)) for key, value in values.items())
    each = map(described, values)
    return tuple(each) if isinstance(values, Sequence) else frozenset(each)


def _object(value: object) -> Hashable:
    """Convert a function, or an object of this library, to a part of a key."""
    if isinstance(value, partial):
        return partial, described((value.func, value.args, value.keywords))
    if isinstance(value, types.BuiltinFunctionType) and isinstance(
        value.__self__, types.ModuleType | None
    ):
        return Same(value)
    if isinstance(value, types.FunctionType):
        place = str(value.__globals__.get("__name__", ""))
        if place.partition(".")[0] in _LIBRARIES:
            cells = value.__closure__ or ()
            return Same(value), value.__code__, tuple(described(c.cell_contents) for c in cells)
    if is_own(type(value), ("perdure.",)) and hasattr(value, "__dict__"):
        return Same(type(value)), _class(type(value)), described(vars(value))
    raise UnknownKindError(type(value).__name__)


def _class(kind: type) -> Hashable:
    """Return all attributes that a class and its bases have now, as a part of a key."""
    return tuple(tuple(map(Same, vars(base).values())) for base in kind.__mro__)
