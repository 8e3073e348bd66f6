"""Tables and picture of a comparison."""

import xml.etree.ElementTree as ET

import pytest
from pylatexenc.latexwalker import LatexWalker
from rich.console import Console

from helpers.stored_runs import arm, stored_run, trial
from perdure.errors import ConfigError
from perdure.experiment import compare
from perdure.report import comparison_picture, comparison_tables, latex, terminal_table

ARMS = {"naive-plain": {0: 70.0, 1: 66.0, 2: 70.5}, "ewc-plain": {0: 71.0, 1: 69.5, 2: 74.0}}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return compare(stored_run(tmp_path_factory.mktemp("runs") / "run", ARMS))


def shown(grids):
    console = Console(width=100, record=True, file=None)
    with console.capture() as captured:
        for grid in grids:
            console.print(terminal_table(grid))
    return captured.get()


def test_comparison_tables_show_means_differences_and_ranks(comparison):
    text = shown(comparison_tables(comparison))
    for cell in ("68.83 ± 1.42", "71.50 ± 1.32", "ewc-plain − naive-plain", "−0.92 to 6.25", "2.0"):
        assert cell in text
    assert max(map(len, text.splitlines())) <= 100


def test_comparison_tables_of_one_seed_have_no_spread(tmp_path):
    found = compare(stored_run(tmp_path / "run", {"a-plain": {0: 70.0}, "b-plain": {0: 71.0}}))
    text = shown(comparison_tables(found))
    assert "±" not in text.partition("\n")[2]
    assert [row[1:] for row in comparison_tables(found)[1].rows] == [["1", "1.00", "–"]]


def test_compared_epsilons_are_the_largest_of_all_seeds(tmp_path):
    trials = [trial(0, 60.0, epsilon=2.991), trial(1, 61.0, epsilon=2.0)]
    found = compare(stored_run(tmp_path / "run", [arm("ewc-private", trials)]))
    [table] = comparison_tables(found)
    assert dict(zip(table.heads, table.rows[0], strict=True))["epsilon"] == "3.00"


def test_a_latex_parser_reads_the_comparison_tables(tmp_path):
    odd = {"50%_a&b-plain": {0: 70.0, 1: 60.0}, r"\x{#$~^-plain": {0: 71.0, 1: 61.5}}
    found = compare(stored_run(tmp_path / "run", odd))
    text = latex(comparison_tables(found))
    nodes, *_ = LatexWalker(text, tolerant_parsing=False).get_latex_nodes()
    tables = [node for node in nodes if getattr(node, "environmentname", "") == "table"]
    assert len(tables) == 2
    for table, grid in zip(tables, comparison_tables(found), strict=True):
        [tabular] = [
            node for node in table.nodelist if getattr(node, "environmentname", "") == "tabular"
        ]
        ends = [n for n in tabular.nodelist if getattr(n, "macroname", "") == "\\"]
        cells = [n for n in tabular.nodelist if getattr(n, "specials_chars", "") == "&"]
        assert len(ends) == 1 + len(grid.rows)
        assert len(cells) == len(ends) * (len(grid.heads) - 1)
    assert r"50\%\_a\&b-plain" in text


def test_the_comparison_picture_shows_every_arm_and_difference(comparison):
    picture = comparison_picture(comparison, "forgetting")
    words = "".join(ET.fromstring(picture.svg()).itertext())
    for word in ("naive-plain", "ewc-plain", "ewc-plain − naive-plain", "forgetting, points"):
        assert word in words
    assert picture.alternative == "Mean forgetting of 2 arms: naive-plain 31.17, ewc-plain 28.50."


def test_the_comparison_picture_of_one_arm_has_no_differences(tmp_path):
    found = compare(stored_run(tmp_path / "run", {"naive-plain": {0: 70.0, 1: 71.0}}))
    assert "Paired" not in comparison_picture(found).svg()
    assert len(comparison_tables(found)) == 1


def test_comparison_tables_and_picture_refuse_unknown_metrics(comparison):
    for draw in (comparison_tables, comparison_picture):
        with pytest.raises(ConfigError, match="metric = 'speed' is not allowed"):
            draw(comparison, "speed")
