"""Checks that the run in a folder matches the run that is asked for now."""

from pathlib import Path

from perdure.errors import LedgerError, PrivacyError
from perdure.learner.checkpoint import Store
from perdure.privacy.ledger.anchors import private_copy
from perdure.privacy.ledger.storage import (
    RESTORE,
    Anchor,
    SealedHead,
    canonical_json,
    head_path,
)
from perdure.privacy.noise.draw_lines import DrawsHead

LEDGER = "ledger.jsonl"
HEAD = "ledger"
"""Key, in the facts of a checkpoint, of the ledger's head: its length and last hash."""
DRAWS = "draws"
"""Key, in the facts of a checkpoint, of the head of the log of draws."""


HEADS = "heads"
"""Key, in the facts of a federation server's checkpoint, of the heads of its clients' ledgers."""
ACCOUNTS = "accounts"
"""Key, in these facts, of the exchange and text of the last public account of each client."""
SERVER = "the checkpoint of the federation's server"


def client_folder(folder: Path, client: int) -> Path:
    """Folder in which a client of a run keeps checkpoints, ledger and keys."""
    return folder / "clients" / f"{client:03d}"


def known_ledgers(folder: Path) -> dict[Path, list[Anchor]]:
    """Return the ledgers that the checkpoints of a folder refer to, each with its recorded heads.

    They are the folder's own ledger and, for a server, the ledgers of its clients. Clients on other
    machines, whose folders are not below it, are left out.

    Raises:
        LedgerError: if a head is damaged.
        RunError: if a checkpoint cannot be read.
    """
    own = checkpoint_anchors(folder)
    found = {folder / LEDGER: own} if own else {}
    store = Store(folder)
    numbers = store.numbers() if (folder / "clients").is_dir() else []
    texts = store.facts(numbers[-1]).get(HEADS) if numbers else None
    for client, text in (texts if isinstance(texts, dict) else {}).items():
        head = SealedHead.parse(str(text), where=SERVER)
        found[client_folder(folder, int(client)) / LEDGER] = [Anchor(head, SERVER)]
    return found


def refuse_missing_ledgers(folder: Path) -> None:
    """Refuse to add up the ledgers of a folder if one that its checkpoints refer to is missing.

    Raises:
        LedgerError: names the missing ledgers.
    """
    missing = [str(path) for path in known_ledgers(folder) if not path.exists()]
    if missing:
        raise LedgerError(
            f"{', '.join(missing)} missing, but a checkpoint in {folder} refers to it; without "
            f"it, privacy that was already spent would not be counted; {RESTORE}"
        )


def checkpoint_anchors(folder: Path) -> list[Anchor]:
    """Return the heads of the ledger in the complete checkpoints of a folder.

    Raises:
        LedgerError: if a head is damaged.
        RunError: if a checkpoint cannot be read.
    """
    store = Store(folder)
    found = (anchor_of(store.facts(number), number) for number in store.numbers())
    return [anchor for anchor in found if anchor is not None]


def anchor_of(facts: dict[str, object], number: int | None = None) -> Anchor | None:
    """Return the ledger's head in the facts of a checkpoint; None if it has none."""
    where = "the checkpoint" if number is None else f"checkpoint {number:06d}"
    head = facts.get(HEAD)
    if head is None:
        return None
    return Anchor(SealedHead.parse(canonical_json(head), where=where), where)


def draws_anchors(folder: Path) -> list[DrawsHead]:
    """Return the heads of the log of draws in the complete checkpoints of a folder.

    Raises:
        RunError: if a checkpoint cannot be read.
    """
    store = Store(folder)
    texts = [str(store.facts(number).get(DRAWS, "")) for number in store.numbers()]
    found = [DrawsHead.parse(text) for text in texts]
    return [head for head in found if head is not None]


def refuse_lost_key(folder: Path, anchors: list[Anchor]) -> None:
    """Refuse to create a new key if the folder has a ledger that an older key sealed.

    Raises:
        LedgerError: if the older key is missing.
    """
    copy = private_copy(folder).read()
    known = [*anchors, *([copy] if copy else [])]
    if known and not (folder / "private" / "key").exists():
        raise LedgerError(
            f"{folder / 'private' / 'key'} is missing, but {known[0].where} refers to a ledger "
            "with this key; restore private/ from a backup, or train a new model in another folder"
        )


def refuse_other_privacy(folder: Path, *, private: bool) -> None:
    """Refuse to continue with privacy a run without privacy, or the reverse.

    Raises:
        PrivacyError: if only one of the two runs has privacy; names the file that shows it.
        RunError: if a checkpoint cannot be read.
    """
    numbers = Store(folder).numbers()
    sealed = Store(folder).facts(numbers[-1]).get(HEAD) if numbers else None
    if private and numbers and sealed is None:
        raise PrivacyError(
            f"{folder} has a run without privacy, so its model was trained on the records without "
            "noise and cannot continue with privacy; train a new model in another folder"
        )
    ledger = folder / LEDGER
    traces = [ledger, head_path(ledger), private_copy(folder).path, folder / "private" / "key"]
    found = next((path for path in traces if path.exists()), None)
    if not private and (found or sealed is not None):
        told = f"{found.relative_to(folder)} is there" if found else "its checkpoint has a ledger"
        raise PrivacyError(
            f"{folder} has a run with privacy ({told}), but privacy=None was given, and epsilon "
            "would not hold for its model any more; give the same privacy, or another folder"
        )
