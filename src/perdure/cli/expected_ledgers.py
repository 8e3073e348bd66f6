"""Ledgers that a run's folder should contain, according to its checkpoints and its config.

If a ledger is missing with its whole folder, no file next to it can show this. But the checkpoint
of a federation's server refers to the ledgers of its clients, the checkpoint of a learner to its
own ledger, and a finished arm must have one ledger per client of the config.
"""

from collections.abc import Callable, Collection
from pathlib import Path

from perdure.cli.run_facts import RunFacts
from perdure.learner.folder_claims import LEDGER, client_folder, known_ledgers
from perdure.privacy.ledger.storage import Anchor


def anchors_below(run: Path) -> dict[Path, list[Anchor]]:
    """Return the heads of ledgers that checkpoints in or below a folder record, by ledger file.

    Raises:
        LedgerError: if a head is damaged.
        RunError: if a checkpoint cannot be read.
    """
    found: dict[Path, list[Anchor]] = {}
    places = [run, *sorted(run.glob("arms/*"))]
    for place in places:
        for folder in (place, *sorted(place.glob("clients/*"))):
            for path, anchors in known_ledgers(folder).items():
                found.setdefault(path, []).extend(anchors)
    return found


def of_finished_arms(home: Path, config: RunFacts | None) -> dict[str, Path]:
    """Return the ledger files that finished private arms must have, by the ledger's owner."""
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
    """Return the ledgers that are missing, each with the reason why it must exist.

    Args:
        run: folder that the user gave.
        home: folder of the whole run.
        config: facts of the run's config; None if there is none.
        there: function that returns True if a ledger, or a file that replaces it, exists.
    """
    expected = {path: f"{owner} finished" for owner, path in of_finished_arms(home, config).items()}
    for path, anchors in anchors_below(run).items():
        expected[path.resolve()] = f"{anchors[0].where} refers to it"
    inside = run.resolve()
    return {
        str(path): why
        for path, why in expected.items()
        if path.is_relative_to(inside) and not there(path)
    }


def left_out(held: Collection[str], home: Path, config: RunFacts | None) -> dict[str, str]:
    """Return the owners that a run's merged ledger should contain and does not, with the reason."""
    return {
        f"the ledger of {owner!r} in the merged file": "its config has it"
        for owner in of_finished_arms(home, config)
        if owner not in held
    }
