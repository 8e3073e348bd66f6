"""Code of the commands `perdure ledger`, whose options are in `ledger`.

They show the privacy cost of a run, verify its ledgers, and compute the cost of further steps.
"""

import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import Progress

from perdure.cli.expected_ledgers import absent, anchors_below, left_out
from perdure.cli.ledger_choice import OWNER, apart, arm_of, named, select
from perdure.cli.recorded_heads import Recorded, as_text, behind, forgotten, from_text, put_back
from perdure.cli.run_facts import RunFacts, read_facts
from perdure.errors import LedgerError, PerdureError, PrivacyError, RunError
from perdure.experiment.result_schema import Epsilon
from perdure.experiment.results import epsilon_of_all_arms, epsilon_row
from perdure.privacy.accounting.calibration import check_target
from perdure.privacy.accounting.charges import Charge
from perdure.privacy.ledger.anchors import private_copy
from perdure.privacy.ledger.merged import Merged, Part
from perdure.privacy.ledger.merged import read as read_ledger
from perdure.privacy.ledger.storage import RESTORE, Anchor, head_path, load
from perdure.privacy.noise.key import NoiseKey, noise_key
from perdure.report.ledger_tables import (
    document,
    exposure_table,
    exposures,
    finite,
    projection_table,
    projections,
)

DELTA = 1e-5
LEDGER = "ledger.jsonl"
BELOW = ("arms/*", "arms/*/clients/*", "clients/*")
"""Patterns of the folders that hold one curator's ledger each, in the folder of a run or arm."""
GOOD = 0
WRONG = 1
UNSEALED = 3
"""Exit codes of `verify`; exit code 2 means that a command cannot be carried out."""
NOT_VERIFIED = (
    "NOT VERIFIED: {} of {} heads, because their keys are missing: anyone who can write these "
    "files could have forged the whole history; verify them on the machine with the folder private/"
)
LEFT_TO_VERIFY = (
    "not compared with checkpoints and recorded heads; use `perdure ledger verify` for this"
)
NOT_COVERED = (
    "not covered: anyone who can write here could restore an older ledger together with its older "
    "head and checkpoints; store the output of `perdure ledger head` elsewhere and give it with "
    "--at-least"
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Ledgers of a run, and the config that they were written with, if there is one.

    Args:
        folder: folder of the run.
        run: folder that the user gave, which is the run's or one inside it; None for a file.
        config: facts of the config; no module that it names is imported.
        merged: merged ledger file of a finished run; None if there is none.
        single: ledger files of single curators.
    """

    folder: Path
    run: Path | None
    config: RunFacts | None
    merged: Path | None
    single: tuple[Path, ...]

    @property
    def finished(self) -> bool:
        """True if the run has a result."""
        return (self.folder / "result.json").exists()

    @property
    def seed(self) -> int | None:
        """Seed of simulated noise; None if noise is secret, or nothing is known."""
        return self.config.seed if self.config else None

    def delta(self, asked: float | None, account: Merged) -> float:
        """Return the delta that the user gave, or the run's delta, or 1e-5."""
        own = (asked, account.delta, self.config.delta if self.config else None)
        chosen = next((delta for delta in own if delta is not None), DELTA)
        check_target(1.0, chosen)
        return chosen


def show(
    run: Path,
    *,
    delta: float | None,
    arm: Sequence[str],
    owner: Sequence[str],
    as_json: bool,
) -> None:
    """Print the charges of every partition and their epsilons, and end the command."""
    source = find(run)
    account = Merged(apart(opened(source), source.folder))
    spent = source.delta(delta, account)
    chosen = select(account, arm, owner)
    gone = missing(source, account if source.merged else None)
    whole = not gone or bool(arm or owner)
    with ticking(len(chosen.partitions)) as tick:
        rows = exposures(chosen, spent, tick)
    if as_json:
        facts = summary(source, chosen, spent, gone, whole) | {"partitions": document(rows)}
        typer.echo(json.dumps(facts, indent=1, allow_nan=False))
        raise typer.Exit(int(not whole))
    _console().print(exposure_table(rows))
    if gone:
        typer.echo(
            f"{len(account.parts)} of {len(account.parts) + len(gone)} ledgers are there; missing: "
            f"{', '.join(gone)}{'' if whole else ': no epsilon is stated for the run'}"
        )
    for line in statements(source, account, chosen, spent, whole):
        typer.echo(line)
    raise typer.Exit(int(not whole))


def head(run: Path) -> None:
    """Print the head of every ledger, one line each."""
    for _, part in opened(find(run)):
        typer.echo(as_text(Recorded(owner=part.account.owner, head=part.head)))


def verify(run: Path, *, at_least: Sequence[str]) -> None:
    """Check every chain, head and recorded head, and end the command.

    Args:
        run: folder or file that the user gave.
        at_least: lines that the command `head` printed before; the ledgers must continue from them.
    """
    recorded = [from_text(line) for text in at_least for line in text.splitlines()]
    source = find(run)
    problems: list[str] = []
    parts: dict[Path, Merged] = {}
    for path in (*((source.merged,) if source.merged else ()), *source.single):
        try:
            parts[path] = open_file(path, source)
            typer.echo(f"{path}: {sound(path, parts[path])}")
        except PrivacyError as error:
            problems.append(str(error))
    problems += unlike(parts, source)
    known: dict[Path, list[Anchor]] = {}
    try:
        gone = missing(source, parts.get(source.merged) if source.merged else None, files=True)
        problems += [f"{name} is missing, but {why}; {RESTORE}" for name, why in gone.items()]
        known = anchors_below(source.run) if source.run else {}
    except PerdureError as error:
        problems.append(str(error))
    problems += forgotten({path: parts.get(path) for path in source.single}, key_in, known)
    problems += put_back([path.parent for path in source.single], key_in)
    problems += behind(parts, recorded, lambda owner, path: key_of(owner, path, source))
    for problem in problems:
        typer.echo(f"WRONG: {problem}")
    heads = [part.keyed for account in parts.values() for part in account.parts]
    if not all(heads):
        typer.echo(NOT_VERIFIED.format(heads.count(False), len(heads)))
    typer.echo(NOT_COVERED)
    raise typer.Exit(WRONG if problems else GOOD if all(heads) else UNSEALED)


def project(
    run: Path,
    *,
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    partition: Sequence[str],
    delta: float | None,
) -> None:
    """Print the epsilon of every partition as it would be after further steps."""
    source = find(run)
    account = Merged(apart(opened(source), source.folder))
    spent = source.delta(delta, account)
    charge = Charge(sampling_rate, noise_multiplier, steps, "grid-gaussian")
    chosen = named(account, partition)
    with ticking(len(chosen)) as tick:
        rows = projections(account, charge, spent, chosen, tick)
    _console().print(projection_table(rows))
    typer.echo(
        f"after {steps} more steps at sampling rate {sampling_rate:g} and noise multiplier "
        f"{noise_multiplier:g}, each "
        f"partition by itself; {account.unit}, {account.relation}, delta {spent:g}, PLD; "
        "nothing was written"
    )


# --------------------------------------------------------------------------- finding and opening


def find(run: Path) -> Source:
    """Find the ledgers of a run's folder, of an arm's or client's folder in it, or in one file.

    Raises:
        RunError: if there is no ledger.
        ConfigError: if the config of the run cannot be read.
    """
    folder = home(run)
    config = read_facts(folder / "config.toml") if (folder / "config.toml").exists() else None
    top = run / LEDGER if run.is_dir() else run
    alone = run.is_file() or _there(top)
    below = (
        [] if run.is_file() else sorted({path for part in BELOW for path in _ledgers(run, part)})
    )
    if not alone and not below:
        raise RunError(
            f"{run} has no ledger; give the folder of a run with a private arm, or a {LEDGER}"
        )
    exported = alone and not head_path(top).exists()
    single = (top, *below) if alone and not exported else tuple(below)
    return Source(
        folder=folder,
        run=run if run.is_dir() else None,
        config=config,
        merged=top if exported else None,
        single=tuple(single),
    )


def missing(source: Source, merged: Merged | None, *, files: bool = False) -> dict[str, str]:
    """Return the ledgers that are missing, each with the reason why it must exist.

    Args:
        source: ledgers of the run.
        merged: content of the merged file; None if there is none.
        files: True to count ledgers of single curators although there is a merged file.
    """
    gone: dict[str, str] = {}
    if merged is not None:
        held = [part.account.owner for part in merged.parts]
        gone |= left_out(held, source.folder, source.config)
    if source.run is not None and (files or merged is None):
        gone |= absent(source.run, source.folder, source.config, _there)
    return gone


def home(path: Path) -> Path:
    """Return the folder of the run to which `path` belongs; its arms are in `arms/`."""
    start = path.resolve() if path.is_dir() else path.resolve().parent
    above = [folder.parent for folder in (start, *start.parents) if folder.name == "arms"]
    return above[0] if above else start


def opened(source: Source) -> list[tuple[Path, Part]]:
    """Read the ledgers: those in the merged file if there is one, or all single ones.

    Raises:
        LedgerError: if a ledger is damaged, or its head was made with another key.
    """
    paths = [source.merged] if source.merged else list(source.single)
    return [(path, part) for path in paths for part in open_file(path, source).parts]


def open_file(path: Path, source: Source) -> Merged:
    """Read one ledger file, and check its heads with the keys that are available.

    A run that stopped before its first line leaves an empty file, which is an empty account.
    """
    copy = private_copy(path.parent).path
    if copy.exists() and not path.exists() and not head_path(path).exists():
        raise LedgerError(f"{path} is missing, but {copy} refers to it; {RESTORE}")
    try:
        if head_path(path).exists() and load(path, key_in(path.parent))[2].count == 0:
            return Merged([])
        owners = [part.account.owner for part in read_ledger(path).parts]
        keys = {owner: key for owner in owners if (key := key_of(owner, path, source))}
        return read_ledger(path, keys)
    except OSError as error:
        raise RunError(
            f"{path} cannot be read ({error.strerror}); make the file readable"
        ) from None


def key_of(owner: str, path: Path, source: Source) -> NoiseKey | None:
    """Find the noise key of a ledger's owner, to check the head; None if there is no key.

    The key is in `private/` next to the ledger, in the owner's folder of the run, or follows from
    the seed of simulated noise.
    """
    found = OWNER.fullmatch(owner)
    arm, number = (found[1], int(found[2])) if found else (None, 0)
    own = source.folder / "arms" / arm if arm else source.folder
    folders = (
        [path.parent]
        if head_path(path).exists()
        else [own / "clients" / f"{number:03d}", own]
        if found
        else []
    )
    for folder in folders:
        if key := key_in(folder):
            return key
    return None if source.seed is None else noise_key(None, source.seed, number)


def key_in(folder: Path) -> NoiseKey | None:
    """Return the secret key in a curator's folder, if it is readable; never create a new key."""
    file = folder / "private" / "key"
    return NoiseKey.from_os(file) if os.access(file, os.R_OK) else None


def _there(path: Path) -> bool:
    """Return True if a ledger exists, or a file that refers to it."""
    known = (path, head_path(path), private_copy(path.parent).path)
    return any(each.exists() for each in known)


def _ledgers(run: Path, part: str) -> Iterator[Path]:
    """Yield the ledger files in folders that match a pattern, also files of which a head exists."""
    return (folder / LEDGER for folder in run.glob(part) if _there(folder / LEDGER))


# --------------------------------------------------------------------------- what is said of it


def statements(
    source: Source, account: Merged, chosen: Merged, delta: float, whole: bool
) -> Iterator[str]:
    """Yield the lines below the table: total epsilon, its limits, and the checks that were made.

    Args:
        source: ledgers of the run.
        account: all ledgers that exist.
        chosen: ledgers that the user chose with options.
        delta: delta of every epsilon.
        whole: True if no ledger is missing; if False, no joint epsilon is stated.
    """
    if whole:
        yield f"worst partition by itself: {chosen.statement(delta)}"
    joint = all_arms(chosen, delta) if whole else None
    if joint:
        yield f"all arms together, for whoever sees more than one: {joint['text']}"
    if len(chosen.parts) < len(account.parts):
        yield (
            f"shown: {len(chosen.parts)} of {len(account.parts)} ledgers; the others are not "
            "in these numbers"
        )
    if source.config and not source.finished:
        yield "the run is not finished: this is what it was charged so far"
    if plain := without_privacy(source):
        yield f"trained without privacy, so in no ledger and with no promise: {', '.join(plain)}"
    yield f"{checks(chosen)}; {LEFT_TO_VERIFY}"


def summary(
    source: Source, chosen: Merged, delta: float, missing: Collection[str], whole: bool
) -> dict[str, object]:
    """Return the facts of `statements` as a dict for JSON output."""
    joint = all_arms(chosen, delta) if whole else None
    return {
        "schema": 1,
        "delta": delta,
        "statement": finite(epsilon_row(chosen.statement(delta))) if whole else None,
        "all_arms_together": joint and finite(joint),
        "finished": source.finished,
        "without_privacy": without_privacy(source),
        "verified": checks(chosen),
        "missing": sorted(missing),
        "ledgers": [
            {"owner": part.account.owner, "lines": len(part.lines), "head_verified": part.keyed}
            for part in chosen.parts
        ],
    }


def all_arms(account: Merged, delta: float) -> Epsilon | None:
    """Return the privacy statement of several arms together, against a reader of all models.

    Charges of the same records are composed. None if there is one arm, or if the ledgers belong to
    no run.
    """
    owners = [part.account.owner for part in account.parts]
    arms = {found[1] for found in map(OWNER.fullmatch, owners) if found and found[1]}
    of_a_run = all(arm_of(owner) in arms for owner in owners)
    return epsilon_of_all_arms(account, delta) if of_a_run and len(arms) > 1 else None


def without_privacy(source: Source) -> list[str]:
    """Names of the run's arms without privacy."""
    return list(source.config.plain_arms) if source.config else []


def checks(account: Merged) -> str:
    """Describe which chains and heads were verified when the account was opened."""
    keyed = sum(part.keyed for part in account.parts)
    total = len(account.parts)
    if 0 < keyed < total:
        return (
            f"chains verified; {keyed} of {total} heads verified with their keys, the others not "
            "verified"
        )
    return f"{account.verified}{anyone(account)}"


def anyone(account: Merged) -> str:
    """Return a warning if the key of verified heads follows from a seed, as anyone can compute it.

    The result is "" if no key does.
    """
    simulated = account.simulated and any(part.keyed for part in account.parts)
    return " (simulated keys: anyone can make such heads)" if simulated else ""


def sound(path: Path, account: Merged) -> str:
    """Return the line that `verify` prints for a file without errors."""
    lines = [line for part in account.parts for line in part.lines]
    if not head_path(path).exists():
        return f"{len(account.parts)} ledgers, {len(lines)} lines; {checks(account)}"
    keyed = all(part.keyed for part in account.parts)
    unsealed = "head not verified, because its key is missing: the whole history could be forged"
    told = (
        f"chain verified, {f'head verified with its key{anyone(account)}' if keyed else unsealed}"
    )
    rest = (path.stat().st_size if path.exists() else 0) - sum(len(line) + 1 for line in lines)
    beyond = f"; {rest} bytes after the last line that the head covers do not count" if rest else ""
    return f"{len(lines)} lines; {told if lines else 'nothing was charged yet'}{beyond}"


def unlike(accounts: Mapping[Path, Merged], source: Source) -> list[str]:
    """List curators' ledgers that differ from their copies in the merged file.

    One of the two is then an older copy.
    """
    if source.merged is None or source.merged not in accounts:
        return []
    copies = [(part.account.owner, part.head) for part in accounts[source.merged].parts]
    return [
        f"{path} differs from the ledger of {part.account.owner!r} in {source.merged}; one of the "
        "two is an older copy: restore it from a backup"
        for path, account in accounts.items()
        if path != source.merged
        for part in account.parts
        if (part.account.owner, part.head) not in copies
    ]


# --------------------------------------------------------------------------- the terminal


@contextmanager
def ticking(total: int) -> Iterator[Callable[[], None]]:
    """Context manager with a progress bar on standard error, if that is a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("accounting", total=total)
        yield lambda: bar.advance(task)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120)
