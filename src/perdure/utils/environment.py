"""Facts about a measurement (machine, versions, command), and the storage of benchmark results."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from perdure.utils.atomic_files import write_json

PACKAGES = (
    "perdure",
    "torch",
    "torchvision",
    "flwr",
    "opacus",
    "avalanche-lib",
    "dp-accounting",
    "numpy",
)


def machine() -> dict[str, str | int | None]:
    """Return the processor, its number of cores, the number of torch threads, and the GPU."""
    import torch

    return {
        "platform": platform.platform(terse=True),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that can change results."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def command() -> str:
    """Return the running command as a user would type it."""
    script = Path(sys.argv[0])
    inside = script.is_relative_to(Path.cwd()) if script.is_absolute() else True
    shown = script.relative_to(Path.cwd()) if script.is_absolute() and inside else script
    return shlex.join(["python", str(shown), *sys.argv[1:]])


def store_rows(path: Path, rows: Sequence[Mapping[str, object]], *, seed: int) -> None:
    """Store the result rows of a benchmark with machine, versions, seed and command.

    All benchmarks store their results in this form.

    Args:
        path: path of the JSON file.
        rows: result rows.
        seed: seed of the run.
    """
    content = {
        "machine": machine(),
        "versions": versions(),
        "seed": seed,
        "command": command(),
        "rows": list(rows),
    }
    write_json(path, content)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
