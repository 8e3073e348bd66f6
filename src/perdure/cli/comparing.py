"""The command `perdure compare`: a table of the arms of finished runs over their seeds."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from perdure.errors import ConfigError

PICTURES = (".svg", ".png")


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...")],
    metric: Annotated[
        str, typer.Option(help="Metric of the ranks, the differences and the picture.")
    ] = "average_accuracy",
    baseline: Annotated[
        str | None,
        typer.Option(help="Arm that all others are compared with; default: all pairs."),
    ] = None,
    confidence: Annotated[
        float, typer.Option(help="Confidence of the intervals, between 0 and 1.")
    ] = 0.95,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write all metrics as CSV.")] = None,
    latex: Annotated[
        Path | None, typer.Option("--latex", help="Write the printed tables as LaTeX.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write all metrics and seeds as JSON.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw a picture, as .svg or .png.")
    ] = None,
) -> None:
    """Compare the arms of finished runs over their seeds.

    RUN is the folder of a run; give one with several seeds or arms, or several runs on the same
    stream. The first table has mean and standard error of every arm over its seeds. The second has
    the differences of the arms at the same seeds, with the intervals of a paired t-test, in bold
    where 0 lies outside.
    """
    from perdure.cli.consoles import wide_console
    from perdure.experiment.comparison import compare as compare_runs
    from perdure.report import comparison_picture, comparison_tables, terminal_table
    from perdure.report import latex as as_latex
    from perdure.utils.atomic_files import write_atomically

    if plot is not None and plot.suffix not in PICTURES:
        raise ConfigError.of("--plot", str(plot), f"a file that ends in {' or '.join(PICTURES)}")
    found = compare_runs(*runs, confidence=confidence, baseline=baseline)
    grids = comparison_tables(found, metric)
    contents: dict[Path | None, Callable[[], str]] = {
        csv: found.to_csv,
        json: found.to_json,
        latex: lambda: as_latex(grids),
    }
    files = {path: write().encode() for path, write in contents.items() if path is not None}
    if plot is not None:
        picture = comparison_picture(found, metric)
        files[plot] = picture.png() if plot.suffix == ".png" else picture.svg().encode()
    for path, content in files.items():
        write_atomically(path, content)
    console = wide_console()
    for grid in grids:
        console.print(terminal_table(grid))
        console.print()
    for line in [*found.notes, *(f"written: {path}" for path in files)]:
        console.print(line, markup=False, highlight=False)
