"""The privacy page: its examples run and print what the page quotes."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/concepts/privacy.md"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.mark.slow
def test_the_privacy_page_examples_print_what_the_page_quotes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks share one namespace and run in a separate folder, as typed by a reader."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERDURE_STATE", str(tmp_path / "state"))
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks("python"):
        exec(compile(block, str(PAGE), "exec"), namespace)
    printed = capsys.readouterr().out.splitlines()
    (quoted,) = blocks("text")
    assert quoted.strip() == printed[0]
    told = re.findall(r'^print\(f".*"\)  # (.*)$', "\n".join(blocks("python")), flags=re.MULTILINE)
    assert len(told) == 2
    assert set(told) <= set(printed)


def test_the_privacy_page_explains_each_part_of_the_statement() -> None:
    (quoted,) = blocks("text")
    head, _, inside = quoted.strip().partition(" (")
    before, _, after = inside.removesuffix(")").partition("; ")
    explained = set(re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(), flags=re.MULTILINE))
    assert {head, *before.split(", "), after} <= explained


def test_the_readme_links_to_the_privacy_page() -> None:
    assert str(PAGE.relative_to(ROOT)) in (ROOT / "README.md").read_text()
