"""Documentation pages: every code block runs as typed by a reader, and the site builds."""

import ast
import os
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

from helpers.pages import PAGES, ROOT, blocks, name

WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
every_page = pytest.mark.parametrize("page", WITH_PYTHON, ids=name)


@every_page
def test_each_page_imports_only_existing_names(page: Path) -> None:
    trees = [ast.parse(block) for block in blocks(page, "python")]
    imports = [
        node
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    found: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other libraries warn about what they import
        exec(compile("\n".join(map(ast.unparse, imports)), name(page), "exec"), found)
    wanted = {
        alias.asname or alias.name.partition(".")[0] for node in imports for alias in node.names
    }
    assert wanted <= found.keys()


@pytest.mark.deep(reason="docs: trains what the pages train, in full")
@every_page
def test_the_python_code_of_each_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks of a page share one namespace and run in a separate folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERDURE_STATE", str(tmp_path / "state"))
    program = tmp_path / "page.py"
    program.write_text("\n".join(blocks(page, "python")))
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "toml")], ids=name)
def test_the_toml_examples_of_each_page_are_valid(page: Path) -> None:
    from perdure.experiment import parse

    for block in blocks(page, "toml"):
        if "[[arms]]" in block:
            assert parse(block).arms
        else:
            assert tomllib.loads(block)


@pytest.mark.parametrize(
    ("page", "file"),
    [
        ("docs/how-to/add-an-attack.md", "random_point.py"),
        ("docs/how-to/add-an-explainer.md", "leave_one_out.py"),
        ("docs/how-to/add-a-data-set.md", "rings.py"),
        ("docs/how-to/add-a-clipping-rule.md", "prelu.py"),
    ],
)
def test_a_how_to_page_shows_the_file_that_is_tested(page: str, file: str) -> None:
    text = (ROOT / "tests" / "additions" / file).read_text()
    assert text in blocks(ROOT / page, "python")


@pytest.mark.deep(reason="docs: builds the whole site")
def test_the_documentation_site_builds_without_broken_links(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").exists()
