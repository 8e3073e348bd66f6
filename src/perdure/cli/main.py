"""The command `perdure` and its options.

The code of a command is imported only when it runs, so help needs no torch, and no rich.
"""

import json
import sys
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perdure.cli import export as export_cli
from perdure.cli import ledger as ledger_cli
from perdure.cli.attacking import attack
from perdure.cli.command_group import CommandGroup
from perdure.cli.comparing import compare
from perdure.cli.consoles import complain, resumable, wide_console
from perdure.cli.doctor import doctor, heal_run, print_below
from perdure.cli.explaining import explain
from perdure.cli.federation_app import app as federation_app
from perdure.cli.local_modules import local_modules
from perdure.cli.predicting import predict
from perdure.cli.tuning import tune
from perdure.errors import ConfigError, PerdureError

if TYPE_CHECKING:
    pass

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Continual, federated and private learning in one run.

First steps:

`perdure demo` runs the built-in experiment and writes runs/demo/report.html.

`perdure demo --show-config > mine.toml` gives you its config to change; `perdure run mine.toml` \
runs it.

`perdure doctor mine.toml` looks for mistakes before training, and names their remedies.

`perdure compare runs/mine` compares its arms over the seeds, and several runs with each other.

`perdure tune mine.toml` searches for better settings, as its table [search] says.

`perdure config --reference` prints every key that a config may have.

`perdure attack runs/mine --eps 0.1` attacks the inputs of its models: their robust accuracy.

`perdure explain runs/mine` explains answers of its model: what each feature contributes.

`perdure audit mine.toml` attacks its private arms, and compares the results with their epsilons.

`perdure strategies` lists the strategies, and the cost of each in privacy and memory.

`perdure ledger show runs/demo` lists all uses of private records, and the \
epsilon that follows.

To continue a stopped run, give the same command again.""",
)

app.add_typer(ledger_cli.app, name="ledger")
app.add_typer(federation_app, name="app")
app.command()(export_cli.export)
app.command()(attack)
app.command()(compare)
app.command()(doctor)
app.command()(explain)
app.command()(predict)
app.command()(tune)

RAN_AWAY = 1
"""Exit code of `perdure run` if some training diverged; the result has the other trainings."""

Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run; default runs/NAME.")]


@app.command()
def run(
    config: Path,
    out: Out = None,
    seeds: Annotated[
        str | None,
        typer.Option("--seeds", help="Seeds with commas, as 0,1,2; they replace those of CONFIG."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", help="Engine of the federation: inprocess or ray."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="Device of models and records, as cpu or cuda."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option("--processes", help="Processes on this machine that divide every batch."),
    ] = None,
    heal: Annotated[
        bool,
        typer.Option("--heal", help="Run again with the remedies of the doctor's findings."),
    ] = False,
    restarts: Annotated[
        int | None, typer.Option("--restarts", help="With --heal: most restarts; 3 if left out.")
    ] = None,
    total_epsilon: Annotated[
        float | None,
        typer.Option("--total-epsilon", help="With --heal: budget of all runs with privacy."),
    ] = None,
) -> None:
    """Run the experiment that CONFIG describes; a stopped run continues.

    CONFIG is a TOML file; `perdure demo --show-config` prints an example, and `perdure config
    --reference` lists all its keys. Modules that CONFIG names may be in the current folder. Exit
    code 1 if some training diverged; the result has the other trainings.

    Findings of the doctor are printed at the end. With `--heal` the run is examined in full, and
    restarted with the remedies, one cause at a time, in the folder NAME-healed beside the first.
    Under privacy each restart is charged, so it needs `--total-epsilon`.
    """
    if not heal:
        for name, value in (("--restarts", restarts), ("--total-epsilon", total_epsilon)):
            if value is not None:
                raise ConfigError.of(name, value, "only together with --heal")
    with resumable(), local_modules():
        from perdure.experiment.config import read_text
        from perdure.experiment.overrides import overridden

        source = str(config)
        text = read_text(config)
        text = overridden(
            text,
            source=source,
            seeds=seeds,
            engine=engine,
            device=device,
            processes=processes,
        )
        if heal:
            heal_run(source, text, out, restarts=restarts, total_epsilon=total_epsilon)
        else:
            _run(source, text, out)


@app.command("config")
def show_config(
    config: Annotated[Path | None, typer.Argument(help="A TOML file to check.")] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Print all keys that a config may have.")
    ] = False,
    table: Annotated[
        str | None,
        typer.Option("--table", help="With --reference: one table only, as training."),
    ] = None,
) -> None:
    """Check CONFIG without running it, or print every key with type, default and meaning.

    The check loads the data and refuses all that `perdure run` refuses before its first training,
    with the same line. A config that is right is answered with its trainings, one line each.
    """
    if (config is None) != reference:
        raise ConfigError.of("config", config, "a TOML file, or --reference without a file")
    if reference:
        from perdure.experiment.reference import reference_text

        sys.stdout.write(reference_text(table))
        return
    if table is not None:
        raise ConfigError.of("--table", table, "only together with --reference")
    with local_modules():
        from perdure.experiment.config import read
        from perdure.experiment.run_checks import checked_stream
        from perdure.experiment.trained_models import trials

        checked = read(str(config))
        checked_stream(checked)
        for name in trials(checked):
            sys.stdout.write(f"{name}\n")


@app.command()
def demo(
    out: Out = None,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print the demo's config and stop.")
    ] = False,
) -> None:
    """Run the built-in example: digits in five experiences over ten clients.

    It trains four strategies, without and with differential privacy.
    """
    text = resources.files("perdure.experiment").joinpath("demo.toml").read_text()
    if show_config:
        sys.stdout.write(text)
        return
    with resumable():
        _run("demo", text, out)


@app.command()
def report(run: Path) -> None:
    """Print the table of a finished run and write its report.html again.

    RUN is the folder of the run, such as runs/demo.
    """
    from perdure.experiment.result_schema import read_result
    from perdure.report import write_report
    from perdure.report.table import table

    console = wide_console()
    result = read_result(run)
    console.print(table(result))
    print_below(console, result)
    console.print(f"report: {write_report(run)}")


@app.command()
def audit(
    config: Path,
    canaries: Annotated[
        int, typer.Option(help="Planted records; each is in the data with probability 1/2.")
    ] = 1000,
    confidence: Annotated[
        float, typer.Option(help="Confidence of the lower bound, between 0 and 1.")
    ] = 0.99,
    shadows: Annotated[
        int,
        typer.Option(help="Shadow models per arm, to attack the models of a finished run, too."),
    ] = 0,
    replay: Annotated[
        bool,
        typer.Option("--replay", help="Run each private arm with and without one record instead."),
    ] = False,
    record: Annotated[
        int | None, typer.Option(help="With --replay: id of the record; default the first one.")
    ] = None,
) -> None:
    """Audit the private arms of CONFIG: compare a lower bound on epsilon with the claimed epsilon.

    CONFIG is a TOML file, or the folder of a run. The arms are trained again, with planted records
    (canaries) and simulated noise; no file is changed. Exit code 1 if a lower bound is above its
    claim. With `--shadows 8` and the folder of a finished run, its final models are attacked, too:
    LiRA guesses which records of the first experience were in training.

    With `--replay` there are no canaries: every private arm runs on its data, and again without one
    record, with the released answers of the first run. The table shows how much the record changes
    each exact sum, divided by the charged sensitivity. Exit code 1 if this is above 1, if another
    output differs, or if no ledger entry covers a draw of noise.
    """
    if record is not None and not replay:
        raise ConfigError.of("--record", record, "only together with --replay")
    if replay and shadows:
        raise ConfigError.of("--shadows", shadows, "only without --replay")
    with local_modules():
        if replay:
            _replay(config, record)
        _audit(config, canaries, confidence, shadows)


@app.command()
def strategies(
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List every strategy: paper, use of private data, memory, and support of vmap.

    The costs are read from the strategies themselves.
    """
    from perdure.experiment.strategy_catalogue import cards, table

    listed = cards()
    if as_json:
        sys.stdout.write(json.dumps([asdict(row) for row in listed], indent=2) + "\n")
    else:
        wide_console().print(table(listed))


def _replay(path: Path, record: int | None) -> None:
    """Replay a config, print a table, and end the command."""
    from perdure.experiment.config import read
    from perdure.experiment.replays import replay_run
    from perdure.report.replay_table import findings, replay_table

    config = read(path / "config.toml" if path.is_dir() else path)
    results = replay_run(config, record=record)
    console = wide_console()
    console.print(replay_table(config, results))
    for line in findings(results):
        console.print(line, markup=False, highlight=False)
    raise typer.Exit(int(not all(result.holds for result in results.values())))


def _audit(config: Path, canaries: int, confidence: float, shadows: int) -> None:
    """Audit the private arms of a config, print the results, and end the command."""
    from perdure.experiment.audits import audit_run
    from perdure.experiment.config import read

    if shadows and not config.is_dir():
        raise ConfigError.of(
            "--shadows",
            shadows,
            f"only with the folder of a finished run, such as runs/demo, not {config}",
        )
    console = wide_console()
    results = audit_run(
        read(config / "config.toml" if config.is_dir() else config),
        canaries=canaries,
        confidence=confidence,
    )
    for arm, result in results.items():
        console.print(f"{arm}: {result}", highlight=False)
    if shadows:
        from perdure.experiment.audits import attack_run
        from perdure.learner.progress import display

        with display(console) as progress:
            attacks = attack_run(config, shadows=shadows, progress=progress)
        for arm, attack in attacks.items():
            console.print(f"{arm}: {attack}", highlight=False)
    raise typer.Exit(int(any(result.flagged for result in results.values())))


def _run(source: str, text: str, out: Path | None) -> None:
    from perdure.experiment.config import parse
    from perdure.experiment.run import run as run_config
    from perdure.learner.progress import display
    from perdure.report import write_report
    from perdure.report.table import table

    config = parse(text, source=source)
    folder = out or Path("runs") / config.name
    console = wide_console()
    with display(console) as progress:
        result = run_config(config, text, folder, progress, examine="quick")
    page = write_report(folder, figures=True)
    console.print(table(result))
    print_below(console, result)
    console.print(f"report: {page}")
    failures = [each for arm in result["arms"] for each in arm["failures"]]
    for each in failures:
        console.print(f"{each['trial']} diverged: {each['failure']}", markup=False, highlight=False)
    if failures:
        raise typer.Exit(RAN_AWAY)


def main() -> None:
    """Run the command line; an error of perdure becomes one line and exit code 2."""
    try:
        app(prog_name="perdure")
    except PerdureError as error:
        complain(str(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
