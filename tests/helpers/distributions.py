"""Distributions with modules and entry points on a path, as an installed wheel has."""

from pathlib import Path
from textwrap import dedent


def distribution(
    folder: Path, name: str, modules: dict[str, str], groups: dict[str, dict[str, str]]
) -> Path:
    """Lay out a distribution in a folder, which then only has to be on `sys.path`.

    Args:
        name: of the distribution.
        modules: file name to source text.
        groups: entry-point group to {name: "module:object"}.
    """
    for file, text in modules.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text), encoding="utf-8")
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = []
    for group, entries in groups.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder
