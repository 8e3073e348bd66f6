"""The documents that readers follow, and the code blocks in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").rglob("*.md")))


def blocks(page: Path, kind: str) -> list[str]:
    """Text of every block of a kind, such as `python`, in the order of the page."""
    found = re.findall(rf"^( *)```{kind}[^\n]*\n(.*?)^\1```", page.read_text(), re.S | re.M)
    return [block for _, block in found]


def name(page: Path) -> str:
    """Path of a page in the project."""
    return str(page.relative_to(ROOT))
