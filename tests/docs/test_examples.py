"""The README's Python examples run, in order, in one namespace, as a reader would type them."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_python_examples_import_what_there_is() -> None:
    imports = [
        node
        for block in python_blocks()
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert len(imports) > 10
    exec(compile("\n".join(map(ast.unparse, imports)), str(README), "exec"), {})


@pytest.mark.deep(reason="docs: trains what the README's examples train, in full")
def test_python_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = python_blocks()
    namespace: dict[str, object] = {"__name__": "readme"}
    assert len(blocks) == 7
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    printed = capsys.readouterr().out
    assert "average accuracy" in printed
    assert "simulation: not a private release" in printed
    assert "1: BatchNorm2d -> GroupNorm(8, 8" in printed
    assert tuple(namespace["matrix"].shape) == (5, 5)


def test_the_example_config_is_right() -> None:
    from perdure.adversarial import FGSM, PGD
    from perdure.experiment import parse
    from perdure.explain import KernelSHAP

    first, second = re.findall(r"```toml\n(.*?)```", README.read_text(), flags=re.DOTALL)
    config = parse(first)
    assert config.training.adversary is not None
    assert config.training.adversary.attack == FGSM(epsilon=0.05)
    assert config.attack is not None
    assert config.attack.attack == PGD(epsilon=0.1, steps=20)
    assert config.explain is not None
    assert (config.explain.explainer, config.explain.records) == (KernelSHAP(), 6)
    assert set(tomllib.loads(second)["project"]["entry-points"]) == {"perdure.strategies"}


def test_every_row_of_the_strategies_is_of_a_class_that_exists() -> None:
    """A missing row is no error: `make lint` reports it, and `make tables` writes it."""
    from perdure.strategies import find, names

    listed = re.findall(r"^\| `(\w+)` \|", README.read_text(), flags=re.MULTILINE)
    assert len(listed) == len(set(listed)) > 20
    assert {find(name).__name__ for name in names()} >= set(listed)


def test_commands_exist() -> None:
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README.read_text(), flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
