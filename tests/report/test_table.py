"""The terminal table: every arm, every term of its epsilon, in 100 columns."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from perdure.errors import RunError
from perdure.report.table import table
from perdure.report.wording import SIMULATION, epsilon_number

COLUMNS = 100


def printed(result: dict[str, Any]) -> str:
    console = Console(width=COLUMNS, color_system=None)
    with console.capture() as capture:
        console.print(table(result))
    return capture.get()


def line_of(text: str, *words: str) -> str:
    return next(line for line in text.splitlines() if line.split()[: len(words)] == list(words))


def test_one_row_per_arm_in_100_columns(result: dict[str, Any]) -> None:
    text = printed(result)
    assert max(len(line) for line in text.splitlines()) <= COLUMNS
    assert table(result).row_count == 8
    assert not any("…" in line for line in text.splitlines())


def test_a_row_says_everything_an_epsilon_needs(result: dict[str, Any]) -> None:
    row = line_of(printed(result), "replay", "yes")
    for word in ("7.99", "per record", "add-remove", "δ = 1e-5", "14.5"):
        assert word in row
    assert line_of(printed(result), "replay", "no").split()[-2:] == ["–", "11.4"]


def test_the_header_names_the_attack_and_the_caption_the_units(result: dict[str, Any]) -> None:
    text = printed(result)
    assert "PGD-10" in text and "L∞ 0.1" in text
    assert text.splitlines()[-1].strip().startswith("accuracy, robust: %")


def test_every_simulated_epsilon_is_labelled_and_no_other(result: dict[str, Any]) -> None:
    assert printed(result).count(SIMULATION) == 4
    for arm in result["arms"]:
        if arm["epsilon"]:
            arm["epsilon"]["simulated"] = False
    assert SIMULATION not in printed(result)


def test_numbers_are_those_of_the_result(result: dict[str, Any]) -> None:
    arm = result["arms"][0]
    cells = line_of(printed(result), "naive", "no").split()
    expected = [arm["average_accuracy"], arm["forgetting"], arm["robust_accuracy"]]
    assert cells[2:5] == [f"{value:.1f}" for value in expected]


def test_what_was_not_measured_is_a_dash(result: dict[str, Any]) -> None:
    result["attack"] = None
    for arm in result["arms"]:
        arm["robust_accuracy"] = None
    result["arms"][0]["average_accuracy"] = math.nan
    text = printed(result)
    assert "no attack" in text
    assert line_of(text, "naive", "no").split()[2:5:2] == ["–", "–"]


def test_two_arms_of_one_strategy_are_told_apart_by_their_options(result: dict[str, Any]) -> None:
    result["arms"][2]["strategy"] = "naive"
    text = printed(result)
    assert line_of(text, "Naive()", "no") and line_of(text, "naive", "yes")


def test_names_are_text_and_not_markup(result: dict[str, Any]) -> None:
    result["name"] = "[bold]x[/bold]"
    result["arms"][0]["strategy"] = "[red]odd"
    text = printed(result)
    assert "[bold]x[/bold]" in text and "[red]odd" in text


@pytest.mark.parametrize("schema", [None, 2, "1"])
def test_another_schema_is_refused(result: dict[str, Any], schema: object) -> None:
    with pytest.raises(RunError, match="schema"):
        table(result | {"schema": schema})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda r: r.pop("arms"), "arms"),
        (lambda r: r["arms"].clear(), "no arms"),
        (lambda r: r["arms"][3].pop("spending"), r"arms\[3\] lacks spending"),
        (lambda r: r["arms"][1]["epsilon"].pop("unit"), r"arms\[1\].epsilon lacks unit"),
        (lambda r: r["arms"][1].update(epsilon=None), "private"),
        (lambda r: r["stream"].pop("classes"), "stream lacks classes"),
        (lambda r: r["attack"].pop("norm"), "attack lacks norm"),
    ],
)
def test_an_incomplete_result_is_refused_by_name(
    result: dict[str, Any], change: Any, word: str
) -> None:
    change(result)
    with pytest.raises(RunError, match=word):
        table(result)


@pytest.mark.property
@given(st.floats(0, 1e6))
def test_a_printed_epsilon_never_claims_more_than_is_true(value: float) -> None:
    shown = float(epsilon_number(value))
    assert value - 1e-10 <= shown <= value + 0.0100001


def test_an_infinite_epsilon_is_said() -> None:
    assert epsilon_number(math.inf) == "∞"
