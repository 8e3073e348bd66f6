"""Cost of private noise per number: exact noise with its cipher, and its parts.

Each draw is timed by itself, turn by turn, in processor time of one thread, which is what the clock
would show on an idle machine. `exact, compiled` is what every private step draws; `exact, NumPy` is
the path of draws that are too small for the compiled kernel, in draws of 8,191 numbers; `words` is
the cipher alone, one 64-bit word of AES-256 in counter mode a number; `torch.randn` is float32
noise from a generator that is no secret.

    python benchmarks/noise.py --repeats 9 --json benchmarks/results/noise.json
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from rich.console import Console
from rich.table import Table
from torch import Tensor

from perdure.privacy import Grid
from perdure.privacy.noise import NoiseKey
from perdure.utils import store_rows

NUMBERS = {"MLP 784-400-400-10": 478_410, "28 million": 28_000_000}
"""Numbers of parameters: those of the model in `loop.py`, and of a small transformer."""
NOISE = 1.1
NANOSECONDS_TARGET = 4.0
"""Largest time per number that is aimed at, including the cipher."""
BELOW_COMPILED = 2**13 - 1
"""Largest draw that does not load the compiled kernel."""
PURE_LARGEST = 500_000
"""Most numbers that the NumPy path draws here; its cost per number is the same for more."""
PIECE_BYTES = 2**18
"""Bytes of words drawn at a time, as in a draw of noise, so that they stay in the cache."""


def exact(total: Tensor, scale: float, step: int = 0) -> None:
    """Add exact noise, as a private step does."""
    NoiseKey.from_seed(0).add_noise(total, scale, purpose="gradient", entry="", step=step)


def exact_small(total: Tensor, scale: float) -> None:
    """Add exact noise in draws that are too small for the compiled kernel."""
    for step, part in enumerate(torch.split(total, BELOW_COMPILED)):
        exact(part, scale, step)


def words(numbers: int) -> None:
    """Draw one secret word per number, without noise."""
    cipher = Cipher(algorithms.AES(bytes(32)), modes.CTR(bytes(16))).encryptor()
    zeros = bytes(PIECE_BYTES)
    buffer = bytearray(PIECE_BYTES + 15)
    for start in range(0, 8 * numbers, PIECE_BYTES):
        cipher.update_into(zeros[: 8 * numbers - start], buffer)


def contestants(numbers: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Return the draws to compare by name, each with how many numbers it draws."""
    total = torch.zeros(numbers, dtype=torch.int64)
    few = total[: min(numbers, PURE_LARGEST)]
    scale = NOISE * Grid.of(numbers, NOISE).steps
    floats = torch.empty(numbers)
    return {
        "exact, compiled": (partial(exact, total, scale), numbers),
        "exact, NumPy": (partial(exact_small, few, scale), len(few)),
        "words": (partial(words, numbers), numbers),
        "torch.randn": (floats.normal_, numbers),
    }


def seconds(draw: Callable[[], object]) -> float:
    """Measure the processor time of one draw."""
    start = time.process_time()
    draw()
    return time.process_time() - start


def measure(model: str, numbers: int, repeats: int) -> list[dict[str, object]]:
    """Measure the median nanoseconds per number of each draw, in turn, after one warm-up."""
    sides = contestants(numbers)
    for draw, _ in sides.values():
        draw()
    rounds = [{name: seconds(draw) for name, (draw, _) in sides.items()} for _ in range(repeats)]
    rows: list[dict[str, object]] = []
    for name, (_, drawn) in sides.items():
        times = [each[name] for each in rounds]
        row: dict[str, object] = {
            "benchmark": "noise",
            "model": model,
            "numbers": numbers,
            "method": name,
            "nanoseconds_a_number": 1e9 * statistics.median(times) / drawn,
            "least": 1e9 * min(times) / drawn,
            "milliseconds": 1e3 * statistics.median(times) * numbers / drawn,
            "repeats": repeats,
        }
        if name == "exact, compiled":
            median = row["nanoseconds_a_number"]
            assert isinstance(median, float)
            row |= {"target": NANOSECONDS_TARGET, "met": median <= NANOSECONDS_TARGET}
        rows.append(row)
    return rows


def show(rows: list[dict[str, object]]) -> None:
    """Print the rows as a table."""
    table = Table(title="private noise, one thread, processor time")
    for column in ("numbers", "method", "ns a number", "least", "ms a draw"):
        table.add_column(column, justify="right")
    for row in rows:
        figures = (row["nanoseconds_a_number"], row["least"], row["milliseconds"])
        table.add_row(
            f"{row['numbers']:,}", str(row["method"]), *[f"{figure:.2f}" for figure in figures]
        )
    Console(width=100).print(table)


def main() -> None:
    """Measure draws of both sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="store the rows in this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name, n in NUMBERS.items() for row in measure(name, n, args.repeats)]
    show(rows)
    if args.json:
        store_rows(args.json, rows, seed=0)


if __name__ == "__main__":
    main()
