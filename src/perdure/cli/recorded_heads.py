"""Recorded heads of ledgers, and their comparison with the ledgers that exist now."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from perdure.errors import ConfigError, PerdureError, PrivacyError
from perdure.learner.folder_claims import checkpoint_anchors, draws_anchors
from perdure.privacy.ledger.anchors import private_copy, state_copy, state_draws
from perdure.privacy.ledger.merged import Merged, Part
from perdure.privacy.ledger.storage import Anchor, SealedHead, head_path
from perdure.privacy.noise.draw_lines import compare
from perdure.privacy.noise.key import NoiseKey


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Head of an owner's ledger that was recorded earlier, to detect a replaced ledger."""

    owner: str
    head: SealedHead


def as_text(recorded: Recorded) -> str:
    """Write a recorded head as one line without spaces: OWNER@COUNT:HASH:MAC."""
    head = recorded.head
    return f"{recorded.owner}@{head.count}:{head.hash}:{head.mac}"


def from_text(text: str) -> Recorded:
    """Parse a recorded head from a line that `as_text` wrote.

    Raises:
        ConfigError: if the text is not such a line.
    """
    found = re.fullmatch(r"(.*)@(\d{1,9}):([0-9a-f]{64}):([0-9a-f]{64})", text)
    if found is None:
        raise ConfigError.of("--at-least", text, "a line that `perdure ledger head` printed")
    return Recorded(owner=found[1], head=SealedHead(int(found[2]), found[3], found[4]))


def behind(
    accounts: Mapping[Path, Merged],
    recorded: Sequence[Recorded],
    key_of: Callable[[str, Path], NoiseKey | None],
) -> list[str]:
    """List the ledgers that do not continue from a head that a user recorded, with the reason.

    Args:
        accounts: ledger file to its content.
        recorded: recorded heads, each with its owner.
        key_of: function from an owner and a file to the key; None if it is not available.
    """
    told = "the head given with --at-least"
    problems = []
    for each in recorded:
        named = [
            (path, part)
            for path, account in accounts.items()
            for part in account.parts
            if part.account.owner == each.owner
        ]
        if not named:
            problems.append(f"there is no ledger of {each.owner!r}, but {told} belongs to one")
        copies = [(path, part) for path, part in named if not head_path(path).exists()]
        own = [(path, part) for path, part in named if head_path(path).exists()]
        # a merged file has copies of the ledgers; both must continue from the recorded head
        for namesakes in (copies, own):
            refused = [
                missed(Anchor(each.head, told), part, key, path)
                for path, part, key in sealed_by(each.head, namesakes, key_of)
            ]
            # ledgers with the same owner and key differ only in their lines
            if all(refused):
                problems += [line for lines in refused for line in lines]
    return problems


def sealed_by(
    head: SealedHead,
    named: Sequence[tuple[Path, Part]],
    key_of: Callable[[str, Path], NoiseKey | None],
) -> list[tuple[Path, Part, NoiseKey | None]]:
    """Return the ledgers with one name to which a head can belong: those whose key made its MAC.

    If no key is available, or none matches, all of them are returned.
    """
    keyed = [(path, part, key_of(part.account.owner, path)) for path, part in named]
    fitting = [each for each in keyed if each[2] is not None and head.sealed_with(each[2])]
    return fitting or keyed


def forgotten(
    accounts: Mapping[Path, Merged | None],
    key_in: Callable[[Path], NoiseKey | None],
    known_elsewhere: Mapping[Path, Sequence[Anchor]],
) -> list[str]:
    """List the ledgers that do not continue from a head that is recorded on this machine.

    Such heads are in checkpoints, in `private/` and in the user's state directory.

    Args:
        accounts: file of a single curator to its content; None if it is damaged.
        key_in: function from a folder to its key; None if it is not available.
        known_elsewhere: ledger file to its heads in the checkpoints of other folders.
    """
    problems = []
    for path, account in accounts.items():
        try:
            key = key_in(path.parent)
            copies = [private_copy(path.parent), state_copy(key) if key else None]
            known = [copy.read() for copy in copies if copy is not None]
            anchors = [*checkpoint_anchors(path.parent), *known_elsewhere.get(path, ())]
            anchors += [each for each in known if each]
        except PerdureError as error:
            problems.append(str(error))
            continue
        for part in account.parts if account else ():
            problems += [line for each in anchors for line in missed(each, part, key, path)]
    return problems


def put_back(folders: Sequence[Path], key_in: Callable[[Path], NoiseKey | None]) -> Iterator[str]:
    """Yield a message for each log of noise draws that was removed or replaced by an older copy.

    Args:
        folders: folders of single curators.
        key_in: function from a folder to its key; None if it is not available.
    """
    for folder in folders:
        log = folder / "private" / "draws.jsonl"
        try:
            key = key_in(folder)
            outside = state_draws(key) if key else None
            copies = [outside] if outside else []
            if key and compare(log, key, copies, draws_anchors(folder))[1]:
                yield (
                    f"{log} is missing, or does not continue from its recorded head: it was "
                    "removed or replaced by an older copy; steps that the run executes again will "
                    "be charged again"
                )
        except PerdureError as error:
            yield str(error)


def missed(anchor: Anchor, part: Part, key: NoiseKey | None, path: Path) -> list[str]:
    """Return the error message if a ledger does not continue from a recorded head; else nothing."""
    try:
        anchor.check(part.lines, key=key, path=str(path))
    except PrivacyError as error:
        return [str(error)]
    return []
