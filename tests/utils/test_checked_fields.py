"""Fields of settings are checked against their annotations; valid values are kept unchanged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from perdure.errors import ConfigError
from perdure.utils import CheckedFields


@dataclass(frozen=True, kw_only=True)
class Settings(CheckedFields):
    """One field of each kind."""

    size: int = 1
    rate: float = 0.5
    name: str = ""
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = ()
    bounds: tuple[float, float] | None = None
    folder: Path | None = None
    change: Callable[[int], int] | None = None
    parts: Sequence[int] = ()
    cls: type[Exception] = ValueError


@dataclass(frozen=True, kw_only=True)
class Further(Settings):
    """Settings with a check of their own."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError.of("size", self.size, "1 or more")


@dataclass(frozen=True, kw_only=True)
class Failing(CheckedFields):
    """Settings whose own check fails."""

    size: int = 1

    def __post_init__(self) -> None:
        assert 1 / self.size


@dataclass(frozen=True, kw_only=True)
class Unread(CheckedFields):
    """Settings with an annotation that names nothing."""

    size: "Nowhere" = 1  # noqa: F821


@pytest.mark.parametrize("kind", [Settings, Further])
@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ({"size": 2.5}, "a whole number"),
        ({"size": True}, "a whole number"),
        ({"rate": "0.5"}, "a number"),
        ({"rate": False}, "a number"),
        ({"name": 3}, "text"),
        ({"flag": 1}, "True or False"),
        ({"kind": "c"}, "a, b"),
        ({"kind": []}, "a, b"),
        ({"sizes": (1, "2")}, r"a tuple \(each a whole number\)"),
        ({"sizes": "12"}, r"a tuple \(each a whole number\)"),
        ({"bounds": (0.0,)}, r"a tuple \(2 of them, each a number\) or None"),
        ({"folder": 3}, "a path or None"),
        ({"change": 3}, "a function or None"),
        ({"parts": 3}, "a list"),
        ({"cls": 3}, "a class"),
    ],
)
def test_a_settings_field_refuses_a_value_of_the_wrong_type(kind, given, allowed):
    (name,) = given
    with pytest.raises(
        ConfigError, match=rf"^\w+\.{name} = .* is not allowed; allowed: {allowed}$"
    ):
        kind(**given)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"sizes": [3, 4]}, (3, 4)),
        ({"bounds": [0, 1]}, (0, 1)),
        ({"folder": "runs"}, Path("runs")),
    ],
)
def test_a_settings_field_converts_a_list_or_a_text(given, kept):
    assert getattr(Settings(**given), next(iter(given))) == kept


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", np.int64(3)),
        ("rate", 3),
        ("rate", np.float32(0.5)),
        ("parts", [1]),
        ("change", abs),
    ],
)
def test_a_settings_field_keeps_a_value_of_the_right_type(name, value):
    assert getattr(Settings(**{name: value}), name) is value


def test_own_checks_of_a_settings_class_run_before_type_checks():
    for value in (0, 0.5):
        with pytest.raises(ConfigError, match=rf"^size = {value} .*1 or more"):
            Further(size=value)


def test_other_errors_of_a_settings_class_are_raised_unchanged():
    with pytest.raises(ZeroDivisionError):
        Failing(size=0)
    with pytest.raises(ConfigError, match=r"failing.size = '0' .*a whole number"):
        Failing(size="0")


def test_fields_with_unreadable_annotations_are_not_checked():
    assert Unread(size="large").size == "large"
