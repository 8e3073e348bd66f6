"""Catalogue of strategies, with the paper, privacy cost and memory cost of each.

It is generated. The privacy cost is read from the strategy's `privacy_cost`, the memory cost from
its plan and from the state that it creates for a small model, and the paper from the docstring of
its module.
"""

import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, replace

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
from perdure.models.classifiers import mlp
from perdure.strategies import find, names

INPUTS = 11
HIDDEN = 3
FEATURES = 17
CLASSES = 7
EXPERIENCES = 5
"""Number of experiences of the example stream.

All sizes of the example model and stream differ, so that a shape shows which sizes it has.
"""
WORDS = {INPUTS: "inputs", FEATURES: "features", CLASSES: "classes", EXPERIENCES: "experiences"}
YEAR = re.compile(r"\b(19|20)\d\d\b")


@dataclass(frozen=True, kw_only=True)
class StrategyCard:
    """Description of one strategy.

    Args:
        name: name of the strategy's file.
        strategy: class and arguments.
        summary: first line of the docstring.
        paper: authors, title, venue and year; empty if there is no paper.
        privacy: use of private data, in words.
        memory: size of the state and number of stored records, in words.
        state_multiple: number of values in the state, divided by the number of parameters of the
            model.
        not_vmappable_because: reason why the strategy cannot run under vmap; None if it can.
    """

    name: str
    strategy: str
    summary: str
    paper: str
    privacy: str
    memory: str
    state_multiple: float
    not_vmappable_because: str | None


def cards() -> list[StrategyCard]:
    """Describe every strategy, sorted by name."""
    return [card(name) for name in names()]


def card(name: str) -> StrategyCard:
    """Describe one strategy.

    Args:
        name: name of the strategy's file.

    Raises:
        StrategyError: if a field has no default, and `example()` is not overridden.
    """
    strategy = with_defaults(find(name))
    experience = _small_experience()
    model = _model(strategy)
    summary, paper = described(type(strategy))
    state = strategy.init(_spec(model))
    plan = strategy.plan(experience)
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
                *_stored(strategy, plan, experience, model, state),
            ]
        )
        or "none",
        state_multiple=round(
            numbers / sum(value.numel() for value in _parameters(model).values()), 2
        ),
        not_vmappable_because=strategy.not_vmappable_because,
    )


def with_defaults(kind: type[Strategy]) -> Strategy:
    """Return the example of a strategy, with the default of every field that has one.

    Raises:
        StrategyError: if a field has no default, and `example()` is not overridden.
    """
    # The example's own values are small, which would understate a cost such as OGD's directions.
    defaults = {f.name: f.default for f in fields(kind) if f.init and f.default is not MISSING}
    return replace(kind.example(), **defaults)


# --------------------------------------------------------------------------- in words


def described(kind: type[Strategy]) -> tuple[str, str]:
    """Read the first line of a strategy's docstring, and the citation below it, up to its year.

    The docstring is the one of the module, or else the one of the class.
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
    """Describe in words which private data a strategy uses.

    >>> privacy_cost(PrivacyCost(releases=1, reuses_past_records=True), Plan(), False)
    'gradient; 1 release per experience; records of earlier experiences are used again'
    """
    if couples_records:
        return "refused: it couples records"
    parts = ["gradient" if plan.train else "no gradient"]
    for number, what in (
        (cost.references, "reference gradient of stored records per step"),
        (cost.releases, "release per experience"),
        (cost.memory_releases, "release over memory per experience"),
        (cost.histograms, "histogram per experience"),
        (cost.selections, "selection per experience"),
    ):
        if number:
            first, _, after = what.partition(" ")
            many = {"reference": "reference gradients" + after.removeprefix("gradient")}.get(
                first, f"{first}s {after}"
            )
            parts.append(f"{number} {what if number == 1 else many}")
    return "; ".join(
        [
            *parts,
            *(
                ["records of earlier experiences are used again"]
                if cost.reuses_past_records
                else []
            ),
        ]
    )


def state_in_words(state: State, params: dict[str, Tensor]) -> list[str]:
    """Describe a state: a multiple of the parameters, and the shapes of all other tensors."""
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
    strategy: Strategy, plan: Plan, experience: Experience, model: nn.Module, state: State
) -> Iterator[str]:
    """Describe the stored records: all, or the capacity of the plan, with stored tensors."""
    if plan.pool == "all":
        yield "all records"
    if plan.memory is None:
        return
    sizes = [f.name for f in fields(strategy) if getattr(strategy, f.name) == plan.memory.capacity]
    batch = Batch.current(experience.train, 0)
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


# --------------------------------------------------------------------------- model and stream


def _model(strategy: Strategy) -> nn.Module:
    """Make the small model for a strategy's costs: its `small_model`, or a perceptron."""
    plain = mlp(input_shape=(INPUTS,), num_classes=CLASSES, hidden=(HIDDEN, FEATURES), seed=0)
    own = strategy.small_model(input_shape=(INPUTS,), num_classes=CLASSES)
    return plain if own is None else own


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def _spec(model: nn.Module) -> Spec:
    """Return the `Spec` with which a strategy creates its state for this model."""
    return Spec(
        params=_parameters(model),
        num_classes=CLASSES,
        num_experiences=EXPERIENCES,
        feature_size=getattr(model, "feature_size", 0),
        scenario="class",
    )


def _small_experience() -> Experience:
    """Make an experience with one random record per class, for plans and stored tensors.

    The values of the records do not matter: only sizes and shapes are used.
    """
    labels = torch.arange(CLASSES)
    records = Records(
        inputs=torch.rand(CLASSES, INPUTS, generator=torch.Generator().manual_seed(0)),
        labels=labels,
    )
    return Experience(index=0, train=records, test=records, classes=tuple(range(CLASSES)))


# --------------------------------------------------------------------------- tables


def table(listed: Sequence[StrategyCard]) -> Table:
    """Build the catalogue for a terminal, readable in 120 columns."""
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


def markdown(listed: Sequence[StrategyCard]) -> str:
    """Build the catalogue as a Markdown table for the README, one line per strategy."""
    header = ("strategy", "in one line", "use of private data", "keeps", "vmap", "paper")
    rows = [
        (
            f"`{find(row.name).__name__}`",
            row.summary,
            row.privacy,
            row.memory,
            f"no: {row.not_vmappable_because}" if row.not_vmappable_because else "yes",
            row.paper,
        )
        for row in listed
    ]
    lines = [" | ".join(cell.replace("|", r"\|") for cell in row) for row in [header, *rows]]
    rule = "|".join("---" for _ in header)
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])
