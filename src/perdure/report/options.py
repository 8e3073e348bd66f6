"""Options of a strategy for reports: `name = value`, without options at their defaults."""

import ast
from collections.abc import Sequence
from dataclasses import MISSING, fields

from perdure.experiment.result_schema import ArmResult
from perdure.strategies import find, names


def shown_options(arm: ArmResult, arms: Sequence[ArmResult]) -> list[str]:
    """Return the options of `arm` that a reader needs, each as `name = value`.

    These are the options that differ from the strategy's defaults, and those that distinguish the
    arm from another one with the same strategy and privacy. If the strategy is not installed here,
    its defaults are not known, and all options are returned. Text that is not written as
    `Name(option=value, ...)` is returned unchanged.

    >>> arm = {"strategy": "lwf", "options": "LwF(temperature=2.0, strength=4.0)", "private": True}
    >>> shown_options(arm, [arm])
    ['strength = 4']
    """
    options = read_options(arm["options"])
    if options is None:
        return _parts(arm["options"]) or [arm["options"]]
    compared = [_defaults(arm["strategy"]), *_options_of_rivals(arm, arms)]
    return _differing(options, compared)


def telling_options(arm: ArmResult, arms: Sequence[ArmResult]) -> list[str]:
    """Return the options that distinguish `arm` from others with the same strategy and privacy."""
    options = read_options(arm["options"])
    rivals = _options_of_rivals(arm, arms)
    if options is None:
        return [arm["options"]] if rivals else []
    return _differing(options, rivals)


def _options_of_rivals(arm: ArmResult, arms: Sequence[ArmResult]) -> list[dict[str, str]]:
    return [
        read_options(other["options"]) or {}
        for other in arms
        if other is not arm
        and (other["strategy"], other["private"]) == (arm["strategy"], arm["private"])
    ]


def _parts(text: str) -> list[str]:
    """Split `Combine(EWC(...), Replay(...))` into its strategies, with changed options only."""
    try:
        call = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return []
    if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "Combine"):
        return []
    files = {file.replace("_", ""): file for file in names()}
    shown = []
    for part in map(ast.unparse, call.args):
        name = part.partition("(")[0]
        defaults = _defaults(files.get(name.lower(), ""))
        options = read_options(part)
        if options is None:
            return []
        shown.append(
            " ".join([f"{name}:", ", ".join(_differing(options, [defaults]))]).rstrip(": ")
        )
    return shown


def _differing(options: dict[str, str], compared: Sequence[dict[str, str]]) -> list[str]:
    return [
        option(name, value)
        for name, value in options.items()
        if any(other.get(name) != value for other in compared)
    ]


def read_options(text: str) -> dict[str, str] | None:
    """Split `Name(option=value, ...)` into its options, or return None for any other text.

    The text is parsed and never evaluated, because a result may come from anybody.
    """
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    # deep nesting gives a MemoryError or RecursionError, a null byte a ValueError
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    return {name: value for name, value in options.items() if name is not None}


def option(name: str, value: str) -> str:
    """Write one option: texts without quotes, whole numbers without a trailing `.0`."""
    try:
        constant = ast.literal_eval(value)
    except ValueError:
        return f"{name} = {value}"
    if isinstance(constant, str) and constant.isprintable():
        return f"{name} = {constant}"
    return f"{name} = {value.removesuffix('.0') if isinstance(constant, float) else value}"


def _defaults(strategy: str) -> dict[str, str]:
    """Return the default of each option of an installed strategy, in the form of `read_options`."""
    if strategy not in names():
        return {}
    defaults = {}
    for known in fields(find(strategy)):
        value = known.default if known.default_factory is MISSING else known.default_factory()
        written = read_options(f"_(value={value!r})")
        if written:
            defaults[known.name] = written["value"]
    return defaults
