"""The README: its example prints the quoted text, and the listed names exist."""

import re

import pytest

from helpers.pages import README, blocks


@pytest.mark.deep(reason="docs: trains what the README's example trains, in full")
def test_the_readme_example_prints_accuracy_and_epsilon(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {"__name__": "readme"}
    (block,) = blocks(README, "python")
    exec(compile(block, str(README), "exec"), namespace)
    printed = capsys.readouterr().out
    assert "average accuracy" in printed
    assert "simulation: not a private release" in printed
    assert tuple(namespace["matrix"].shape) == (5, 5)


def test_the_readme_lists_only_existing_strategies() -> None:
    """A missing row is not an error: `make lint` reports it and `make tables` adds it."""
    from perdure.strategies import find, names

    listed = re.findall(r"^\| `(\w+)` \|", README.read_text(), flags=re.MULTILINE)
    assert len(listed) == len(set(listed)) > 20
    assert {find(name).__name__ for name in names()} >= set(listed)


def test_the_readme_names_only_existing_make_targets() -> None:
    makefile = (README.parent / "Makefile").read_text()
    targets = re.findall(r"`make ([\w-]+)`", README.read_text())
    assert {"test", "test-all", "lint"} <= {*targets}
    for target in targets:
        assert f"\n{target}:" in makefile
