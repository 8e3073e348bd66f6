"""Measures of groups in a run: result, terminal and report page."""

import pytest

from perdure.errors import DataError
from perdure.experiment import parse, run
from perdure.report import groups_table, write_report
from perdure.report.groups import group_rows, groups_section

CONFIG = """
name = "groups"
seeds = [0, 1]
[data]
name = "helpers.own_data:blobs"
experiences = 2
[model]
hidden = [4]
[training]
epochs = 1
[training.group_weights]
attribute = "domain"
[fairness]
attribute = "domain"
names = ["left", "<right>"]
positive = 1
[[arms]]
strategy = "naive"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("groups") / "run"


@pytest.fixture(scope="module")
def result(folder):
    return run(parse(CONFIG), CONFIG, folder)


def test_a_run_measures_its_groups_in_every_experience(result):
    for trial in result["arms"][0]["seeds"]:
        first, second = trial["by_group"]
        assert first["records"].keys() == {"left", "<right>"} == second["records"].keys()
        assert first["attribute"] == "domain" and first["selection_rate"]


def test_rows_of_groups_are_means_over_seeds(result):
    rows = group_rows(result)
    first = next(row for row in rows if row[1:3] == ("1", "domain left"))
    shares = [trial["by_group"][0]["accuracy"]["left"] for trial in result["arms"][0]["seeds"]]
    assert first[4] == f"{50 * sum(shares):.1f}"
    gaps = [row[2] for row in rows if row[1] == "1" and row[2].startswith("difference")]
    assert len(gaps) == 3


def test_the_page_shows_groups_escaped(result, folder):
    page = write_report(folder).read_text()
    assert '<a href="#groups">Groups</a>' in page and "&lt;right&gt;" in page
    assert groups_table(result).row_count == len(group_rows(result))


def test_a_run_without_groups_has_no_section(result):
    bare = {**result, "arms": [{**arm, "seeds": []} for arm in result["arms"]]}
    assert groups_section(bare) == "" and groups_table(bare) is None


def test_an_unknown_attribute_is_refused(tmp_path):
    text = CONFIG.replace('attribute = "domain"\nnames', 'attribute = "sex"\nnames')
    with pytest.raises(DataError, match="has no attribute 'sex'; its attributes: time, domain"):
        run(parse(text), text, tmp_path / "run")
