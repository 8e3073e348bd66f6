"""A hundred real kills: the ledger charges for every draw of noise, and the run always goes on.

A small private run (digits in five experiences; EWC, which asks for a release after each, and
Replay, which keeps a memory) is a process of its own. It is killed with SIGKILL at a random moment,
started again and killed again, until it comes to its end; then the next run begins. Half of the
kills are of runs whose noise is from the operating system, half of simulated ones. A quarter of the
moments is uniform over the time that a process takes until its loop begins (interpreter, imports,
data, ledger, last checkpoint). The others come after the loop's begin, uniform over the time that
the run's remaining draws will take and a quarter more, so that a process may also come to its end.
Times are measured on the processes before; what comes after the end is no kill.

The process appends a line to a journal beside the run at every traced point of the loop
(`perdure.learner.POINTS`): the point, the time, and at "noise.drawn" which entry of the
ledger the noise was drawn for, at which step, and a digest of the values.
A written line survives the process, so nothing is synced. After every kill:

undercharged         draws in the journal that the ledger on disk, chain and keyed head verified,
                     does not pay for
redrawn_differently  draws that were made again, after a resume, with other values than before

Both must be 0.

The order is charge, draw, line. A kill between draw and line loses the line of that one draw, but
cannot hide an uncharged one: its charge was on disk before it was drawn, and were it not, the kills
that fall after the line would show a draw without a charge.

At the end of every run the result, the ledgers, the metrics and the models of a simulated one must
be those of the undisturbed run to the bit, timings aside. With secret noise more may be charged
than the undisturbed run charges: `overcharged` says how much more.

    python benchmarks/kills.py --kills 100 --seed 0 --json benchmarks/results/kills.json
"""

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from perdure import Learner
from perdure.experiment import parse, run, untimed
from perdure.privacy import Entry
from perdure.privacy.ledger import head_path, load
from perdure.privacy.noise import NoiseKey, noise_key
from perdure.utils import generator, store_rows

CONFIG = """
name = "killed"
[data]
experiences = 5
[model]
hidden = [32]
[training]
optimizer = "SGD"
learning_rate = 0.5
epochs = 8
[privacy]
noise_multiplier = 4.0
delta = 0.0005
sampling_rate = 0.1
{seed}
[[arms]]
strategy = "ewc"
strength = 0.1
private = true
[[arms]]
strategy = "replay"
memory_size = 50
private = true
"""
SEEDS = {"secret": None, "simulated": 0}
START = "process.imported"
ENDED = "process.ended"
BEFORE = "process.start"
BEGUN = "experience.begin"
"""First point of a run's loop.

`BEFORE` stands for a kill before the first line of the journal, during start and imports.
"""
EARLY = 0.25
BEYOND = 1.25
"""Latest moment of a kill in the loop, as a multiple of the time for the remaining draws.

`EARLY` is the share of the kills that are planned for the time before the loop.
"""
FEW = 20
"""Fewest draws of a process from which its speed is estimated."""


def text_of(series: str) -> str:
    """Return the config of a series of runs."""
    seed = SEEDS[series]
    return CONFIG.format(seed="" if seed is None else f"seed = {seed}")


# ----------------------------------------------------------------------- the process that is killed


class Journal:
    """Callback that appends a line to a file at every point, each in one system call.

    Args:
        path: path of the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.drawn = ""

    def __call__(self, point: str, learner: Learner) -> None:
        """Write the point, and the last draw of noise."""
        self.write(point, self.drawn if point == "noise.drawn" else "")

    def write(self, point: str, more: str = "") -> None:
        """Append one line."""
        os.write(self._file, f"{point} {time.time()} {more}\n".encode())


def overhear(journal: Journal) -> None:
    """Record the last draw of noise in the journal.

    Entry, purpose, step, and a digest of the values.
    """
    add = NoiseKey.add_noise

    def add_noise(
        self: NoiseKey,
        total: Tensor,
        scale: float,
        *,
        purpose: str,
        entry: str,
        step: int,
        nonce: str = "",
    ) -> None:
        before = total.clone()
        add(self, total, scale, purpose=purpose, entry=entry, step=step, nonce=nonce)
        values = (total - before).numpy().tobytes()
        journal.drawn = f"{entry} {purpose} {step} {hashlib.sha256(values).hexdigest()[:16]}"

    NoiseKey.add_noise = add_noise  # type: ignore[method-assign]


def child(series: str, folder: Path) -> None:
    """Start or continue the run in `folder`, with a journal of its points."""
    journal = Journal(journal_of(folder))
    text = text_of(series)
    journal.write(START)
    overhear(journal)
    run(parse(text), text, folder, callbacks=[journal])
    journal.write(ENDED)


# --------------------------------------------------------------------- what is on disk after a kill


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One draw of noise, for one step of an entry of the ledger."""

    entry: str
    step: int
    digest: str


def journal_of(folder: Path) -> Path:
    """Return the path of a run's journal, which is outside the run's folder."""
    return folder.with_suffix(".journal")


def points(folder: Path, start: int = 0) -> list[list[str]]:
    """Return the lines of the journal from byte `start` on, each split into words."""
    if not journal_of(folder).exists():
        return []
    with journal_of(folder).open("rb") as file:
        file.seek(start)
        return [line.split() for line in file.read().decode().splitlines()]


def draws(folder: Path) -> list[Draw]:
    """Return all draws in the journal, in order."""
    found = [words for words in points(folder) if words[0] == "noise.drawn"]
    return [
        Draw(entry=entry, step=int(step), digest=digest) for _, _, entry, _, step, digest in found
    ]


def entries(folder: Path, series: str) -> dict[str, Entry]:
    """Return the entries of all ledgers by digest, after chains and keyed heads are verified."""
    found = {}
    for path in folder.glob("arms/*/ledger.jsonl"):
        if head_path(path).exists():
            _, bodies, _ = load(path, noise_key(path.parent, SEEDS[series], client=0))
            for body in bodies:
                if body["kind"] == "entry":
                    entry = Entry(**{name: value for name, value in body.items() if name != "kind"})
                    found[entry.digest] = entry
    return found


def uncharged(drawn: Sequence[Draw], ledger: Mapping[str, Entry]) -> list[Draw]:
    """Return the draws that no entry of the ledger pays for."""

    def paid(draw: Draw) -> bool:
        entry = ledger.get(draw.entry)
        return entry is not None and entry.first_step <= draw.step < entry.first_step + entry.steps

    return [draw for draw in drawn if not paid(draw)]


def outputs(folder: Path) -> dict[str, object]:
    """Return all results of a run, without timings, and the ledgers of its arms."""
    patterns = ("metrics.jsonl", "ledger.jsonl", "config.toml", "checkpoint/*/*", "arms/*/ledger*")
    files = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    result = untimed(json.loads((folder / "result.json").read_text()))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files} | {
        "result.json": result
    }


# --------------------------------------------------------------------------- killing


@dataclass(kw_only=True)
class Tally:
    """Findings after the kills of one series.

    `different` lists the files that differ from those of an undisturbed run.
    """

    series: str
    kills: int = 0
    resumes: int = 0
    finished_runs: int = 0
    draws: int = 0
    redrawn: int = 0
    charged: int = 0
    undercharged: int = 0
    overcharged: int = 0
    redrawn_differently: int = 0
    identical_result: bool | None = None
    failed_starts: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    seconds: float = 0.0
    fell_after: dict[str, int] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Return True if no fault was found."""
        return not (
            self.undercharged or self.redrawn_differently or self.failed_starts or self.different
        )


@dataclass(kw_only=True)
class Pace:
    """Present speed of the processes, which changes with other work on the machine.

    Args:
        start: seconds until the loop begins.
        draw: seconds from one draw to the next, with everything in between.
    """

    start: float = 0.0
    draw: float = 0.0

    def moment(self, left: int, seeded: torch.Generator) -> tuple[bool, float]:
        """Choose the moment of a kill: in the loop only or not, and after how many seconds.

        The seconds count from the start of the loop, or from the start of the process.
        """
        early, where = (float(value) for value in torch.rand(2, generator=seeded))
        return (
            (False, where * self.start)
            if early < EARLY
            else (True, where * BEYOND * left * self.draw)
        )

    def observe(self, begun: float, lines: Sequence[Sequence[str]]) -> None:
        """Update the speed from the journal of a process that started at this time."""
        times = [(words[0], float(words[1])) for words in lines]
        loop = next((when for point, when in times if point == BEGUN), None)
        count = sum(point == "noise.drawn" for point, _ in times)
        self.start = self.start if loop is None else loop - begun
        self.draw = self.draw if loop is None or count < FEW else (times[-1][1] - loop) / count


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """Results of a run that was not killed, with its number of draws and its speed."""

    outputs: Mapping[str, object]
    charged: int
    pace: Pace


def started(series: str, folder: Path) -> "subprocess.Popen[bytes]":
    """Start or continue the run in `folder` as a process."""
    words = [sys.executable, __file__, "--child", series, "--folder", str(folder)]
    with folder.with_suffix(".stderr").open("wb") as errors:
        return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=errors)


def undisturbed(series: str, folder: Path) -> Undisturbed:
    """Run one experiment to its end, without a kill."""
    begun = time.time()
    pace = Pace()
    if started(series, folder).wait():
        raise SystemExit(
            f"the undisturbed run failed:\n{folder.with_suffix('.stderr').read_text()}"
        )
    pace.observe(begun, points(folder))
    charged = sum(entry.steps for entry in entries(folder, series).values())
    return Undisturbed(outputs=outputs(folder), charged=charged, pace=pace)


def one_life(tally: Tally, folder: Path, pace: Pace, in_loop: bool, seconds: float | None) -> bool:
    """Start the process, and kill it after a number of seconds, in its loop or before.

    Returns True if the run came to its end.
    """
    before = journal_of(folder).stat().st_size if journal_of(folder).exists() else 0
    begun = time.time()
    process = started(tally.series, folder)
    while (
        in_loop
        and process.poll() is None
        and not any(words[0] == BEGUN for words in points(folder, before))
    ):
        time.sleep(0.005)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    if process.wait() > 0:
        complaint = folder.with_suffix(".stderr").read_text().strip().splitlines()
        tally.failed_starts.append((complaint or ["no message"])[-1])
    lines = points(folder, before)
    pace.observe(begun, lines)
    ended = process.returncode >= 0 or (lines and lines[-1][0] == ENDED)
    if not ended:
        tally.kills += 1
        last = lines[-1][0] if lines else BEFORE
        tally.fell_after[last] = tally.fell_after.get(last, 0) + 1
    return bool(ended)


def one_run(
    tally: Tally, folder: Path, kills: int, reference: Undisturbed, seeded: torch.Generator
) -> None:
    """Kill a run again and again until it ends or `kills` are done; then let it end."""
    ended = False
    while not ended and not tally.failed_starts:
        left = reference.charged - len({(draw.entry, draw.step) for draw in draws(folder)})
        in_loop, seconds = (
            reference.pace.moment(left, seeded) if tally.kills < kills else (False, None)
        )
        ended = one_life(tally, folder, reference.pace, in_loop, seconds)
        tally.resumes += not ended
        tally.undercharged += len(uncharged(draws(folder), entries(folder, tally.series)))
    if not tally.failed_starts:
        finish(tally, folder, reference)


def finish(tally: Tally, folder: Path, reference: Undisturbed) -> None:
    """Count the draws and charges of a finished run.

    A simulated run is compared with the undisturbed one.
    """
    drawn = draws(folder)
    steps = {(draw.entry, draw.step) for draw in drawn}
    charged = sum(entry.steps for entry in entries(folder, tally.series).values())
    tally.finished_runs += 1
    tally.draws += len(steps)
    tally.redrawn += len(drawn) - len(steps)
    tally.redrawn_differently += len(set(drawn)) - len(steps)
    tally.charged += charged
    tally.overcharged += charged - reference.charged
    if tally.series == "simulated":
        found = outputs(folder)
        names = sorted(found.keys() | reference.outputs.keys())
        tally.different += [
            name for name in names if found.get(name) != reference.outputs.get(name)
        ]
        tally.identical_result = not tally.different


def kill_all(kills: int, seed: int, folder: Path) -> list[Tally]:
    """Run both series, with half of the kills each."""
    seeded = generator(seed, "kills")
    tallies = [Tally(series=series) for series in SEEDS]
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("kills", total=kills)
        for part, tally in enumerate(tallies):
            begun = time.perf_counter()
            share = kills * (part + 1) // len(SEEDS) - kills * part // len(SEEDS)
            reference = undisturbed(tally.series, folder / f"{tally.series}-undisturbed")
            while tally.kills < share and not tally.failed_starts:
                done = tally.kills
                one_run(
                    tally,
                    folder / f"{tally.series}-{tally.finished_runs}",
                    share,
                    reference,
                    seeded,
                )
                progress.advance(bar, tally.kills - done)
            tally.seconds = round(time.perf_counter() - begun, 1)
    return tallies


def show(rows: Sequence[Mapping[str, object]]) -> None:
    """Print the rows, one column per series."""
    table = Table(title="real kills (SIGKILL) of private runs")
    for name in ("", *(str(row["series"]) for row in rows)):
        table.add_column(name)
    for name in rows[0]:
        if name != "series":
            cells = (json.dumps(row[name], indent=1).strip("{}") for row in rows)
            table.add_row(name.replace("_", " "), *cells)
    Console(width=100).print(table)


def main() -> int:
    """Run the benchmark with the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills",
        type=int,
        default=100,
        help="that land while the run is alive (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    parser.add_argument("--json", type=Path, help="store the rows in this file")
    parser.add_argument("--child", choices=tuple(SEEDS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.folder)
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="perdure-kills-") as name:
        found = kill_all(args.kills, args.seed, Path(name))
    rows = [asdict(tally) for tally in found]
    show(rows)
    if args.json:
        store_rows(args.json, rows, seed=args.seed)
    return int(not all(tally.sound for tally in found))


if __name__ == "__main__":
    sys.exit(main())
