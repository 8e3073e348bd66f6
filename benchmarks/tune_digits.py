"""Settings found by `perdure tune` against those of the config, on the test records of the digits.

A search has 30 trials on held-out training records of the first experiences. Then the config and
the config that the search wrote are run on the whole stream, and measured on the test records,
which no search has seen. Each seed is a search and two runs of its own.

    python benchmarks/tune_digits.py --seeds 2 --json benchmarks/results/tune_digits.json
"""

import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rows import Row, options, origin, show, spread, store, stored

from perdure.experiment import parse, run, toml_text, tune_run

TRIALS = 30
SPACE: dict[str, Any] = {
    "training.learning_rate": [1e-4, 0.1],
    "training.batch_size": {"choices": [16, 32, 64, 128]},
    "model.hidden": {"choices": [[32], [64], [128], [64, 64], [128, 128]]},
    "model.activation": {"choices": ["relu", "gelu", "tanh"]},
}
STREAMS: dict[str, dict[str, Any]] = {
    "all digits at once": {
        "data": {"name": "digits", "stream": "joint"},
        "arms": [{"strategy": "naive"}],
    },
    "two digits at a time, replay": {
        "data": {"name": "digits", "scenario": "class", "experiences": 5},
        "arms": [{"strategy": "replay", "memory_size": 200}],
    },
}
"""Configs with the default settings of `[model]` and `[training]`, but for 5 epochs."""
COLUMNS = ("stream", "sampler", "default", "tuned", "gain", "better", "seeds")


def table_of(stream: str, sampler: str, seed: int) -> dict[str, Any]:
    """Return the content of a config with its search."""
    return {
        "name": "digits",
        "seed": seed,
        **STREAMS[stream],
        "training": {"epochs": 5},
        "search": {"sampler": sampler, "trials": TRIALS, "seed": seed, "space": SPACE},
    }


def accuracy(text: str, folder: Path) -> float:
    """Run a config, and return its average accuracy on the test records."""
    (arm,) = run(parse(text), text, folder)["arms"]
    found = arm["average_accuracy"]
    assert found is not None
    return found


def row_of(stream: str, sampler: str, seeds: int) -> Row:
    """Search, and run default and best settings, with every seed."""
    default: list[float] = []
    tuned: list[float] = []
    values: list[dict[str, Any]] = []
    for seed in range(seeds):
        text = toml_text(table_of(stream, sampler, seed))
        with TemporaryDirectory() as place:
            folder = Path(place)
            found = tune_run(text, folder / "search")
            assert found.best is not None
            values.append(found.best.values)
            default.append(accuracy(text, folder / "default"))
            best = (folder / "search" / "best.toml").read_text()
            tuned.append(accuracy(best, folder / "tuned"))
        print(stream, sampler, seed, default[-1], tuned[-1], values[-1], flush=True)
    gains = [after - before for before, after in zip(default, tuned, strict=True)]
    return {
        "stream": stream,
        "sampler": sampler,
        "trials": TRIALS,
        "default": statistics.mean(default),
        "tuned": statistics.mean(tuned),
        "gain": statistics.mean(gains),
        "standard_error": spread(gains)[1],
        "better": sum(gain > 0 for gain in gains),
        "seeds": seeds,
        "each": {"default": default, "tuned": tuned, "values": values},
        "space": SPACE,
        **origin(),
    }


def main() -> None:
    """Run the rows that are not stored yet, and print the table."""
    parser = options(__doc__ or "", seeds=3, resumed=True)
    parser.add_argument("--samplers", nargs="+", default=["tpe"], help="samplers of the searches")
    parser.add_argument("--streams", nargs="+", default=list(STREAMS), help="names of streams")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = stored(given.json)
    done = {(row["stream"], row["sampler"]) for row in rows}
    for sampler in given.samplers:
        for stream in given.streams:
            if (stream, sampler) not in done:
                rows.append(row_of(stream, sampler, given.seeds))
                store(given.json, rows)
    show("settings found by a search, accuracy in %", rows, COLUMNS)


if __name__ == "__main__":
    main()
