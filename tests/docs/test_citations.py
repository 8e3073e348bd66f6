"""Files and sections cited in the project exist in the project."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "strategies", "benchmarks", "tests", "docs", ".ci")
SUFFIXES = (".py", ".md", ".toml", ".txt", ".css", ".yaml", "")
GENERATED = {
    f"{folder}{page}.md"
    for folder, pages in (
        ("", ("changelog", "strategies", "command-line", "config")),
        (
            "reference/",
            ("index", "command-line", "config", "perdure.contract", "perdure.tasks.losses"),
        ),
    )
    for page in pages
}
"""Pages that docs/generated_pages.py makes when the site is built."""
WRITTEN = ("model_card.md",)
"""Files that perdure writes, for its users."""
DOCUMENT = re.compile(r"(?<![\w/.:-])[\w./-]*\w\.(?:md|rst)\b")
NOTES = re.compile(r"(?<![\w-])\w+[-]notes\b|(?<![\w/.-])shared[/]\w|(?<![\w.])/work[/]|/tmp[/]\w")


def project_files():
    """List the text files of the project."""
    found = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    return sorted(
        path
        for path in found
        if path.suffix in SUFFIXES and not {"__pycache__", "results"} & {*path.parts}
    )


def citations(text):
    """List documents, notes and outside folders that a text names."""
    return DOCUMENT.findall(text), NOTES.findall(text)


@pytest.mark.parametrize("path", project_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_cited_files_and_sections_exist(path):
    documents, notes = citations(path.read_text(errors="replace"))
    lost = [
        name
        for name in documents
        if name not in WRITTEN
        and not any((f / name).is_file() for f in (ROOT, path.parent))
        and not (path.is_relative_to(ROOT / "docs") and name.removeprefix("../") in GENERATED)
    ]
    assert not lost and not notes, f"{path.relative_to(ROOT)} cites {[*lost, *notes]}"


def test_the_citation_check_finds_cited_files_and_folders():
    page, note, folder = ".".join(("plan", "md")), "-".join(("private", "notes")), "shared" + "/x"
    assert citations(f"see {page}, docs/{page} and {note} in {folder}") == (
        [page, f"docs/{page}"],
        [note, folder],
    )
    assert citations(f"https://example.org/{page} and release notes") == ([], [])
