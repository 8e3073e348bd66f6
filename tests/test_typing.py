"""A type checker sees users' mistakes: mypy's words about the files in `typing/` are those that
their comments expect.

    Replay(nonsense=3)  # E[call-arg]: "nonsense"     an error of this code whose text holds this
    reveal_type(x)      # N: builtins.str             a note whose text holds this
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import perdure

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "typing"
EXPECTED = re.compile(r"# (?:E\[([\w-]+)\]|N): (.+)$")
ERROR = re.compile(r"^tests/typing/([\w.]+):(\d+): error: (.+)  \[([\w-]+)\]$")
NOTE = re.compile(r"^tests/typing/([\w.]+):(\d+): note: (Revealed type is .+)$")


def expected():
    """Map (file, line) to the (code, words) that mypy must report; the code of a note is None."""
    return {
        (path.name, number): found.groups()
        for path in sorted(FOLDER.glob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (found := EXPECTED.search(line))
    }


def reported():
    """Return (file, line, code, words) of every error and revealed type; the code of a note is
    None.
    """
    # perdure is found beside the one that runs the tests, and the cache of `make lint` is used.
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-pretty", str(FOLDER.relative_to(ROOT))],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(Path(perdure.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    for line in done.stdout.splitlines():
        if error := ERROR.match(line):
            yield error[1], int(error[2]), error[4], error[3]
        elif note := NOTE.match(line):
            yield note[1], int(note[2]), None, note[3]


@pytest.mark.deep(reason="deployment: checks users' files against the types of the whole package")
def test_mypy_reports_exactly_the_expected_errors():
    said = sorted(reported(), key=lambda each: each[:2])
    assert len(said) > 20
    assert [each[:2] for each in said] == sorted(expected())
    for file, line, code, words in said:
        expected_code, expected_words = expected()[file, line]
        assert code == expected_code, (file, line, words)
        assert expected_words in words, (file, line)
