"""Tables of docs/benchmarks.md against the stored rows."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def tables():
    """Import the script as a module from its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("tables")


def test_the_benchmark_tables_equal_the_stored_rows(tables):
    text = tables.PAGE.read_text()
    assert len(tables.MARKED.findall(text)) >= 10
    assert tables.stale(text) == []


def test_a_changed_number_in_a_benchmark_table_is_repaired(tables):
    text = tables.written("<!-- rows: loop -->\n<!-- end -->\n")
    assert "| naive | " in text and tables.stale(text) == []
    wrong = text.replace("| naive | 1", "| naive | 2")
    assert tables.stale(wrong) == ["loop"]
    assert tables.written(wrong) == text


@pytest.mark.parametrize(
    ("template", "row", "text"),
    [
        ("{a:.1f} ({b:.1f})", {"a": 1.26, "b": 0.5}, "1.3 (0.5)"),
        ("{a:.1f} ({b:.1f})", {"a": 1.26, "b": None}, "1.3"),
        ("{a:.1f}, {b}", {"a": 1.26}, "1.3"),
        ("{b:.1f}", {}, ""),
    ],
)
def test_a_table_cell_leaves_out_missing_values(tables, template, row, text):
    kinds = importlib.import_module(tables.Listing.__module__)
    assert kinds.cell(template, row) == text
