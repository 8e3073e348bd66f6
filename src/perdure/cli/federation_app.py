"""Commands `perdure app new` and `perdure app check`: deployments with Flower."""

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from perdure.cli.command_group import CommandGroup
from perdure.cli.local_modules import local_modules

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Deploy a federation with Flower: one server, and sites that keep their records.

`perdure app new DIR` writes a Flower app with scripts for the server and the sites, and a README \
that says what to run where.""",
)


@app.command()
def new(
    folder: Annotated[Path, typer.Argument(help="Folder of the app: new, or empty.")],
    config: Annotated[
        Path | None,
        typer.Option("--config", help="TOML file with a table [federation]; default: an example."),
    ] = None,
) -> None:
    """Write a Flower app that trains CONFIG on a server and its sites.

    `perdure run CONFIG` on one machine gives the same result, with `--engine ray`, too.
    """
    from perdure.deployment import new_app
    from perdure.experiment.config import read_text

    example = resources.files("perdure.deployment") / "template" / "example.toml"
    text = example.read_text(encoding="utf-8") if config is None else read_text(config)
    with local_modules():
        for path in new_app(folder, text, source=str(config or "the example")):
            typer.echo(f"written: {path}")
    typer.echo(f"next: follow {folder / 'README.md'}")


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="Folder of the app, as `app new` writes it.")],
    address: Annotated[str, typer.Argument(help="HOST:PORT of the SuperLink.")],
    authority: Annotated[
        Path | None, typer.Option(help="Certificate of the server; default site/keys/ca.crt.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="Private key of this site; default site/keys/node.")
    ] = None,
) -> None:
    """Check on a site that the SuperLink can be reached, and accepts this site's key.

    It tries address, certificate and key within seconds, before the SuperNode is started. Exit code
    2 with one line that names the wrong part, where Flower would try again for ever.
    """
    from perdure.deployment import check_site

    keys = folder / "site" / "keys"
    check_site(address, authority=authority or keys / "ca.crt", key=key or keys / "node")
    typer.echo(f"{address} accepts this site; start scripts/start_supernode.py")
