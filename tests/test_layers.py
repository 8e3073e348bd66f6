"""The import rule: packages import lower layers only, without cycles."""

import re
from pathlib import Path

import pytest

from helpers.import_rules import RANK, Tree

ROOT = Path(__file__).parents[1]
PERDURE = Tree(ROOT)
RULES = {
    "every package has a layer": Tree.unknown_packages,
    "imports point downwards": Tree.upward_imports,
    "strategies import from the allow-list": Tree.forbidden_to_strategies,
    "files have no import cycle": Tree.circles_of_files,
    "packages have no import cycle": Tree.circles_of_packages,
    "the top of src/perdure holds packages": Tree.misplaced_at_the_top,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_source_files_keep_the_import_rules(rule):
    found = RULES[rule](PERDURE)
    assert not found, "\n".join([f"against the rule that {rule}:", *found])


def test_the_import_check_reads_every_file():
    assert {"perdure", "perdure.data.records", "perdure.strategies.ewc"} <= set(PERDURE.modules)
    assert sum(map(len, PERDURE.imports.values())) > 500
    assert set(RANK) >= {name.split(".")[1] for name in PERDURE.modules if "." in name}


GOOD = {
    "src/perdure/__init__.py": "from perdure.data import Records",
    "src/perdure/errors.py": "",
    "src/perdure/py.typed": "",
    "src/perdure/data/__init__.py": "from perdure.data.records import Records",
    "src/perdure/data/records.py": "from perdure import errors\nclass Records: ...",
    "src/perdure/data/views.py": "from perdure.data.records import Records",
    "src/perdure/learner/__init__.py": "",
    "src/perdure/learner/learner.py": "import torch\nfrom perdure.data import Records",
    "src/perdure/contract/__init__.py": "",
    "strategies/__init__.py": "",
    "strategies/replay.py": "from perdure.strategies._shared import x\nimport perdure.data",
    "strategies/_shared.py": "from perdure.contract import x",
}


def tree(folder, changes=None):
    """Return a valid tree with some files changed or added."""
    for name, text in (GOOD | (changes or {})).items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return Tree(folder)


def test_the_import_check_finds_nothing_in_a_valid_tree(tmp_path):
    for rule, check in RULES.items():
        assert check(tree(tmp_path)) == [], rule


@pytest.mark.parametrize(
    "line",
    [
        "from perdure.learner.learner import Learner",
        "from perdure.learner import learner",
        "from perdure.learner import Learner",
        "from perdure import learner",
        "from perdure import errors, learner",
        "import perdure.learner",
        "import perdure.learner.learner as l",
        "from .. import learner",
        "from ..learner import learner",
        "from ..learner.learner import Learner",
        "def f():\n    import perdure.learner",
        "import typing\nif typing.TYPE_CHECKING:\n    from perdure.learner import Learner",
        "import importlib\nimportlib.import_module('perdure.learner.learner')",
        "__import__('perdure.learner')",
    ],
)
def test_the_import_check_finds_every_form_of_upward_import(tmp_path, line):
    [found] = tree(tmp_path, {"src/perdure/data/views.py": line}).upward_imports()
    place = 1 + line.count("\n")
    assert re.fullmatch(
        rf"src/perdure/data/views.py:{place} imports perdure.learner(.learner)?", found
    )


@pytest.mark.parametrize(
    "line", ["import perdure", "from perdure import Records", "from .. import Records"]
)
def test_a_package_may_not_import_perdure_itself(tmp_path, line):
    [found] = tree(tmp_path, {"src/perdure/learner/learner.py": line}).upward_imports()
    assert found == "src/perdure/learner/learner.py:1 imports perdure"


def test_an_import_within_one_layer_counts_as_upward(tmp_path):
    made = tree(
        tmp_path,
        {
            "src/perdure/contract/state.py": "import perdure.privacy",
            "src/perdure/privacy/__init__.py": "",
        },
    )
    assert made.upward_imports() == ["src/perdure/contract/state.py:1 imports perdure.privacy"]


def test_the_import_check_finds_a_package_without_a_layer(tmp_path):
    made = tree(
        tmp_path,
        {
            "src/perdure/misc/__init__.py": "",
            "src/perdure/learner/learner.py": "from perdure.misc import x",
        },
    )
    assert made.unknown_packages() == [
        "perdure.misc is in no layer: src/perdure/misc/__init__.py",
        "src/perdure/learner/learner.py:1 imports perdure.misc, which is in no layer",
    ]


@pytest.mark.parametrize("package", ["privacy", "learner", "curator", "planning"])
def test_the_import_check_finds_forbidden_strategy_imports(tmp_path, package):
    made = tree(tmp_path, {"strategies/replay.py": f"from perdure.{package} import x"})
    assert made.forbidden_to_strategies() == [f"strategies/replay.py:1 imports perdure.{package}"]


def test_a_strategy_may_not_import_perdure_itself(tmp_path):
    made = tree(tmp_path, {"strategies/replay.py": "from perdure import Strategy"})
    assert made.forbidden_to_strategies() == ["strategies/replay.py:1 imports perdure"]


def test_the_import_check_finds_a_cycle_of_files(tmp_path):
    made = tree(
        tmp_path,
        {
            "src/perdure/data/one.py": "def f():\n    from perdure.data.two import x",
            "src/perdure/data/two.py": "from .three import x",
            "src/perdure/data/three.py": "from perdure.data import one",
        },
    )
    assert made.circles_of_files() == [
        "perdure.data.one <-> perdure.data.three <-> perdure.data.two"
    ]


def test_a_file_that_imports_its_own_package_is_a_cycle(tmp_path):
    made = tree(
        tmp_path,
        {"src/perdure/data/records.py": "from perdure.data import Views\nclass Records: ..."},
    )
    assert made.circles_of_files() == ["perdure.data <-> perdure.data.records"]


def test_the_import_check_finds_a_cycle_of_sub_packages(tmp_path):
    made = tree(
        tmp_path,
        {
            "src/perdure/data/sets/__init__.py": "from perdure.data.sets.one import x",
            "src/perdure/data/sets/one.py": "",
            "src/perdure/data/sets/two.py": "import perdure.data.views",
            "src/perdure/data/views.py": "import perdure.data.sets.one",
        },
    )
    assert made.circles_of_files() == []
    (tmp_path / "src/perdure/data/sets/one.py").write_text("import perdure.data.views")
    assert Tree(tmp_path).circles_of_files() == [
        "perdure.data.sets <-> perdure.data.sets.one <-> perdure.data.views"
    ]


def test_the_import_check_finds_a_cycle_of_packages(tmp_path):
    made = tree(tmp_path, {"src/perdure/data/views.py": "import perdure.learner"})
    assert made.circles_of_files() == []
    assert made.circles_of_packages() == ["perdure.data <-> perdure.learner"]


def test_the_import_check_finds_extra_files_at_the_top(tmp_path):
    made = tree(tmp_path, {"src/perdure/helpers.py": "", "src/perdure/misc/notes.py": ""})
    (tmp_path / "src/perdure/data.json").write_text("{}")
    assert made.misplaced_at_the_top() == ["src/perdure/helpers.py", "src/perdure/misc"]
