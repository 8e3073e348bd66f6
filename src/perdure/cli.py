"""The command `perdure`."""

import sys
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from perdure.errors import PerdureError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    help="""Continual, federated and private learning in one run.

**First steps**

`perdure demo` runs the built-in experiment and writes runs/demo/report.html.

`perdure demo --show-config > mine.toml` gives you its config to change; `perdure run mine.toml` runs it.

A run that was stopped goes on where it was: give the same command again.""",
)  # fmt: skip

Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run; default runs/NAME.")]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="TOML file; `perdure demo --show-config` prints an example.")],
    out: Out = None,
) -> None:
    """Run the experiment that CONFIG describes, or go on with it."""
    from perdure.config import read

    parsed = read(config)
    _run(parsed.name, config.read_text(), out)


@app.command()
def demo(
    out: Out = None,
    show_config: Annotated[bool, typer.Option("--show-config", help="Print the demo's config and stop.")] = False,
) -> None:
    """Digits in five experiences over ten clients: four strategies, without and with differential privacy."""
    text = resources.files("perdure").joinpath("demo.toml").read_text()
    if show_config:
        sys.stdout.write(text)
        return
    _run("demo", text, out)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Folder of a finished run, such as runs/demo.")]) -> None:
    """Print the table of a finished run and write its report.html again."""
    from perdure.report import write_report
    from perdure.report.result import read_result
    from perdure.report.table import table

    console = wide_console()
    console.print(table(read_result(run)))
    console.print(f"report: {write_report(run)}")


def _run(name: str, text: str, out: Path | None) -> None:
    from perdure.config import parse
    from perdure.report import write_figures, write_report
    from perdure.report.table import table
    from perdure.run import run as run_config

    folder, console = out or Path("runs") / name, wide_console()
    columns = (TextColumn("{task.description:16}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(arm: str, share: float) -> None:
            if arm not in tasks:
                tasks[arm] = bars.add_task(arm, total=1.0)
            bars.update(tasks[arm], completed=share)

        result = run_config(parse(text, source=name), text, folder, progress)
    page = write_report(folder)
    write_figures(folder)
    console.print(table(result))
    console.print(f"report: {page}")


def wide_console() -> Console:
    """A console that does not cut the table when its output goes to a file or pipe."""
    return Console(width=None if sys.stdout.isatty() else 120)


def main() -> None:
    """Entry point: an error that perdure raises on purpose is one line and exit code 2."""
    try:
        app()
    except PerdureError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"perdure: {error}", markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
