"""Ledgers that a run's folder should hold, by its checkpoints and its config.

A ledger that is gone, with all that lies beside it, is seen by nothing in its own folder. The
checkpoint of a federation's server knows the ledgers of its clients, a learner's checkpoint its
own, and a finished arm has one for every client of the config.
"""

from collections.abc import Callable, Collection
from pathlib import Path

from perdure.cli.run_facts import RunFacts
from perdure.learner.folder_claims import LEDGER, client_folder, known_ledgers
from perdure.privacy.ledger.storage import Anchor


def anchors_below(run: Path) -> dict[Path, list[Anchor]]:
    """Return ledgers to the heads that checkpoints in or below a folder know of them.

    Raises:
        LedgerError: for a head that is damaged.
        RunError: for a checkpoint that cannot be read.
    """
    found: dict[Path, list[Anchor]] = {}
    places = [run, *sorted(run.glob("arms/*"))]
    for place in places:
        for folder in (place, *sorted(place.glob("clients/*"))):
            for path, anchors in known_ledgers(folder).items():
                found.setdefault(path, []).extend(anchors)
    return found


def of_finished_arms(home: Path, config: RunFacts | None) -> dict[str, Path]:
    """Return the owners that finished private arms have by their config, and their ledgers."""
    expected: dict[str, Path] = {}
    finished = (home / "result.json").exists()
    clients = config.clients if config else 0
    for name in config.private_arms if config else ():
        folder = home / "arms" / name
        if not (finished or (folder / "arm.json").exists()):
            continue
        if not clients:
            expected[f"{name}/client-0"] = folder / LEDGER
        for client in range(clients):
            expected[f"{name}/client-{client}"] = client_folder(folder, client) / LEDGER
    return expected


def absent(
    run: Path, home: Path, config: RunFacts | None, there: Callable[[Path], bool]
) -> dict[str, str]:
    """Return the ledgers that should be there and are not: file to who knows of it.

    Args:
        run: folder that was asked for.
        home: folder of the whole run.
        config: of the run, where there is one.
        there: whether a file, or what tells of it, is there.
    """
    expected = {path: f"{owner} finished" for owner, path in of_finished_arms(home, config).items()}
    for path, anchors in anchors_below(run).items():
        expected[path.resolve()] = f"{anchors[0].where} knows it"
    inside = run.resolve()
    return {
        str(path): why
        for path, why in expected.items()
        if path.is_relative_to(inside) and not there(path)
    }


def left_out(held: Collection[str], home: Path, config: RunFacts | None) -> dict[str, str]:
    """Return the owners that a run's merged file should hold and does not, to who knows of them."""
    return {
        f"the ledger of {owner!r} in the merged file": "its config has it"
        for owner in of_finished_arms(home, config)
        if owner not in held
    }
