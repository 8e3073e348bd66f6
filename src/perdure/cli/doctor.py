"""The command `perdure doctor`, and the findings and restarts of `perdure run`."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perdure.cli.consoles import wide_console
from perdure.cli.local_modules import local_modules

if TYPE_CHECKING:
    from rich.console import Console

    from perdure.experiment.result_schema import FindingResult, Result

FOUND = 1
"""Exit code of `perdure doctor` with findings."""


def doctor(
    config: Path,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Leave out the rules that train copies of the model."),
    ] = False,
) -> None:
    """Examine every arm of CONFIG before training: data, wiring, privacy and learning rate.

    CONFIG is a TOML file, or the folder of a run. Nothing is trained but copies of the model, for a
    few steps, and no file is written. With a private arm no training record is read: findings
    depend on declared facts, synthetic records and public test records. Exit code 1 with findings.
    """
    with local_modules():
        from perdure.experiment.config import read
        from perdure.experiment.examinations import examine_run
        from perdure.experiment.finding_rows import rows_by_arm

        checked = read(config / "config.toml" if config.is_dir() else config)
        found = rows_by_arm(examine_run(checked, trials=not quick))
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    elif any(found.values()):
        print_findings(wide_console(), found)
    else:
        left_out = " of the rules that train nothing; leave out --quick for all rules"
        wide_console().print(f"no findings{left_out if quick else ''}")
    raise typer.Exit(FOUND if any(found.values()) else 0)


def print_findings(console: "Console", found: Mapping[str, Sequence["FindingResult"]]) -> None:
    """Print a table of the findings of every arm; nothing if there are none."""
    if any(found.values()):
        from perdure.report import findings_table

        console.print(findings_table(found))


def print_below(console: "Console", result: "Result") -> None:
    """Print the lines below the table of a result: groups, clients and findings, if it has any."""
    from perdure.report import groups_table
    from perdure.report.absences import absence_lines
    from perdure.report.clients import client_lines

    groups = groups_table(result)
    if groups is not None:
        console.print(groups)
    for line in (*client_lines(result), *absence_lines(result)):
        console.print(line, markup=False)
    print_findings(console, {arm["name"]: arm.get("findings", []) for arm in result["arms"]})


def heal_run(
    source: str,
    text: str,
    out: Path | None,
    *,
    restarts: int | None,
    total_epsilon: float | None,
) -> None:
    """Run a config, restart it with the remedies of its findings, and print what they changed.

    Args:
        source: name of the config's file.
        text: TOML text of the config.
        out: folder of the first run; None for runs/NAME.
        restarts: largest number of restarts; None for the default.
        total_epsilon: budget of all runs together, under privacy.
    """
    from perdure.experiment.config import parse
    from perdure.experiment.healing import RESTARTS, heal
    from perdure.experiment.result_schema import read_result
    from perdure.learner.progress import display
    from perdure.report import healing_table, write_report
    from perdure.report.table import table

    folder = out or Path("runs") / parse(text, source=source).name
    console = wide_console()
    with display(console) as progress:
        outcome = heal(
            text,
            folder,
            source=source,
            restarts=RESTARTS if restarts is None else restarts,
            total_epsilon=total_epsilon,
            progress=progress,
            told=lambda line: console.print(line, markup=False, highlight=False),
        )
    for each in outcome.folders:
        write_report(each, figures=True)
    best = read_result(outcome.best)
    console.print(table(best))
    print_findings(console, {arm["name"]: arm.get("findings", []) for arm in best["arms"]})
    if outcome.restarts:
        console.print(healing_table(outcome.restarts))
    else:
        console.print("no restart: no finding has a remedy that a setting applies")
    for rule, reason in outcome.refused.items():
        console.print(f"not applied, {rule}: {reason}", markup=False, highlight=False)
    console.print(f"best run: {outcome.best}; config: {outcome.best / 'config.toml'}")
    console.print(f"report: {outcome.best / 'report.html'}")
