"""Generated texts of the project, such as the README's table of strategies.

    python -m perdure.experiment.tables             write them (make tables)
    python -m perdure.experiment.tables --report    print a line for each stale one (make lint)

Run both in the folder of the project. A strategy also works without a row in the README, so an
outdated table is reported, but is not an error.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from perdure.errors import ConfigError, PerdureError
from perdure.experiment.strategy_catalogue import cards, markdown
from perdure.utils.atomic_files import write_atomically


@dataclass(frozen=True, kw_only=True)
class GeneratedText:
    """Generated text between two marker lines of a file.

    Args:
        path: path of the file, relative to the folder of the project.
        title: description of the text, for a report.
        begin: marker line before the text.
        end: marker line after the text.
        row: pattern of a line that describes one thing; its group is the name of the thing.
        build: function that generates the text.
    """

    path: str
    title: str
    begin: str
    end: str
    row: re.Pattern[str]
    build: Callable[[], str]

    def parts(self, root: Path) -> tuple[str, str, str]:
        """Split the file into the text before, between and after the markers.

        Raises:
            ConfigError: if the file does not have both markers.
        """
        text = (root / self.path).read_text()
        before, found, rest = text.partition(f"{self.begin}\n")
        between, closed, after = rest.partition(f"{self.end}\n")
        if not (found and closed):
            raise ConfigError.of(
                "markers", self.path, f"a file with the lines {self.begin!r} and {self.end!r}"
            )
        return before + found, between, closed + after

    def write(self, root: Path) -> None:
        """Write the generated text to the file; the rest of the file does not change."""
        before, _, after = self.parts(root)
        write_atomically(root / self.path, f"{before}{self.build()}\n{after}".encode())

    def report(self, root: Path) -> str | None:
        """Describe in one line which rows are missing, outdated or extra; None if none are."""
        old = self._rows(self.parts(root)[1])
        new = self._rows(self.build())
        found = {
            "missing": [name for name in new if name not in old],
            "stale": [name for name in new if name in old and old[name] != new[name]],
            "left over": [name for name in old if name not in new],
        }
        told = [f"{kind}: {', '.join(names)}" for kind, names in found.items() if names]
        if not told:
            return None
        return f"{self.path}, {self.title}: {'; '.join(told)}; run make tables to write it again"

    def _rows(self, text: str) -> dict[str, str]:
        return {match[1]: line for line in text.splitlines() if (match := self.row.match(line))}


TEXTS = (
    GeneratedText(
        path="README.md",
        title="table of strategies",
        begin="<!-- strategies, by make tables -->",
        end="<!-- end of strategies -->",
        row=re.compile(r"\| `(\w+)`"),
        build=lambda: markdown(cards()),
    ),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write or report every generated text of the project in the current folder."""
    parser = argparse.ArgumentParser(prog="python -m perdure.experiment.tables")
    parser.add_argument("--report", action="store_true", help="change nothing, say what is stale")
    report = parser.parse_args(arguments).report
    for text in TEXTS:
        if not report:
            text.write(Path())
        elif line := text.report(Path()):
            sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    try:
        main()
    except PerdureError as error:
        sys.exit(str(error))
