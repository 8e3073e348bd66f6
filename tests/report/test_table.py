"""The terminal table: every arm and all parts of its epsilon, in 100 columns."""

import math
from dataclasses import MISSING, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from perdure.errors import RunError
from perdure.report.options import shown_options
from perdure.report.table import table
from perdure.report.wording import SIMULATION, epsilon_number, labels
from perdure.strategies import find, names

COLUMNS = 100


def printed(result: dict[str, Any]) -> str:
    console = Console(width=COLUMNS, color_system=None)
    with console.capture() as capture:
        console.print(table(result))
    return capture.get()


def line_of(text: str, *words: str) -> str:
    return next(line for line in text.splitlines() if line.split()[: len(words)] == list(words))


def test_the_result_table_has_one_row_per_arm_in_100_columns(result: dict[str, Any]) -> None:
    text = printed(result)
    assert max(len(line) for line in text.splitlines()) <= COLUMNS
    assert table(result).row_count == 8
    assert not any("…" in line for line in text.splitlines())


def test_a_table_row_states_all_parts_of_its_epsilon(result: dict[str, Any]) -> None:
    row = line_of(printed(result), "replay", "yes")
    for word in ("7.99", "per record", "add-remove", "δ = 1e-5", "14.5"):
        assert word in row
    assert line_of(printed(result), "replay", "no").split()[-2:] == ["–", "11.4"]


def test_the_result_table_header_names_the_attack(result: dict[str, Any]) -> None:
    text = printed(result)
    assert "PGD-10" in text and "L∞ 0.1" in text
    assert text.splitlines()[-1].strip().startswith("accuracy, robust: %")


def test_the_result_table_names_the_certificate(result: dict[str, Any]) -> None:
    assert "certified" not in printed(result)
    result["certificate"] = {"method": "interval_bounds", "epsilon": 0.03}
    for place, arm in enumerate(result["arms"]):
        arm["certified_accuracy"] = 12.5 + place
        arm["standard_error"]["certified_accuracy"] = 3.25
    result["arms"][1]["certified_accuracy"] = None
    text = printed(result)
    assert max(len(line) for line in text.splitlines()) <= COLUMNS
    assert "L∞ 0.03" in text and "accuracy, robust, certified: %" in " ".join(text.split())
    assert line_of(text, "naive", "no").split()[5] == "12.5"
    result["certificate"] = {"method": "smoothing", "epsilon": 0.25}
    assert "L2 0.25" in printed(result)


def test_the_result_table_labels_only_simulated_epsilons(result: dict[str, Any]) -> None:
    assert printed(result).count(SIMULATION) == 4
    for arm in result["arms"]:
        if arm["epsilon"]:
            arm["epsilon"]["simulated"] = False
    assert SIMULATION not in printed(result)


def test_the_result_table_prints_the_numbers_of_result_json(result: dict[str, Any]) -> None:
    arm = result["arms"][0]
    cells = line_of(printed(result), "naive", "no").split()
    expected = [arm["average_accuracy"], arm["forgetting"], arm["robust_accuracy"]]
    assert cells[2:5] == [f"{value:.1f}" for value in expected]


def test_the_result_table_prints_missing_values_as_a_dash(result: dict[str, Any]) -> None:
    result["attack"] = None
    for arm in result["arms"]:
        arm["robust_accuracy"] = None
    result["arms"][0]["average_accuracy"] = math.nan
    text = printed(result)
    assert "no attack" in text
    assert line_of(text, "naive", "no").split()[2:5:2] == ["–", "–"]


def test_changed_options_are_printed_below_the_strategy(
    result: dict[str, Any],
) -> None:
    result["arms"][2].update(
        options="EWC(strength=1000.0, mode='online', fisher='auto', decay=1.0)"
    )
    lines = [line.rstrip() for line in printed(result).splitlines()]
    row = next(i for i, line in enumerate(lines) if line.split()[:2] == ["ewc", "no"])
    assert lines[row + 1 : row + 3] == [" strength = 1000", " mode = online"]
    assert lines[row + 3].split()[0] == "lwf", "what is at its default is left out"


def test_two_arms_of_one_strategy_are_labelled_by_their_options(result: dict[str, Any]) -> None:
    weak, strong = result["arms"][2], result["arms"][4]
    weak.update(options="EWC(strength=100.0, mode='online')")
    strong.update(strategy="ewc", name="ewc-plain", options="EWC(strength=5.0, mode='online')")
    lines = printed(result).splitlines()
    shown = {
        tuple(option.strip() for option in lines[i + 1 : i + 3])
        for i, line in enumerate(lines)
        if line.split()[:2] == ["ewc", "no"]
    }
    assert shown == {("strength = 100", "mode = online"), ("strength = 5", "mode = online")}
    assert labels([weak, strong]) == ["ewc (strength = 100)", "ewc (strength = 5)"]


@pytest.mark.parametrize("arms", [1, 2])
def test_unreadable_strategy_options_are_printed_unchanged(
    result: dict[str, Any], arms: int
) -> None:
    chosen = result["arms"][:arms]
    texts = ["Join(EWC(), Replay())", "odd \0 (", "x" * 5, "(" * 5000, "**{}"][-len(chosen) :]
    for arm, text in zip(chosen, texts, strict=True):
        arm.update(strategy="own", name="own-plain", private=False, options=text)
        assert shown_options(arm, chosen) == [text]
    assert labels(chosen) == (["own"] if arms == 1 else [f"own ({text})" for text in texts])


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("1000.0", "1000"),
        ("1e-05", "1e-05"),
        ("0.5", "0.5"),
        ("'class-balanced'", "class-balanced"),
        ("'\\x1b[31m'", "'\\x1b[31m'"),
        ("None", "None"),
        ("(1, 2)", "(1, 2)"),
        ("Inner(a=1.0)", "Inner(a=1.0)"),
    ],
)
def test_option_values_are_printed_as_plain_numbers_and_words(
    result: dict[str, Any], written: str, shown: str
) -> None:
    arm = result["arms"][0] | {"strategy": "own", "options": f"Own(option={written})"}
    assert shown_options(arm, [arm]) == [f"option = {shown}"]


def test_a_strategy_with_default_options_prints_no_option(result: dict[str, Any]) -> None:
    for name in names():
        strategy = find(name)
        if any(option.default is MISSING is option.default_factory for option in fields(strategy)):
            continue  # it needs an option
        arm = result["arms"][0] | {"strategy": name, "options": repr(strategy())}
        assert shown_options(arm, [arm]) == []


def test_long_options_wrap_and_are_printed_completely(result: dict[str, Any]) -> None:
    result["arms"][6]["options"] = f"Replay(memory_size=200, {'x' * 50}='{'y' * 50}')"
    text = printed(result)
    assert text.count("x") >= 50 and text.count("y") >= 50
    assert max(len(line) for line in text.splitlines()) <= COLUMNS
    assert "14.5" in line_of(text, "replay", "yes")
    assert line_of(text, "memory_size").strip() == "memory_size = 200"


def test_strategy_names_are_printed_as_text_not_as_markup(result: dict[str, Any]) -> None:
    result["name"] = "[bold]x[/bold]"
    result["arms"][0].update(strategy="[red]odd", name=".red.odd-plain")
    text = printed(result)
    assert "[bold]x[/bold]" in text and "[red]odd" in text


@pytest.mark.parametrize("schema", [None, 1, "2"])
def test_a_result_of_another_schema_is_refused(result: dict[str, Any], schema: object) -> None:
    with pytest.raises(RunError, match="schema"):
        table(result | {"schema": schema})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda r: r.pop("arms"), "arms"),
        (lambda r: r["arms"].clear(), "no arms"),
        (lambda r: r["arms"][3].pop("spending"), r"arms\[3\] has no spending"),
        (lambda r: r["arms"][1]["epsilon"].pop("unit"), r"arms\[1\].epsilon has no unit"),
        (lambda r: r["arms"][1].update(epsilon=None), "private"),
        (lambda r: r["stream"].pop("classes"), "stream has no classes"),
        (lambda r: r["attack"].pop("norm"), "attack has no norm"),
    ],
)
def test_an_incomplete_result_is_refused_by_field_name(
    result: dict[str, Any], change: Any, word: str
) -> None:
    change(result)
    with pytest.raises(RunError, match=word):
        table(result)


@pytest.mark.property
@given(st.floats(0, 1e6))
def test_a_printed_epsilon_is_never_rounded_down(value: float) -> None:
    shown = float(epsilon_number(value))
    assert value - 1e-10 <= shown <= value + 0.0100001


def test_an_infinite_epsilon_is_printed_as_a_symbol() -> None:
    assert epsilon_number(math.inf) == "∞"
