"""Generated texts between two markers of a file."""

import re
from pathlib import Path

import pytest

from perdure.errors import ConfigError
from perdure.experiment.tables import TEXTS, GeneratedText

OLD = """# Fruit
<!-- fruit -->
| fruit | colour |
|---|---|
| `apple` | green |
| `plum` | blue |
<!-- end -->
More.
"""


@pytest.fixture
def fruit(tmp_path):
    """Return a generated table of fruit with the given rows, and a file with the old table."""
    (tmp_path / "README.md").write_text(OLD)
    return lambda *rows: GeneratedText(
        path="README.md",
        title="table of fruit",
        begin="<!-- fruit -->",
        end="<!-- end -->",
        row=re.compile(r"\| `(\w+)`"),
        build=lambda: "\n".join(["| fruit | colour |", "|---|---|", *rows]),
    )


def test_the_report_names_missing_stale_and_extra_table_rows(fruit, tmp_path):
    text = fruit("| `apple` | red |", "| `pear` | green |")
    assert text.report(tmp_path) == (
        "README.md, table of fruit: missing: pear; stale: apple; left over: plum; "
        "run make tables to write it again"
    )
    assert (tmp_path / "README.md").read_text() == OLD


def test_a_generated_table_is_written_only_between_its_markers(fruit, tmp_path):
    text = fruit("| `apple` | red |", "| `pear` | green |")
    text.write(tmp_path)
    assert (tmp_path / "README.md").read_text() == (
        "# Fruit\n<!-- fruit -->\n| fruit | colour |\n|---|---|\n| `apple` | red |\n"
        "| `pear` | green |\n<!-- end -->\nMore.\n"
    )
    assert text.report(tmp_path) is None


def test_an_up_to_date_generated_table_is_not_changed(fruit, tmp_path):
    text = fruit("| `apple` | green |", "| `plum` | blue |")
    assert text.report(tmp_path) is None
    text.write(tmp_path)
    assert (tmp_path / "README.md").read_text() == OLD


def test_a_file_without_both_table_markers_is_refused(fruit, tmp_path):
    (tmp_path / "README.md").write_text(OLD.replace("<!-- end -->\n", ""))
    with pytest.raises(
        ConfigError, match=r"README.md.* is not allowed; allowed: a file with the lines"
    ):
        fruit().report(tmp_path)


def test_the_project_files_have_the_table_markers():
    for text in TEXTS:
        before, between, after = text.parts(Path(__file__).parents[2])
        assert before and text.row.search(between) and after
