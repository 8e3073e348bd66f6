"""Explanations beside shap, lime and captum, and superpixels of MNIST with a CNN.

Both sides explain the same instances of breast cancer or digits with the same MLP, with equal
samples, in one thread, turn by turn in one process; every repeat has another seed. All outputs are
explained. Times are processor times. The error of Shapley values is the norm of the difference from
a reference of 60,000 coalitions over the norm of the reference, as a mean over instances, outputs
and repeats.

    python benchmarks/speed/explain.py
    python benchmarks/speed/explain.py --only superpixels
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from perdure import Learner
from perdure.data import Dataset, breast_cancer, digits, mnist, split
from perdure.explain import LIME, KernelSHAP
from perdure.metrics import accuracy
from perdure.models import cnn, mlp
from perdure.strategies import Naive
from perdure.utils import store_rows

Row = dict[str, object]
Side = Callable[[int], Tensor]
"""Function of the seed that returns values (n, features, outputs)."""

BACKGROUND = 20
REFERENCE = 60_000
LIME_SAMPLES = 5000
SUPERPIXEL_SAMPLES = 512
DATA: dict[str, Callable[[], Dataset]] = {"breast cancer": breast_cancer, "digits": digits}


def trained(data: Dataset, model: nn.Module, *, epochs: int, records: int) -> nn.Module:
    """Train a model for as many steps as epochs of so many records have, and freeze it."""
    stream = split(data, scenario="class", experiences=1)
    learner = Learner(
        model=model,
        strategy=Naive(),
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        iterations=epochs * records // 32,
        batch_size=32,
        show_progress=False,
    )
    learner.fit(stream)
    return learner.model.eval().requires_grad_(False)


class Task:
    """Model, background and instances of one data set.

    Args:
        name: name of the data set.
        instances: number of test records to explain.
    """

    def __init__(self, name: str, instances: int) -> None:
        data = DATA[name]()
        inputs = data.train.inputs.flatten(1)
        body = mlp(
            input_shape=data.input_shape, num_classes=data.num_classes, hidden=(64, 64), seed=0
        )
        shaped = trained(data, body, epochs=60, records=len(inputs))
        self.name = name
        self.model = nn.Sequential(nn.Unflatten(1, data.input_shape), shaped)
        self.background = inputs[:BACKGROUND]
        self.scales = inputs.std(0, correction=0).clamp_min(1e-6)
        self.inputs = data.test.inputs.flatten(1)[:instances]
        self.outputs = data.num_classes
        self.features = self.inputs.shape[1]
        self.samples = 2 * self.features + 2048

    def arrays(self, rows: object) -> object:
        """Apply the model to a numpy array."""
        with torch.no_grad():
            return self.model(torch.as_tensor(rows, dtype=torch.float32)).numpy()

    def probabilities(self, rows: Tensor) -> Tensor:
        """Return the probabilities of the classes."""
        return torch.softmax(self.model(rows), dim=1)


def alternate(
    mine: Side, theirs: Side, repeats: int
) -> tuple[list[list[float]], list[list[Tensor]]]:
    """Run both sides turn by turn; return their processor times and values."""
    times: list[list[float]] = [[], []]
    values: list[list[Tensor]] = [[], []]
    for seed in range(repeats):
        order = (0, 1) if seed % 2 else (1, 0)
        for side in order:
            start = time.process_time()
            found = (mine, theirs)[side](seed)
            times[side].append(time.process_time() - start)
            values[side].append(found)
    return times, values


def row(task: Task, peer: str, samples: int, times: list[list[float]]) -> Row:
    """Return the row of one comparison; the ratio is the median of turns."""
    ratios = [theirs / mine for mine, theirs in zip(*times, strict=True)]
    return {
        "benchmark": "explain",
        "data": task.name,
        "peer": peer,
        "instances": len(task.inputs),
        "features": task.features,
        "outputs": task.outputs,
        "samples": samples,
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "seconds": statistics.median(times[0]),
        "peer_seconds": statistics.median(times[1]),
        "repeats": len(ratios),
    }


def error(found: list[Tensor], reference: Tensor) -> float:
    """Return the mean relative error over instances, outputs and repeats."""
    norm = reference.norm(dim=1)
    return statistics.mean(float(((v - reference).norm(dim=1) / norm).mean()) for v in found)


def kernel_shap(name: str, instances: int, repeats: int) -> Row:
    """Compare KernelSHAP with shap.KernelExplainer."""
    import numpy
    import shap

    task = Task(name, instances)

    def theirs(seed: int) -> Tensor:
        numpy.random.seed(seed)  # the only seed that shap has
        explainer = shap.KernelExplainer(task.arrays, task.background.numpy())
        values = explainer.shap_values(
            task.inputs.numpy(), nsamples=task.samples, l1_reg=False, silent=True
        )
        return torch.as_tensor(values)

    mine = partial(shapley, task, task.inputs, task.background, task.samples)
    times, values = alternate(mine, theirs, repeats)
    reference = shapley(task, task.inputs, task.background, REFERENCE, 1000, sampling="kernel")
    errors = [error(found, reference) for found in values]
    kernel = [
        shapley(task, task.inputs, task.background, task.samples, seed, sampling="kernel")
        for seed in range(repeats)
    ]
    return row(task, "shap.KernelExplainer(l1_reg=False)", task.samples, times) | {
        "error": errors[0],
        "peer_error": errors[1],
        "error_ratio": errors[0] / errors[1],
        "error_kernel_sampling": error(kernel, reference),
    }


def shapley(
    task: Task,
    inputs: Tensor,
    background: Tensor,
    samples: int,
    seed: int,
    *,
    sampling: str = "leverage",
) -> Tensor:
    """Return the values of KernelSHAP for all outputs."""
    explainer = KernelSHAP(
        samples=samples, sampling="kernel" if sampling == "kernel" else "leverage"
    )
    draws = torch.Generator().manual_seed(seed)
    found = explainer.explain(task.model, inputs, background, targets="all", generator=draws)
    return found.values.double()


def lime(name: str, instances: int, repeats: int) -> Row:
    """Compare LIME with lime_tabular without discretisation."""
    from lime.lime_tabular import LimeTabularExplainer

    task = Task(name, instances)

    def theirs(seed: int) -> Tensor:
        explainer = LimeTabularExplainer(
            task.background.numpy(),
            discretize_continuous=False,
            sample_around_instance=True,
            feature_selection="none",
            random_state=seed,
        )
        for one in task.inputs.numpy():
            explainer.explain_instance(
                one,
                lambda rows: task.probabilities(torch.as_tensor(rows, dtype=torch.float32)).numpy(),
                labels=range(task.outputs),
                num_features=task.features,
                num_samples=LIME_SAMPLES,
            )
        return torch.zeros(0)

    def mine(seed: int) -> Tensor:
        return (
            LIME(samples=LIME_SAMPLES)
            .explain(
                task.probabilities,
                task.inputs,
                targets="all",
                feature_scales=task.scales,
                generator=torch.Generator().manual_seed(seed),
            )
            .values
        )

    times, _ = alternate(mine, theirs, repeats)
    return row(task, "lime_tabular, not discretised", LIME_SAMPLES, times)


def captum(name: str, instances: int, repeats: int) -> Row:
    """Compare KernelSHAP with captum's KernelShap, which takes one background row."""
    from captum.attr import KernelShap

    task = Task(name, instances)
    blank = task.background.mean(0, keepdim=True)

    def theirs(seed: int) -> Tensor:
        torch.manual_seed(seed)
        explainer = KernelShap(task.model)
        found = [
            torch.cat(
                [
                    explainer.attribute(one[None], blank, target=output, n_samples=task.samples)
                    for one in task.inputs
                ]
            )
            for output in range(task.outputs)
        ]
        return torch.stack(found, dim=2)

    times, _ = alternate(partial(shapley, task, task.inputs, blank, task.samples), theirs, repeats)
    return row(task, "captum KernelShap", task.samples, times)


def superpixels(instances: int) -> Row:
    """Measure KernelSHAP on 7 x 7 superpixels of MNIST with a CNN, all outputs."""
    data = mnist()
    body = cnn(input_shape=(1, 28, 28), num_classes=10, seed=0, width=16)
    model = trained(data, body, epochs=1, records=9600)
    inputs = data.test.inputs[:instances].view(-1, 1, 28, 28)
    explainer = KernelSHAP(samples=SUPERPIXEL_SAMPLES, cells=7)
    start = time.process_time()
    clock = time.perf_counter()
    found = explainer.explain(model, inputs, torch.zeros(1, 1, 28, 28), targets="all")
    seconds = time.process_time() - start
    return {
        "benchmark": "explain",
        "data": "MNIST",
        "peer": None,
        "instances": len(inputs),
        "features": 49,
        "outputs": found.values.shape[-1],
        "samples": SUPERPIXEL_SAMPLES,
        "seconds": seconds,
        "wall_seconds": time.perf_counter() - clock,
        "accuracy": accuracy(model, inputs, data.test.labels[:instances]),
    }


def main() -> None:
    """Measure the requested rows, print them, and store them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("shap", "lime", "captum", "superpixels"))
    parser.add_argument("--instances", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="store the rows in this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the packages about each other
    wanted: list[Callable[[], Row]] = []
    for name in DATA:
        if args.only in (None, "shap"):
            wanted.append(partial(kernel_shap, name, args.instances, args.repeats))
        if args.only in (None, "lime"):
            wanted.append(partial(lime, name, args.instances, args.repeats))
        if args.only in (None, "captum"):
            # captum runs the model for one coalition at a time
            wanted.append(partial(captum, name, 2, 1))
    if args.only in (None, "superpixels"):
        wanted.append(partial(superpixels, args.images))
    found: list[Row] = []
    for measure in wanted:
        found.append(measure())
        print(", ".join(f"{key} {shown(value)}" for key, value in found[-1].items()), flush=True)
        if args.json:
            store_rows(args.json, found, seed=0)


def shown(value: object) -> str:
    """Format a number with four digits; return other values as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
