"""Cost of adversarial training and of an attack, beside a loop by hand and beside ART.

Training: `Learner(adversary=PGD(steps=10))` and a bare PyTorch loop with the same passes (ten
gradients with respect to the inputs, one with respect to the parameters), in turn, in one run.
Attack: `PGD.perturb` and `ProjectedGradientDescent` of the Adversarial Robustness Toolbox on the
same batch of 128 images, with the same start, steps and results, in turn.

Times are processor time. With one thread perdure treats denormal numbers as 0 while it trains; the
bare loop then does so, too.

    python benchmarks/speed/adversarial.py --repeats 7
"""

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from perdure import Learner, Stream
from perdure.adversarial import PGD
from perdure.data import mnist, split
from perdure.models import wrap
from perdure.strategies import Naive
from perdure.utils import flushed, store_rows

BATCH = 128
STEPS = 10
EPSILON = 0.3
STEP_SIZE = 0.075


def network(seed: int = 0) -> nn.Module:
    """Make a small CNN for images of 28 by 28 pixels."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


@flushed()
def bare(stream: Stream, iterations: int) -> float:
    """Measure the processor time of a loop by hand with the same passes."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = stream[0].train.inputs
    y = stream[0].train.labels
    order = torch.randperm(len(x))
    began = time.process_time()
    for step in range(iterations):
        index = order[step * BATCH : (step + 1) * BATCH]
        inputs = x[index]
        labels = y[index]
        moved = inputs + EPSILON * (2 * torch.rand_like(inputs) - 1)
        for _ in range(STEPS):
            leaf = moved.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), labels), leaf)
            moved = leaf.detach() + STEP_SIZE * gradient.sign()
            moved = torch.min(torch.max(moved, inputs - EPSILON), inputs + EPSILON).clamp(0, 1)
        optimizer.zero_grad()
        F.cross_entropy(model(moved), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return time.process_time() - began


def ours(stream: Stream, iterations: int) -> float:
    """Measure the processor time of the learner's steps."""
    clock = {"start": 0.0, "spent": 0.0}

    def listen(point: str, _: Learner) -> None:
        if point == "block.begin":
            clock["start"] = time.process_time()
        elif point == "block.end":
            clock["spent"] += time.process_time() - clock["start"]

    Learner(
        model=wrap(network(), head="7"),
        strategy=Naive(),
        optimizer=partial(torch.optim.SGD, lr=0.01),
        iterations=iterations,
        batch_size=BATCH,
        adversary=PGD(epsilon=EPSILON, steps=STEPS, step_size=STEP_SIZE),
        callbacks=[listen],
        show_progress=False,
    ).fit(stream)
    return clock["spent"]


def attack_of_art(model: nn.Module, inputs: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Return the attack of the Adversarial Robustness Toolbox as a function."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    logging.getLogger("art").setLevel(logging.ERROR)
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (1, 28, 28), 10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier, eps=EPSILON, eps_step=STEP_SIZE, max_iter=STEPS, batch_size=BATCH, verbose=False
    )
    rows = inputs.numpy()
    targets = F.one_hot(labels, 10).numpy()
    return lambda: torch.from_numpy(attack.generate(rows, targets))


def attack_of_ours(model: nn.Module, inputs: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Return our attack as a function."""
    attack = PGD(epsilon=EPSILON, steps=STEPS, step_size=STEP_SIZE, random_start=False)

    def losses(rows: Tensor) -> Tensor:
        return F.cross_entropy(model(rows), labels, reduction="none")

    return lambda: attack.perturb(losses, inputs)


def timed(call: Callable[[], Tensor], times: int) -> float:
    """Return the processor time of one call, as a mean."""
    began = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - began) / times


def ratios(name: str, pairs: list[tuple[float, float]], unit: int) -> dict[str, object]:
    """Build the row of pairs (reference, ours) of seconds; `unit` calls or steps make a pair."""
    found = [one / two for one, two in pairs]
    return {
        "compared": name,
        "ratio": statistics.median(found),
        "lowest": min(found),
        "highest": max(found),
        "milliseconds": 1000 * statistics.median(two for _, two in pairs) / unit,
        "repeats": len(pairs),
        "batch": BATCH,
        "steps": STEPS,
    }


def main() -> None:
    """Time both comparisons, in turn, and print the median ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--iterations", type=int, default=40, help="steps of one training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--data", type=Path, help="data root (default: PERDURE_DATA, else the user's cache folder)"
    )
    parser.add_argument("--json", type=Path, help="store the rows in this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    stream = split(mnist(args.data), scenario="class", experiences=1)
    test = stream[0].test
    model = network().requires_grad_(False).eval()
    batch = test.inputs[:BATCH].clone(), test.labels[:BATCH]
    theirs = attack_of_art(network(), *batch)
    own = attack_of_ours(model, *batch)
    difference = float((theirs() - own()).abs().max())
    trained = []
    attacked = []
    for _ in range(args.repeats):
        trained.append((ours(stream, args.iterations), bare(stream, args.iterations)))
        attacked.append((timed(theirs, 5), timed(own, 5)))
    rows = [
        ratios("learner over a loop by hand", trained, args.iterations),
        ratios("ART over perdure", attacked, 1) | {"largest_difference": difference},
    ]
    table = Table("compared", "ratio", "lowest", "highest", "ms of the second")
    for row in rows:
        cells = [f"{row[name]:.3f}" for name in ("ratio", "lowest", "highest", "milliseconds")]
        table.add_row(str(row["compared"]), *cells)
    Console().print(table)
    if args.json:
        store_rows(args.json, rows, seed=0)


if __name__ == "__main__":
    main()
