"""The gate: what `.ci/run` and the Makefile offer, and which tests only the long run takes."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"mark\.deep\b(?P<arguments>\((?:reason=)?[\"']\w[^\"']+[\"']\))?")


def shell(*command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--fast"], ["all"], ["--all", "--all"], ["--all", "x"]])
def test_a_wrong_argument_gets_one_plain_line(arguments):
    done = shell(".ci/run", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    given = " ".join(arguments)
    assert done.stderr == (
        f".ci/run: {given} is not allowed; allowed: no argument, or --all for the deep tests too\n"
    )


def test_the_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)[1].split()
    listed = shell("make", "--no-print-directory", "help").stdout.splitlines()
    assert [line.split()[:2] for line in listed] == [["make", target] for target in targets]
    assert all(len(line.split("\t")[1]) > 10 for line in listed)


def test_only_the_long_run_takes_the_deep_tests():
    commands = {
        target: shell("make", "--dry-run", target).stdout.splitlines()[-1]
        for target in ("test", "test-all")
    }
    assert commands["test"] == commands["test-all"] + " -m 'not deep'"


def test_every_deep_mark_says_why():
    marks = [
        (path.name, match["arguments"])
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for match in MARK.finditer(path.read_text())
        if path != Path(__file__)
    ]
    assert [name for name, arguments in marks if arguments is None] == []
    assert len(marks) > 5
