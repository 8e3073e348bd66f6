"""The gate: targets of `.ci/run` and the Makefile, and tests that only the long run takes."""

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KINDS = ("deployment", "chaos", "docs", "full replay", "all devices")
"""Words before the colon of a deep mark's reason."""


def shell(*command):
    # `make test` runs these tests: its own flags would reach the make that is called here
    own = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--fast"], ["all"], ["--all", "--all"], ["--all", "x"]])
def test_ci_run_refuses_a_wrong_argument_in_one_line(arguments):
    done = shell(".ci/run", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    given = " ".join(arguments)
    assert done.stderr == (
        f".ci/run: {given} is not allowed; allowed: no argument, or --all for the deep tests too\n"
    )


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)[1].split()
    listed = shell("make", "--no-print-directory", "help").stdout.splitlines()
    assert [line.split()[:2] for line in listed] == [["make", target] for target in targets]
    assert all(len(line.split("\t")[1]) > 10 for line in listed)


def test_only_make_test_all_runs_the_deep_tests():
    commands = {
        target: shell("make", "--dry-run", target).stdout.splitlines()[-1]
        for target in ("test", "test-all")
    }
    assert commands["test"] == commands["test-all"] + " -m 'not deep'"


def test_every_deep_mark_has_a_reason_of_a_known_kind():
    reasons = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        if "deep" not in text:
            continue  # parsing and walking every file takes seconds
        nodes = list(ast.walk(ast.parse(text)))
        named = {
            call.func: word.value.value
            for call in nodes
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
            for word in call.keywords
            if word.arg == "reason" and isinstance(word.value, ast.Constant)
        }
        reasons |= {
            f"{path.name}:{mark.lineno}": named.get(mark)
            for mark in nodes
            if isinstance(mark, ast.Attribute) and mark.attr == "deep"
        }
    assert len(reasons) > 5
    unknown = {
        place: reason
        for place, reason in reasons.items()
        if not str(reason).startswith(tuple(f"{kind}: " for kind in KINDS))
    }
    assert unknown == {}
