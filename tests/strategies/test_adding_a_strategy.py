"""Adding a strategy is adding a file: the README's own example, as a new file of a copy of the
package.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import perdure

README = Path(__file__).parents[2] / "README.md"
PACKAGE = Path(perdure.__file__).parent
USING = """
from functools import partial
import torch
from perdure import Learner, Privacy
from perdure.data.datasets.base import digits
from perdure.models.classifiers import mlp
from perdure.strategies import Combine, Replay, Tether, find, names
from perdure.data.scenarios import split
from perdure.testing import check_strategy

assert "tether" in names() and find("tether") is Tether
stream = split(digits(), scenario="class", experiences=5)
for privacy in (None, Privacy(noise_multiplier=1.0, seed=0)):
    model = mlp(input_shape=stream.input_shape, num_classes=10, hidden=(8,), seed=0)
    learner = Learner(
        model=model, strategy=Tether(strength=0.1), optimizer=partial(torch.optim.SGD, lr=0.1), \
iterations=3,
        privacy=privacy,
    )
    print(tuple(learner.fit(stream).shape))
for strategy in (Tether(strength=0.1), Combine(Tether(strength=0.1), Replay(memory_size=12))):
    print(check_strategy(strategy))
"""


def example():
    """Imports and the class of the README's example, under a name that no strategy has."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    [block] = [block for block in blocks if "(Strategy):" in block]
    parts = [
        part
        for part in ast.parse(block).body
        if isinstance(part, ast.ClassDef | ast.Import | ast.ImportFrom)
    ]
    [kind] = [part for part in parts if isinstance(part, ast.ClassDef)]
    text = "\n".join(ast.unparse(part) for part in parts)
    return text.replace(f"class {kind.name}(", "class Tether(")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder with a copy of the package, strategies and all, and one file more."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(PACKAGE, folder / "perdure", ignore=shutil.ignore_patterns("__pycache__"))
    strategies = folder / "perdure" / "strategies"
    assert not strategies.is_symlink()
    assert not (strategies / "tether.py").exists()
    (strategies / "tether.py").write_text(example())
    return folder


def python(package, *words):
    """Run the interpreter where the copy comes first."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=package,
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_new_file_is_found_and_keeps_the_contract_and_learns(package):
    printed = python(package, "-c", USING)
    assert printed.count("(5, 5)") == 2
    assert (
        printed.count(
            "passed: declared, alone, pure, rows, bounds, vmap, private, resume, federated"
        )
        == 2
    )


@pytest.mark.slow
def test_a_new_file_that_type_checkers_do_not_know_is_reported(package):
    script = Path(__file__).parents[1] / "helpers" / "typed_list.py"
    assert python(package, str(script)) == (
        "perdure.strategies: type checkers do not know Tether; add to its __init__.py\n"
    )


@pytest.mark.slow
def test_a_new_file_is_listed_with_its_costs(package):
    printed = python(package, "-m", "perdure.cli.main", "bench", "--list", "--json")
    [row] = [row for row in json.loads(printed) if row["name"] == "tether"]
    assert row["strategy"] == "Tether(strength=1.0)"
    assert row["summary"]
    assert row["privacy"] == "gradient"
    assert row["memory"] == "1 x parameters"
