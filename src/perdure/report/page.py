"""Report page of a finished run, as one self-contained HTML file.

The page has no scripts, loads nothing, and can be read on screen and on paper.
"""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from perdure.experiment.result_schema import Result, read_result
from perdure.report.absences import absences_section
from perdure.report.clients import clients_section
from perdure.report.figures import pictures
from perdure.report.findings import NAME as FINDING
from perdure.report.findings import findings_section
from perdure.report.groups import groups_section
from perdure.report.picture import Picture
from perdure.report.sections import answer, arms_table, facts, gallery, glossary
from perdure.report.statement import statement
from perdure.report.wording import count, seeds_in_words
from perdure.utils.atomic_files import write_atomically


def write_report(run: Path, *, figures: bool = False) -> Path:
    """Write `report.html` of a finished run and return its path.

    The same `result.json` gives the same bytes. The file is replaced as a whole, so nobody can read
    half a file.

    Guarantee: none. The page shows the contents of `result.json` and `config.toml`, and the images
    of the explanation file, whose inputs must be public.

    Args:
        run: folder of the run, with `result.json`; if it has a `config.toml`, the page shows it.
        figures: True to write the pictures of the page as files, too, as `write_figures` does; each
            is drawn once.

    Raises:
        RunError: if `result.json` is missing or has another schema, or if the explanations cannot
            be read.
    """
    result = read_result(run)
    config = run / "config.toml"
    quoted = config.read_text(encoding="utf-8") if config.is_file() else None
    page = run / "report.html"
    drawn = pictures(result, run)
    write_atomically(page, html(result, drawn, quoted).encode())
    if figures:
        _write_files(run, drawn)
    return page


def write_figures(run: Path) -> list[Path]:
    """Write every figure of a finished run to `figures/`, as SVG and as PNG, and return the paths.

    Args:
        run: folder of the run, with `result.json`.

    Raises:
        RunError: if `result.json` is missing or has another schema, or if the explanations cannot
            be read.
    """
    return _write_files(run, pictures(read_result(run), run))


def _write_files(run: Path, drawn: Sequence[Picture]) -> list[Path]:
    folder = run / "figures"
    written = {}
    for picture in drawn:
        written[folder / f"{picture.name}.svg"] = picture.svg().encode()
        written[folder / f"{picture.name}.png"] = picture.png()
    for path, content in written.items():
        write_atomically(path, content)
    return list(written)


def html(result: Result, drawn: Sequence[Picture], config: str | None) -> str:
    """Return the HTML page as text.

    Args:
        result: checked result of the run.
        drawn: pictures in their order on the page.
        config: text of the configuration file, if there is one.
    """
    shown = [picture for picture in drawn if not picture.name.startswith(FINDING)]
    examined = any("findings" in arm for arm in result["arms"])
    groups = groups_section(result)
    clients = clients_section(result)
    absent = absences_section(result)
    sections = (
        ("answer", "The answer", answer(result)),
        ("arms", "All arms", arms_table(result)),
        ("pictures", "Pictures", gallery(result, shown)),
        *([("findings", "Findings", findings_section(result, drawn))] if examined else []),
        *([("groups", "Groups", groups)] if groups else []),
        *([("clients", "Clients", clients)] if clients else []),
        *([("absences", "Missing clients", absent)] if absent else []),
        ("privacy", "Privacy statement", statement(result)),
        ("run", "Settings of the run", facts(result, config)),
        ("words", "Words", glossary(result["task"])),
    )
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 '
        f'id="{name}-title">{title}</h2>\n{inside}\n</section>'
        for name, title, inside in sections
    )
    return _PAGE.format(
        name=escape(result["name"]), style=_style(), lead=_lead(result), links=links, body=body
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{name}: perdure run report</title>
<style>
{style}</style>
</head>
<body>
<header>
<p class="brand">perdure · run report</p>
<h1>{name}</h1>
<p class="lead">{lead}</p>
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{body}
</main>
</body>
</html>
"""


def _style() -> str:
    return files("perdure.report").joinpath("page.css").read_text(encoding="utf-8")


def _lead(result: Result) -> str:
    stream = result["stream"]
    federation = result["federation"]
    clients = (
        f" over {federation['clients']} federated clients"
        if federation and "clients" in federation
        else ""
    )
    told = (
        f"{stream['name']}, {stream['scenario']}-incremental in "
        f"{count(stream['experiences'], 'experience')}{clients}; "
        f"{count(len(result['arms']), 'arm')}, {seeds_in_words(result['seeds'])}"
    )
    return escape(told)
