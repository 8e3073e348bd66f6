"""Code of the command `perdure ledger clients`: epsilons that the clients of a server reported."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import typer
from rich import box
from rich.table import Table

from perdure.cli.consoles import wide_console
from perdure.errors import RunError
from perdure.federated.reported_accounts import reported_accounts
from perdure.privacy.ledger import Statement
from perdure.report.ledger_tables import finite
from perdure.report.wording import epsilon_number

REPORTED = (
    "as the clients reported it with their last replies; the ledgers themselves are at the sites, "
    "where `perdure ledger verify` checks them"
)


@dataclass(frozen=True, kw_only=True)
class Reported:
    """Epsilon that a client has reported.

    Args:
        arm: name of the arm; "" for a run without arms.
        client: number of the client.
        exchange: exchange of its last reply.
        lost: number of ledgers that the client lost; their charges are included.
        statement: epsilon of its worst record, with everything that it needs.
    """

    arm: str
    client: int
    exchange: int
    lost: int
    statement: Statement


def show_clients(run: Path, *, as_json: bool) -> None:
    """Print the epsilon of every client of a server's run, and end the command."""
    rows = list(_rows(run))
    if not rows:
        raise RunError(
            f"{run} has no client with a reported epsilon; allowed: the folder of a run with "
            "[federation] and private arms, on the server; give that folder, or use `perdure "
            "ledger show` for ledgers on this machine"
        )
    if as_json:
        facts = [asdict(row) | {"statement": finite(asdict(row.statement))} for row in rows]
        typer.echo(json.dumps(facts, indent=1, allow_nan=False))
        return
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("arm", "client", "last exchange", "lost ledgers", "epsilon"):
        drawn.add_column(name, justify="left" if name == "arm" else "right", overflow="fold")
    for row in rows:
        numbers = (row.client, row.exchange, row.lost)
        drawn.add_row(row.arm, *map(str, numbers), epsilon_number(row.statement.epsilon))
    wide_console().print(drawn)
    worst = max(rows, key=lambda row: row.statement.epsilon)
    typer.echo(f"worst, client {worst.client}: {worst.statement}")
    typer.echo(REPORTED)


def _rows(run: Path) -> Iterator[Reported]:
    for folder in (run, *sorted(run.glob("arms/*"))):
        for client, (exchange, account) in reported_accounts(folder).items():
            yield Reported(
                arm="" if folder == run else folder.name,
                client=client,
                exchange=exchange,
                lost=account.lost,
                statement=account.statement(),
            )
