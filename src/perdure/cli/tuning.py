"""The command `perdure tune`: search for the best settings of a config."""

from pathlib import Path
from typing import Annotated

import typer

from perdure.cli.consoles import resumable, wide_console
from perdure.cli.local_modules import local_modules
from perdure.errors import ConfigError

FOLDER = "{}-search"
"""Name of the default folder of a search, from the name of the config."""


def tune(
    config: Path,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the search; default runs/NAME-search.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", help="Number of trials; default search.trials.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option("--sampler", help="tpe, cmaes, nsga2 or random.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the search.")] = None,
    workers: Annotated[
        int, typer.Option("--workers", help="Processes that train; trials are drawn together.")
    ] = 1,
    apply: Annotated[
        Path | None, typer.Option("--apply", help="Write the config with the best values here.")
    ] = None,
) -> None:
    """Search for the best settings of CONFIG, as its table [search] says; a stopped search goes on.

    Each trial trains one arm with other settings, on the first experiences of the stream, and is
    measured on records that the run's test does not use. The config with the best values is
    best.toml in the folder of the search.

    A private arm needs `privacy = "charge_all"`, which charges and shows every training, or
    `"select"`, which releases the best of a secret number of trainings and nothing else. The
    epsilon of the search is printed before its first training.
    """
    with local_modules():
        from perdure.experiment.config import read, read_text
        from perdure.experiment.config_searches import tune_run
        from perdure.experiment.searches import SAMPLERS
        from perdure.report import front_picture, search_table
        from perdure.utils.atomic_files import write_atomically

        checked = read(config)
        search = checked.search
        selects = search is not None and search.privacy == "select"
        if apply is not None and selects:
            allowed = 'only without privacy = "select", whose cost another run would not count'
            raise ConfigError.of("--apply", str(apply), allowed)
        if sampler is not None and sampler not in SAMPLERS:
            raise ConfigError.of("--sampler", sampler, SAMPLERS)
        folder = out or Path("runs") / FOLDER.format(checked.name)
        console = wide_console()
        with resumable():
            found = tune_run(
                read_text(config),
                folder,
                source=str(config),
                trials=trials,
                sampler=sampler,
                seed=seed,
                workers=workers,
                told=lambda line: console.print(line, markup=False, highlight=False),
            )
        console.print(search_table(found))
        for line in found.remarks:
            console.print(line, markup=False, highlight=False)
        if len(found.goals) > 1:
            picture = front_picture(found)
            write_atomically(folder / "front.svg", picture.svg().encode())
            console.print(f"picture of the front: {folder / 'front.svg'}")
        if apply is not None:
            write_atomically(apply, (folder / "best.toml").read_bytes())
        if not selects:
            console.print(f"config with the best values: {apply or folder / 'best.toml'}")
