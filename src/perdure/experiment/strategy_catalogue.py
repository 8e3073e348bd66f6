"""The list of strategies, with the privacy cost and the memory of each.

Both are found by asking the strategy itself.

Nothing here is written by hand for a strategy: privacy costs are said from its `privacy_cost`, memory from
the state that it lays out for a small model and from its plan, and the paper is that of its
module's docstring.
"""

import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from perdure.contract.context import Spec
from perdure.contract.forward import Forward
from perdure.contract.plan import Plan, PrivacyCost
from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.data.experience import Experience
from perdure.data.records import Batch, Records
from perdure.errors import ConfigError
from perdure.models.classifiers import mlp
from perdure.strategies import find, names

INPUTS = 11
HIDDEN = 3
FEATURES = 17
CLASSES = 7
EXPERIENCES = 5
"""Sizes of the model and stream that strategies are laid out for; all differ, so that a shape says
what it is of.
"""
WORDS = {INPUTS: "inputs", FEATURES: "features", CLASSES: "classes", EXPERIENCES: "experiences"}
SIMPLEST: dict[object, object] = {bool: False, float: 1.0, int: 100, str: ""}
YEAR = re.compile(r"\b(19|20)\d\d\b")


@dataclass(frozen=True, kw_only=True)
class StrategyCard:
    """One strategy of the list.

    Args:
        name: of its file.
        strategy: the class and its arguments.
        summary: first line of its docstring.
        paper: authors, title, venue and year; empty where there is none.
        privacy: what it asks of private data.
        memory: what it keeps, in words.
        state_multiple: numbers in its state over parameters of the model that it was laid out for.
        not_vmappable_because: the reason, or None.
    """

    name: str
    strategy: str
    summary: str
    paper: str
    privacy: str
    memory: str
    state_multiple: float
    not_vmappable_because: str | None


def entries() -> list[StrategyCard]:
    """Every strategy there is, in the order of its name."""
    return [entry(name) for name in names()]


def entry(name: str) -> StrategyCard:
    """What is to be said of one strategy.

    Raises:
        ConfigError: for an argument without a default that has no simplest value.
    """
    strategy = simplest(find(name))
    stage = _stage()
    model = _model(strategy)
    summary, paper = described(type(strategy))
    state = strategy.init(_spec(model))
    plan = strategy.plan(stage)
    numbers = sum(value.numel() for value in state.values())
    return StrategyCard(
        name=name,
        strategy=repr(strategy),
        summary=summary,
        paper=paper,
        privacy=privacy_cost(strategy.privacy_cost, plan, strategy.couples_records),
        memory=", ".join(
            [
                *state_in_words(state, _parameters(model)),
                *_stored(strategy, plan, stage, model, state),
            ]
        )
        or "none",
        state_multiple=round(
            numbers / sum(value.numel() for value in _parameters(model).values()), 2
        ),
        not_vmappable_because=strategy.not_vmappable_because,
    )


# --------------------------------------------------------------------------- an instance


def simplest(kind: type[Strategy]) -> Strategy:
    """An instance: defaults where there are any, else the simplest value of the argument's type.

    That is 1.0 for a float, 100 for an int, the first of a `Literal` or of a union.

    Raises:
        ConfigError: for an argument of another type; it needs a default.
    """
    types = get_type_hints(kind)
    needed = [
        f.name
        for f in fields(kind)
        if f.init and f.default is MISSING and f.default_factory is MISSING
    ]
    return kind(**{name: _value(kind, name, types[name]) for name in needed})


def _value(kind: type[Strategy], name: str, of: Any) -> object:
    if get_origin(of) is Literal:
        return get_args(of)[0]
    if get_origin(of) in (Union, UnionType):
        return _value(kind, name, get_args(of)[0])
    if of not in SIMPLEST:
        raise ConfigError(
            f"{kind.__name__}.{name} has no default and is {of}; give it a default, so it "
            "can be listed"
        )
    return SIMPLEST[of]


# --------------------------------------------------------------------------- in words


def described(kind: type[Strategy]) -> tuple[str, str]:
    """First line of the docstring, and the citation in it, up to its year.

    The docstring is the module's, else the class's.
    """
    text = (
        inspect.cleandoc(sys.modules[kind.__module__].__doc__ or "")
        or inspect.getdoc(kind)
        or kind.__name__
    )
    summary, *rest = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    cited = YEAR.search(rest[0]) if rest else None
    return summary, rest[0][: cited.end()] if cited else ""


def privacy_cost(cost: PrivacyCost, plan: Plan, couples_records: bool) -> str:
    """What a strategy asks of private data.

    >>> privacy_cost(PrivacyCost(releases=1, reuses_past_records=True), Plan(), False)
    'gradient; 1 release an experience; records go on being used'
    """
    if couples_records:
        return "refused: it couples records"
    parts = ["gradient" if plan.train else "no gradient"]
    for number, what in (
        (cost.references, "reference gradient of stored records a step"),
        (cost.releases, "release an experience"),
        (cost.memory_releases, "release over memory an experience"),
        (cost.histograms, "histogram an experience"),
        (cost.selections, "selection an experience"),
    ):
        if number:
            first, _, after = what.partition(" ")
            many = {"reference": "reference gradients" + after.removeprefix("gradient")}.get(
                first, f"{first}s {after}"
            )
            parts.append(f"{number} {what if number == 1 else many}")
    return "; ".join([*parts, *(["records go on being used"] if cost.reuses_past_records else [])])


def state_in_words(state: State, params: dict[str, Tensor]) -> list[str]:
    """The state by its shapes: how many times the parameters, and what else by its dimensions."""
    groups = Counter(name.partition("/")[0] for name in state if name.partition("/")[2] in params)
    whole = [group for group, count in groups.items() if count == len(params)]
    others = [value for name, value in state.items() if name.partition("/")[0] not in whole]
    numbers = sum(value.numel() for name, value in state.items() if name.partition("/")[0] in whole)
    found = (
        [f"{numbers // sum(value.numel() for value in params.values())} x parameters"]
        if whole
        else []
    )
    shapes = Counter(tuple(value.shape) for value in others)
    for shape, count in sorted(shapes.items(), key=lambda item: -len(item[0])):
        size = " x ".join(WORDS.get(d, str(d)) for d in shape) or (
            "number" if count == 1 else "numbers"
        )
        found.append(size if count == 1 and shape else f"{count} {'x ' if shape else ''}{size}")
    return found


def _stored(
    strategy: Strategy, plan: Plan, stage: Experience, model: nn.Module, state: State
) -> Iterator[str]:
    """Rows that are kept.

    All of them, or as many as the plan says, with what is remembered beside each.
    """
    if plan.pool == "all":
        yield "all records"
    if plan.memory is None:
        return
    sizes = [f.name for f in fields(strategy) if getattr(strategy, f.name) == plan.memory.capacity]
    batch = Batch.current(stage.train, 0)
    with torch.no_grad():
        beside = strategy.remember(Forward(model), batch, state)
    extra = [
        f"{' x '.join(WORDS.get(d, str(d)) for d in t.shape[1:]) or 'a number'}"
        for t in beside.values()
    ]
    names_of = [f"{name} ({size})" for name, size in zip(beside, extra, strict=True)]
    yield f"{sizes[0] if sizes else plan.memory.capacity} records" + (
        f" with {', '.join(names_of)}" if beside else ""
    )


# -------------------------------------------------------------------------- what it is laid out for


def _model(strategy: Strategy) -> nn.Module:
    plain = mlp(input_shape=(INPUTS,), num_classes=CLASSES, hidden=(HIDDEN, FEATURES), seed=0)
    own = strategy.small_model(input_shape=(INPUTS,), num_classes=CLASSES)
    return plain if own is None else own


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def _spec(model: nn.Module) -> Spec:
    return Spec(
        params=_parameters(model),
        num_classes=CLASSES,
        num_experiences=EXPERIENCES,
        feature_size=getattr(model, "feature_size", 0),
        scenario="class",
    )


def _stage() -> Experience:
    labels = torch.arange(CLASSES)
    records = Records(
        inputs=torch.rand(CLASSES, INPUTS, generator=torch.Generator().manual_seed(0)),
        labels=labels,
    )
    return Experience(index=0, train=records, test=records, classes=tuple(range(CLASSES)))


# --------------------------------------------------------------------------- the table


def table(listed: Sequence[StrategyCard]) -> Table:
    """The list for a terminal, readable in 120 columns."""
    drawn = Table(
        title=f"{len(listed)} strategies",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        expand=True,
    )
    drawn.add_column("strategy", no_wrap=True)
    for header, share in (("paper", 5), ("asks of private data", 4), ("keeps", 3), ("vmap", 2)):
        drawn.add_column(header, ratio=share, overflow="fold")
    for row in listed:
        cells = (
            row.name,
            row.paper or row.summary,
            row.privacy,
            row.memory,
            row.not_vmappable_because or "yes",
        )
        drawn.add_row(*(Text(cell) for cell in cells), end_section=True)
    return drawn
