"""Command-line options of `perdure ledger show`, `clients`, `head`, `verify` and `project`.

The code of these commands is in `ledger_commands` and `client_accounts`, which are imported only
when one runs, so help needs no torch.
"""

from pathlib import Path
from typing import Annotated

import typer

from perdure.cli.command_group import CommandGroup

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Show the privacy that a run spent, and verify its ledger.

RUN is the folder of a run, finished or not, or a ledger file.""",
)

Run = Annotated[Path, typer.Argument(help="Folder of a run, finished or not, or a ledger file.")]
Delta = Annotated[
    float | None,
    typer.Option(
        help="Delta of every epsilon; default: delta of the run, or 1e-5 if the run has none."
    ),
]
Names = list[str] | None


@app.command()
def show(
    run: Run,
    delta: Delta = None,
    arm: Annotated[Names, typer.Option(help="Only this arm; may be given again.")] = None,
    owner: Annotated[
        Names, typer.Option(help="Only this owner, ARM/client-N; may be given again.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead; null is an infinite epsilon.")
    ] = False,
) -> None:
    """Show the charges of every partition, and the epsilon that follows from them."""
    from perdure.cli import ledger_commands

    ledger_commands.show(run, delta=delta, arm=arm or (), owner=owner or (), as_json=as_json)


@app.command()
def clients(
    run: Annotated[Path, typer.Argument(help="Folder of a server's run, finished or not.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead; null is an infinite epsilon.")
    ] = False,
) -> None:
    """Show the epsilon that each client of a federation has reported to its server.

    The server has no ledger of a site, but every reply tells it the charges.
    """
    from perdure.cli import client_accounts

    client_accounts.show_clients(run, as_json=as_json)


@app.command()
def head(run: Run) -> None:
    """Print the head of every ledger, one line each, for a privacy officer's records.

    Store the lines where users of the run cannot write. Later they show if a ledger was replaced by
    an older copy: see `perdure ledger verify --at-least`.
    """
    from perdure.cli import ledger_commands

    ledger_commands.head(run)


@app.command()
def verify(
    run: Run,
    at_least: Annotated[
        Names,
        typer.Option(
            "--at-least",
            help="A line that `perdure ledger head` printed before: the ledger must continue from "
            "it. May be given again.",
        ),
    ] = None,
) -> None:
    """Check every hash chain, every head whose key is available, and every stored copy of a head.

    The log of draws beside each key is checked in the same way.

    Exit code 1 if a chain, head or copy is wrong, with file and line; 3 if nothing is wrong, but
    the key of a head is missing, so that the whole history could be forged.
    """
    from perdure.cli import ledger_commands

    ledger_commands.verify(run, at_least=at_least or ())


@app.command()
def project(
    run: Run,
    noise_multiplier: Annotated[
        float, typer.Option(help="Standard deviation of the noise over the clip norm.")
    ],
    sampling_rate: Annotated[
        float, typer.Option(help="Probability that a record is in a step; 1 for no sampling.")
    ],
    steps: Annotated[int, typer.Option(help="Number of further steps.")],
    partition: Annotated[
        Names, typer.Option(help="Only this partition, OWNER/PARTITION; may be given again.")
    ] = None,
    delta: Delta = None,
) -> None:
    """Compute the epsilon of every partition after further steps. Nothing is written."""
    from perdure.cli import ledger_commands

    ledger_commands.project(
        run,
        noise_multiplier=noise_multiplier,
        sampling_rate=sampling_rate,
        steps=steps,
        partition=partition or (),
        delta=delta,
    )
