"""The report page: complete, self-contained, accessible, escaped, and reproducible to the byte."""

import copy
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure.errors import RunError
from perdure.experiment.result_schema import checked
from perdure.experiment.trial_names import arm_name
from perdure.report import write_figures, write_report
from perdure.report.figures import pictures
from perdure.report.page import html
from perdure.report.sections import arms_table
from perdure.report.statement import guess_limit
from perdure.report.wording import SIMULATION

VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """The elements of a page with attributes and text, and a check that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page((written / "report.html").read_text(encoding="utf-8"))


def words_of(result: dict[str, Any], config: str | None = None) -> str:
    """Return the text of the page without pictures, which is fast."""
    return Page(html(checked(result), [], config)).text


def test_the_report_page_has_and_links_every_section(page: Page) -> None:
    names = [attributes["id"] for attributes in page.all("section")]
    assert names == ["answer", "arms", "pictures", "privacy", "run", "words"]
    assert [attributes["href"] for attributes in page.all("a")] == [f"#{name}" for name in names]
    assert len(page.all("h1")) == 1
    assert len(page.all("svg")) == len(page.all("figcaption")) == 4


def test_the_report_page_loads_nothing_from_the_network(page: Page, written: Path) -> None:
    for tag, attributes in page.elements:
        assert tag not in {"script", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (
                tag,
                attributes[name][:80],
            )
    source = (written / "report.html").read_text(encoding="utf-8")
    assert "http://" not in source and "https://" not in source and "@import" not in source
    assert source.count("url(") == source.count("url(#") > 0


def test_every_link_target_of_the_report_page_exists_once(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        targets = (
            [attributes.get("href", ""), "#" + attributes["aria-labelledby"]]
            if "aria-labelledby" in attributes
            else [attributes.get("href", "")]
        )
        targets += [value[5:-1] for value in attributes.values() if value.startswith("url(#")]
        assert all(target.lstrip("#") in ids for target in targets if target.startswith("#"))


def test_report_tables_and_figures_describe_themselves_in_text(page: Page) -> None:
    assert len(page.all("table")) == len(page.all("caption")) > 0
    assert all("scope" in attributes for attributes in page.all("th"))
    for svg in page.all("svg"):
        assert svg["role"] == "img" and len(svg["aria-label"]) > 40
    assert page.all("html") == [{"lang": "en"}]


def test_the_report_page_has_styles_for_dark_mode_and_print(written: Path) -> None:
    source = (written / "report.html").read_text(encoding="utf-8")
    for query in ("prefers-color-scheme: dark", "@media print", "max-width: 40rem"):
        assert query in source


def test_strategy_options_are_shown_as_chips_that_wrap(
    result: dict[str, Any],
) -> None:
    replay = next(arm for arm in result["arms"] if arm["strategy"] == "replay")
    replay["options"] = "Replay(memory_size=200, selection='ring', per_class=None)"
    arms = Page(arms_table(checked(result)))
    assert "Replay(" not in arms.text and "per_class" not in arms.text
    assert "memory_size = 200 selection = ring" in arms.text
    chips = [attributes for attributes in arms.all("ul") if attributes["class"] == "chips"]
    assert {"class": "chips", "aria-label": "options of replay"} in chips
    rows = [attributes["class"] for attributes in arms.all("tr") if "class" in attributes]
    assert rows.count("arm") + rows.count("arm best") == 8
    assert len(chips) == sum(name.startswith("options") for name in rows)


SMOOTHING = {"method": "smoothing", "epsilon": 0.25, "alpha": 0.001, "records": 200}


@pytest.mark.parametrize("certificate", [None, SMOOTHING])
def test_an_options_row_has_all_columns_of_the_arms_table(
    result: dict[str, Any], certificate: dict[str, Any] | None
) -> None:
    result["certificate"] = certificate
    arms = Page(arms_table(checked(result)))
    width = sum(attributes.get("scope") == "col" for attributes in arms.all("th"))
    (span,) = {
        int(attributes["colspan"]) for attributes in arms.all("td") if "colspan" in attributes
    }
    beside = sum("rowspan" in attributes for attributes in arms.all("td"))
    assert span + beside // len(arms.all("ul")) == width


def test_the_report_page_shows_certified_accuracy_and_radius(result: dict[str, Any]) -> None:
    assert "certified accuracy %" not in words_of(result)
    result["certificate"] = SMOOTHING
    result["arms"][0]["certified_accuracy"] = 43.21
    words = words_of(result)
    assert "certified accuracy %, smoothing, L2 0.25" in words and "43.2" in words
    assert "smoothing, L2 0.25; at most 200 test records" in words
    assert "wrong with probability 0.001 per record" in words


def test_only_numbers_in_the_arms_table_stay_on_one_line(written: Path) -> None:
    style = (written / "report.html").read_text(encoding="utf-8").partition("</style>")[0]
    rules = dict(re.findall(r"^([^@{}\n]+?) \{([^}]*)\}", style, flags=re.MULTILINE))
    kept = {name for name, rule in rules.items() if "white-space: nowrap" in rule}
    assert kept == {"thead th small", "td.number"}
    assert "flex-wrap: wrap" in rules[".chips"]
    assert "overflow-wrap: anywhere" in rules[".chips li"]
    assert "overflow-x: auto" in rules[".scroll"]


def test_the_report_page_names_the_best_arms(result: dict[str, Any]) -> None:
    best = {arm["private"]: arm for arm in result["arms"] if arm["strategy"] == "replay"}
    text = words_of(result)
    assert (
        f"Without privacy, replay remembers most: {best[False]['average_accuracy']:.1f} %" in text
    )
    assert f"With privacy, replay is best at {best[True]['average_accuracy']:.1f} %" in text
    assert f"at epsilon 7.99 (per record, add-remove, δ = 1e-5; {SIMULATION})" in text


def test_the_report_summary_depends_on_the_result_numbers(result: dict[str, Any]) -> None:
    result["arms"][0]["average_accuracy"] = 99.5
    result["arms"][1]["average_accuracy"] = 99.9
    text = words_of(result)
    assert "Without privacy, naive remembers most: 99.5 %" in text
    assert "With privacy, naive is best at 99.9 % , 0.4 points more" in text


def test_a_report_without_private_arms_claims_no_privacy(result: dict[str, Any]) -> None:
    result["arms"] = [arm for arm in result["arms"] if not arm["private"]]
    result["epsilon_of_all_arms"] = None
    text = words_of(result)
    assert "nothing in this run may be called private" in text
    assert "No promise." in text
    assert SIMULATION not in text


def test_the_report_page_works_with_private_arms_only(result: dict[str, Any]) -> None:
    result["arms"] = [arm for arm in result["arms"] if arm["private"]]
    text = words_of(result)
    assert "No model was measured without privacy." in text
    assert "epsilon is infinite" not in text


def test_the_report_states_epsilon_of_every_private_arm(result: dict[str, Any]) -> None:
    text = words_of(result)
    for arm in result["arms"]:
        if arm["epsilon"]:
            assert arm["epsilon"]["text"] in text
            assert f"Charges of {arm['strategy']}" in text
    assert "Fisher diagonal 5 4 1" in text
    assert f"Epsilon 17.35 (per record, add-remove, δ = 1e-5; {SIMULATION})" in text
    assert "4 models were trained without privacy on the same records and have no promise" in text
    assert "server sees released sums only" in text


def test_the_report_page_says_if_the_joint_epsilon_is_missing(result: dict[str, Any]) -> None:
    result["epsilon_of_all_arms"] = None
    text = words_of(result)
    assert "No joint epsilon was computed for the 4 models with privacy." in text
    assert "Use this number if more than one" not in text


def test_the_report_page_says_that_declared_sizes_are_public(result: dict[str, Any]) -> None:
    text = words_of(result)
    assert "Declared sizes: public" in text
    assert "If no number was declared, the real number is used, and it becomes public." in text


def test_the_report_page_labels_epsilons_of_simulated_noise_only(result: dict[str, Any]) -> None:
    # Answer, table and statement of four arms, and all together; the warning begins with a capital.
    assert words_of(result).count(SIMULATION) == 1 + 4 + 4 + 1
    assert SIMULATION.capitalize() in words_of(result)
    for epsilon in [arm["epsilon"] for arm in result["arms"]] + [result["epsilon_of_all_arms"]]:
        if epsilon:
            epsilon["simulated"] = False
    assert SIMULATION not in words_of(result).lower()


def test_the_report_page_explains_each_unit_and_relation(result: dict[str, Any]) -> None:
    other = result["arms"][1]["epsilon"]
    other.update(unit="client", relation="replace-one")
    text = words_of(result)
    assert "One client is one participant" in text and "One record is one row" in text
    assert "guesses which of two given clients took part" in text
    assert "guesses whether one given record took part" in text


def test_text_from_a_run_cannot_become_markup(run: Path, result: dict[str, Any]) -> None:
    attack = "<script>alert(1)</script>\"'&<b>"
    result.update(name=attack, explanations=None, arms=result["arms"][:2])
    result["stream"]["name"] = result["model"]["name"] = result["environment"]["platform"] = attack
    result["attack"]["name"] = attack
    for arm in result["arms"]:
        arm.update(strategy=attack + arm["options"], options=attack)
        if arm["epsilon"]:
            arm["epsilon"].update(
                dict.fromkeys(
                    ("unit", "relation", "accountant", "sampling", "trust", "text"), attack
                )
            )
            arm["spending"][0]["purpose"] = attack
    (run / "result.json").write_text(json.dumps(result))
    (run / "config.toml").write_text(attack)
    hostile = Page(write_report(run).read_text(encoding="utf-8"))
    assert not hostile.all("script")
    assert all(not attributes.get("onerror") for _, attributes in hostile.elements)
    assert len(hostile.all("b")) == 1  # the epsilon of the table
    assert attack in hostile.text


def test_equal_results_give_report_files_with_equal_bytes(
    run: Path, result: dict[str, Any], tmp_path: Path
) -> None:
    result["arms"] = result["arms"][-1:]
    (run / "result.json").write_text(json.dumps(result))
    other = tmp_path / "elsewhere"
    shutil.copytree(run, other)
    page = write_report(run, figures=True)
    assert page.read_bytes() == write_report(other).read_bytes()
    second = write_figures(other)
    first = [run / "figures" / path.name for path in second]
    assert sorted((run / "figures").iterdir()) == sorted(first)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_the_figures_of_a_report_are_also_written_as_files(
    run: Path, result: dict[str, Any]
) -> None:
    (run / "result.json").write_text(json.dumps(result | {"arms": result["arms"][-1:]}))
    paths = write_figures(run)
    names = ["accuracy_matrix", "accuracy_over_time", "epsilon_over_time", "explanations"]
    assert [path.name for path in paths] == [
        f"{name}.{kind}" for name in names for kind in ("svg", "png")
    ]
    assert all(path.parent == run / "figures" for path in paths)
    assert paths[0].read_text().startswith("<?xml") and paths[1].read_bytes().startswith(b"\x89PNG")
    assert sorted((run / "figures").iterdir()) == sorted(paths), "no draft is left"


def test_arms_with_different_privacy_units_have_separate_axes(
    run: Path, result: dict[str, Any]
) -> None:
    result["explanations"] = None
    assert len(pictures(checked(result), run)[2].figure.axes) == 1
    result["arms"][1]["epsilon"]["unit"] = "client"
    figure = pictures(checked(result), run)[2].figure
    assert [axes.get_title(loc="left").split(",")[0] for axes in figure.axes] == [
        "per client",
        "per record",
    ]
    assert [len(axes.lines) for axes in figure.axes] == [1, 3]


def test_arms_with_equal_epsilon_share_a_line_in_the_figure(
    run: Path, result: dict[str, Any]
) -> None:
    result["explanations"] = None
    axes = pictures(checked(result), run)[2].figure.axes[0]
    assert len(axes.lines) == 3
    assert any(text.get_text() == "naive, lwf: 7.98" for text in axes.texts)


def test_the_heat_map_shows_the_accuracy_matrix(run: Path, result: dict[str, Any]) -> None:
    result["explanations"] = None
    result["arms"][0]["accuracy_matrix"][4][0] = None
    axes = pictures(checked(result), run)[0].figure.axes[0]
    shown = [text.get_text() for text in axes.texts]
    expected = [value for row in result["arms"][0]["accuracy_matrix"] for value in row]
    assert shown == ["–" if value is None else f"{value:.0f}" for value in expected]


def test_a_dollar_sign_in_a_strategy_name_is_printed(run: Path, result: dict[str, Any]) -> None:
    result["arms"] = result["arms"][-2:]
    for arm in result["arms"]:
        arm["strategy"] = r"$\broken{ " + arm["strategy"] + "$"
        arm["name"] = arm_name(arm["strategy"], private=arm["private"])
    (run / "result.json").write_text(json.dumps(result))
    assert r"$\broken{ replay$, private" in Page(write_report(run).read_text(encoding="utf-8")).text


@pytest.mark.parametrize("moments", [1, 12])
def test_report_figures_work_for_short_and_long_streams(
    run: Path, result: dict[str, Any], moments: int
) -> None:
    result.update(explanations=None, arms=result["arms"][:2])
    result["stream"].update(experiences=moments, classes=[[i] for i in range(moments)])
    for arm in result["arms"]:
        arm["accuracy_matrix"] = [
            [100.0 if i >= j else None for j in range(moments)] for i in range(moments)
        ]
        arm["epsilon_over_time"] = [1.0] * moments if arm["private"] else None
    (run / "result.json").write_text(json.dumps(result))
    assert f"in {moments} experience" in Page(write_report(run).read_text(encoding="utf-8")).text


def test_the_report_page_shows_config_and_command_of_the_run(result: dict[str, Any]) -> None:
    text = words_of(result)
    for fact in (
        "hidden [64, 64]",
        "rounds 3",
        "torch 2.15.0",
        "PGD-10, L∞ 0.1",
        "1: 0, 1; 2: 2, 3",
    ):
        assert fact in text
    assert "perdure run runs/demo/config.toml" in text
    assert "perdure run config.toml" in words_of(result, config="seed = 17")
    assert "seed = 17" in words_of(result, config="seed = 17")


def test_the_report_page_works_without_federation_and_attack(result: dict[str, Any]) -> None:
    result.update(federation=None, attack=None)
    text = words_of(result)
    assert "none: one learner" in text and "no attack" in text


def test_write_report_names_a_missing_result_file(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"result\.json cannot be read"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("content", "word"), [("{", "not valid JSON"), ("[]", "list"), ('{"schema": 2}', "schema 2")]
)
def test_an_invalid_result_is_refused_and_keeps_the_old_page(
    run: Path, content: str, word: str
) -> None:
    (run / "report.html").write_text("old page")
    (run / "result.json").write_text(content)
    for write in (write_report, write_figures):
        with pytest.raises(RunError, match=word) as refusal:
            write(run)
        assert str(run / "result.json") in str(refusal.value)
    assert (run / "report.html").read_text() == "old page"
    assert not (run / "figures").exists()


def test_the_error_names_missing_or_wrong_explanation_files(
    run: Path, result: dict[str, Any]
) -> None:
    changed = copy.deepcopy(result) | {"arms": result["arms"][-1:]}
    changed["explanations"]["moments"].append("after experience 9")
    (run / "result.json").write_text(json.dumps(changed))
    with pytest.raises(RunError, match="has explanations of 2 moments"):
        write_report(run)
    (run / "explanations.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"explanations\.safetensors cannot be read"):
        write_report(run)
    (run / "explanations.safetensors").unlink()
    with pytest.raises(RunError, match=r"explanations\.safetensors cannot be read"):
        write_report(run)


@pytest.mark.property
@given(st.floats(0, 20), st.floats(0, 0.1))
def test_the_reported_limit_of_correct_guesses_is_exact(epsilon: float, delta: float) -> None:
    # The dominating pair of (epsilon, delta): with probability delta it tells all.
    odds = math.exp(epsilon)
    present = [delta, (1 - delta) * odds / (1 + odds), (1 - delta) / (1 + odds), 0.0]
    absent = present[::-1]
    right = sum(max(pair) for pair in zip(present, absent, strict=True)) / 2
    assert guess_limit(epsilon, delta) == pytest.approx(right, abs=1e-12)


@pytest.mark.deep(reason="deployment: a fresh process that loads a library where it is used")
def test_write_report_loads_matplotlib_only_to_draw(run: Path) -> None:
    program = (
        "import sys, pathlib, perdure.report as report\n"
        "assert 'matplotlib' not in sys.modules\n"
        "report.write_report(pathlib.Path(sys.argv[1]))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(run)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
