"""The strategy catalogue: default instances, costs in words, and a Markdown table."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from perdure.contract.plan import Plan, PrivacyCost
from perdure.contract.strategy import Strategy
from perdure.errors import StrategyError
from perdure.experiment.strategy_catalogue import card, markdown, privacy_cost, with_defaults
from perdure.strategies import OGD, Replay


def test_the_privacy_cost_text_names_all_releases():
    everything = PrivacyCost(
        releases=2,
        histograms=1,
        selections=3,
        memory_releases=2,
        references=1,
        reuses_past_records=True,
    )
    assert privacy_cost(everything, Plan(), False) == (
        "gradient; 1 reference gradient of stored records per step; 2 releases per experience; "
        "2 releases over memory per experience; 1 histogram per experience; "
        "3 selections per experience; records of earlier experiences are used again"
    )
    assert privacy_cost(PrivacyCost(references=2), Plan(train=False), False).startswith(
        "no gradient; 2 reference gradients of"
    )
    assert privacy_cost(PrivacyCost(), Plan(), True) == "refused: it couples records"


def test_a_strategy_card_uses_defaults_and_example_values():
    assert OGD.example().directions == 4
    assert with_defaults(OGD) == OGD(directions=20)
    assert with_defaults(Replay) == Replay(memory_size=16)
    assert (
        card("ogd").memory == "100 x parameters, 100 x 100, 1 number"
    )  # 20 at each of 5 experiences


@dataclass(frozen=True, kw_only=True)
class Placed(Strategy):
    """A strategy without a default for one of its fields."""

    where: Path
    strength: float = 1.0


def test_a_strategy_field_without_default_needs_an_example():
    with pytest.raises(StrategyError, match=r"Placed.example\(\) has no value for where; allowed"):
        with_defaults(Placed)


def test_a_markdown_row_has_one_cell_per_column():
    row = replace(card("gem"), summary="never p(c | x)")
    head, rule, line = markdown([row]).splitlines()
    assert head.count("|") == rule.count("|") == line.count("|") - line.count(r"\|") == 7
    assert r"| never p(c \| x) |" in line
    assert "| no: its quadratic program is solved on the host, one at a time |" in line
    assert line.startswith("| `GEM` | ")
