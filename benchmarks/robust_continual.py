"""Robustness that is kept and lost over a stream, without privacy and at epsilon 8.

Split MNIST, class-incremental, five experiences of two digits, an MLP of 64 units. All methods
train with the same attack (PGD, linf 0.1, 3 steps) on new records. `replay` learns stored records
as they are, `adversarial replay` attacks them, too. After every experience, the first 500 test
images of each experience so far are attacked (PGD, 10 steps); the attack sees the whole model.

Private runs: record level, add/remove, PLD, delta 1e-5, noise simulated from the seed.

    python benchmarks/robust_continual.py --seeds 3 --json benchmarks/results/robust_continual.json
    python benchmarks/robust_continual.py --json FILE --picture docs/images/robust-continual.png
"""

import math
import time
from functools import partial
from pathlib import Path

import torch
from rows import Row, options, origin, show, spread, store, stored
from torch import Tensor

from perdure import Learner, Privacy, Stream
from perdure.adversarial import PGD, measure_robustness
from perdure.adversarial.defences import Madry
from perdure.data import mnist, split
from perdure.metrics import forgetting
from perdure.models import mlp
from perdure.strategies import Naive, Replay

RADIUS = 0.1
EPSILON = 8.0
ATTACKED = 500
METHODS = ("naive", "replay", "adversarial replay")
COLUMNS = (
    "method",
    "epsilon",
    "seeds",
    "accuracy",
    "robust_accuracy",
    "standard_error",
    "robust_forgetting",
    "minutes",
)


def learner_of(method: str, stream: Stream, seed: int, *, private: bool) -> Learner:
    """Make the learner of a method."""
    replays = method != "naive"
    return Learner(
        model=mlp(
            input_shape=stream.input_shape, num_classes=stream.num_classes, hidden=(64,), seed=seed
        ),
        strategy=Replay(memory_size=2000) if replays else Naive(),
        optimizer=partial(torch.optim.SGD, lr=0.5, momentum=0.0)
        if private
        else partial(torch.optim.Adam, lr=1e-3),
        iterations=150,
        batch_size=256 if private else 64,
        seed=seed,
        privacy=Privacy(epsilon=EPSILON, delta=1e-5, clip_norm=0.5, seed=seed) if private else None,
        adversary=PGD(epsilon=RADIUS, steps=3),
        defence=Madry(memory=method == "adversarial replay"),
        show_progress=False,
    )


def run(method: str, stream: Stream, seed: int, *, private: bool) -> tuple[Tensor, Tensor]:
    """Return the accuracy matrix and the robust matrix (T, T) of one training, in percent."""
    width = len(stream)
    robust = torch.full((width, width), torch.nan)

    def attack(point: str, learner: Learner) -> None:
        if point != "evaluated":
            return
        last = len(learner.matrix) - 1
        for index in range(last + 1):
            test = stream[index].test
            card = measure_robustness(
                learner.predictor(index, after=last),
                test.inputs[:ATTACKED],
                test.labels[:ATTACKED],
                PGD(epsilon=RADIUS, steps=10),
                generator=torch.Generator().manual_seed(seed),
            )
            robust[last, index] = card.robust_accuracy

    learner = learner_of(method, stream, seed, private=private)
    learner.callbacks = [attack]
    return learner.fit(stream), robust


def row(method: str, stream: Stream, seeds: int, *, private: bool) -> Row:
    """Train all seeds of a method, and return the row to store."""
    began = time.process_time()
    pairs = [run(method, stream, seed, private=private) for seed in range(seeds)]
    clean, robust = (torch.stack(each).double() for each in zip(*pairs, strict=True))
    mean, error = spread([float(matrix[-1].mean()) for matrix in robust])
    return {
        "method": method,
        "epsilon": EPSILON if private else None,
        "seeds": seeds,
        "accuracy": float(clean[:, -1].mean()),
        "robust_accuracy": mean,
        "standard_error": error,
        "robust_forgetting": sum(map(forgetting, robust)) / seeds,
        "matrix": clean.mean(0).tolist(),
        "robust_matrix": _plain(robust.mean(0)),
        "minutes": (time.process_time() - began) / 60,
        **origin(),
    }


def _plain(matrix: Tensor) -> list[list[float | None]]:
    return [[None if math.isnan(value) else value for value in line] for line in matrix.tolist()]


def draw(rows: list[Row], path: Path) -> None:
    """Draw the robust matrices of all rows."""
    import matplotlib.pyplot as plt
    import numpy as np

    private = [row for row in rows if row["epsilon"] is not None]
    plain = [row for row in rows if row["epsilon"] is None]
    figure, axes = plt.subplots(2, len(METHODS), figsize=(8.4, 5.4), layout="constrained")
    for line, group in zip(axes, (plain, private), strict=True):
        for panel, entry in zip(line, group, strict=True):
            matrix = np.array(entry["robust_matrix"], dtype=float)
            shaded = panel.imshow(matrix, vmin=0, vmax=100, cmap="viridis")
            for i, j in zip(*np.nonzero(~np.isnan(matrix)), strict=True):
                color = "white" if matrix[i, j] < 60 else "black"
                panel.text(
                    j, i, f"{matrix[i, j]:.0f}", ha="center", va="center", size=8, color=color
                )
            budget = "no privacy" if entry["epsilon"] is None else f"epsilon {entry['epsilon']:g}"
            panel.set_title(f"{entry['method']}, {budget}", fontsize=9)
            panel.set_xticks(range(5), range(1, 6))
            panel.set_yticks(range(5), range(1, 6))
    figure.supxlabel("robust accuracy (%) on experience", fontsize=9)
    figure.supylabel("after training on experience", fontsize=9)
    figure.colorbar(shaded, ax=axes, aspect=40)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the benchmark with the options of the command line."""
    parser = options(__doc__ or "", seeds=3, resumed=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--picture", type=Path, help="draw the matrices of the rows here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    stream = split(mnist(args.data), scenario="class", experiences=5)
    rows = stored(args.json)
    known = {(entry["method"], entry["epsilon"] is not None) for entry in rows}
    for private in (False, True):
        for method in METHODS:
            if (method, private) not in known:
                rows.append(row(method, stream, args.seeds, private=private))
                store(args.json, rows)
    show(f"Split MNIST, class-incremental, linf {RADIUS:g}", rows, COLUMNS)
    if args.picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
