"""Time of the clipped gradient sum for many kinds of models, relative to the plain gradient.

It compares perdure, `vmap(grad)`, and Opacus in its three modes (hooks, functorch, ghost clipping)
on one ready batch, in turn. All compute gradients, norms and the clipped sum; none draws noise,
takes a step or writes a ledger (for these see `dp_step.py`). perdure also rounds to its grid if it
clips record by record.

`time_ratio` is processor time relative to the plain gradient of the same turn, median over turns.
A mode of Opacus that cannot run a model has no time. perdure's row says how it compares with
`vmap(grad)`, and with the best mode of Opacus.

    python benchmarks/speed/private_models.py --repeats 7
    python benchmarks/speed/private_models.py depthwise conv3d --batch 64 --repeats 3
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from perdure.contract import Forward
from perdure.data import Batch, Records
from perdure.models import Transformer, resnet18, transformer
from perdure.privacy.clipping import Clip
from perdure.queries import clipped_gradient
from perdure.utils import flushed, store_rows

CLASSES = 10
CLIP_NORM = 1.0
GRID_STEPS = 2**24
METHODS = ("plain", "perdure", "vmap", "opacus_hooks", "opacus_functorch", "opacus_ghost")
BATCHES = (64, 256)
VMAP_TARGET = 1.1
"""Largest ratios of times that are aimed at: to `vmap(grad)`, and to Opacus's best mode."""

Step = Callable[[], object]


# ---------------------------------------------------------------------------------- models


def mlp() -> nn.Module:
    """Make a perceptron of widths 256, 4,096 and 10."""
    return nn.Sequential(nn.Linear(256, 4096), nn.ReLU(), nn.Linear(4096, CLASSES))


def resnet() -> nn.Module:
    """Make a ResNet-18 with GroupNorm and an eighth of the usual width."""
    return resnet18(input_shape=(3, 32, 32), num_classes=CLASSES, seed=0, width=8)


SMALL: dict[str, Any] = {
    "input_shape": (3, 32, 32),
    "patch": 4,
    "width": 64,
    "depth": 3,
    "heads": 4,
    "hidden": 128,
}


def vit_embedding() -> nn.Module:
    """Make a transformer of three blocks; class token and positions are rows of an embedding."""
    return transformer(num_classes=CLASSES, seed=0, **SMALL)


class WithParameters(nn.Module):
    """The same transformer, with class token and positions as parameters of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Transformer(**SMALL)
        del self.body.positions
        self.token = nn.Parameter(torch.zeros(1, 1, 64))
        self.places = nn.Parameter(0.02 * torch.randn(1, 65, 64))
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits (n, CLASSES) of images (n, 3, 32, 32)."""
        n = len(x)
        squares = x.reshape(n, 3, 8, 4, 8, 4).permute(0, 2, 4, 1, 3, 5).reshape(n, 64, 48)
        tokens = torch.cat([self.token.expand(n, -1, -1), self.body.embed(squares)], 1)
        answer: Tensor = self.head(self.body.encode(tokens + self.places)[:, 0])
        return answer


class Words(nn.Module):
    """Model of word embedding, Opacus's GRU, and a head on the mean of the GRU's outputs."""

    def __init__(self) -> None:
        super().__init__()
        from opacus.layers import DPGRU

        self.embed = nn.Embedding(200, 32)
        self.recur = DPGRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits (n, CLASSES) of words (n, length)."""
        answer: Tensor = self.head(self.recur(self.embed(x))[0].mean(1))
        return answer


def depthwise() -> nn.Module:
    """Make three depthwise separable blocks for images, with GroupNorm."""

    def block(ins: int, outs: int, stride: int) -> list[nn.Module]:
        deep = nn.Conv2d(ins, ins, 3, stride, 1, groups=ins)
        wide = nn.Conv2d(ins, outs, 1)
        norms = nn.GroupNorm(4, ins), nn.GroupNorm(4, outs)
        return [deep, norms[0], nn.ReLU(), wide, norms[1], nn.ReLU()]

    first = nn.Conv2d(3, 16, 3, 1, 1)
    blocks = [*block(16, 32, 2), *block(32, 64, 1), *block(64, 64, 2)]
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)]
    return nn.Sequential(first, nn.ReLU(), *blocks, *last)


def conv3d() -> nn.Module:
    """Make a model of two convolutions over volumes."""
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(2),
        nn.Flatten(),
        nn.Linear(128, CLASSES),
    )


def without_rule() -> nn.Module:
    """Make a perceptron with a learned slope, for which there is no clipping rule."""
    layers = nn.Linear(3072, 64), nn.PReLU(), nn.Linear(64, CLASSES)
    return nn.Sequential(nn.Flatten(), *layers)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (256,)),
    "resnet18": (resnet, (3, 32, 32)),
    "vit_parameters": (WithParameters, (3, 32, 32)),
    "vit_embedding": (vit_embedding, (3, 32, 32)),
    "embedding_gru": (Words, (16,)),
    "depthwise": (depthwise, (3, 32, 32)),
    "conv3d": (conv3d, (1, 16, 16, 16)),
    "without_rule": (without_rule, (3, 32, 32)),
}


def data(name: str, batch: int) -> tuple[Tensor, Tensor]:
    """Make random inputs and labels; speed does not depend on values."""
    draw = torch.Generator().manual_seed(0)
    shape = (batch, *MODELS[name][1])
    words = name == "embedding_gru"
    inputs = (
        torch.randint(200, shape, generator=draw) if words else torch.rand(shape, generator=draw)
    )
    return inputs, torch.randint(0, CLASSES, (batch,), generator=draw)


# ---------------------------------------------------------------------------------- contestants


def losses(forward: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    """Compute the (n,) cross entropies of a batch."""
    return F.cross_entropy(forward(batch.inputs), batch.labels, reduction="none")


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Prepare the gradient of the mean loss."""
    params = list(model.parameters())
    return lambda: torch.autograd.grad(F.cross_entropy(model(x), y), params)


def perdure(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Prepare the clipped sum as a learner computes it."""
    batch = Batch.current(Records(inputs=x, labels=y), 0)
    params: dict[str, Tensor] = dict(model.named_parameters())
    clip = Clip(norm=CLIP_NORM, steps=GRID_STEPS)
    forward = Forward(model)
    return lambda: clipped_gradient(forward, losses, params, batch, clip, None)


def clipped(rows: Iterable[Tensor]) -> list[Tensor]:
    """Compute the clipped sum of rows, with norms in float32 and one product per parameter."""
    tables = [row.flatten(1) for row in rows]
    norms = torch.stack([torch.linalg.vector_norm(table, dim=1) for table in tables])
    factors = (CLIP_NORM / torch.linalg.vector_norm(norms, dim=0)).clamp(max=1.0)
    return [factors @ table for table in tables]


def vmap(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Prepare the clipped sum by `torch.func.vmap` over `torch.func.grad`."""
    params = {name: value.detach() for name, value in model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(model, params, (x[None],))
        return F.cross_entropy(logits, y[None])

    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    return lambda: clipped(rows(params, x, y).values())


def opacus_rows(model: nn.Module, x: Tensor, y: Tensor, *, functorch: bool) -> Step:
    """Prepare Opacus's per-record gradients, by its grad samplers or by functorch."""
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(model, force_functorch=functorch)
    params = list(model.parameters())

    def step() -> object:
        wrapped.zero_grad()
        F.cross_entropy(wrapped(x), y).backward()  # type: ignore[no-untyped-call]
        return clipped([param.grad_sample for param in params])  # type: ignore[attr-defined]

    return step


def opacus_ghost(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Prepare Opacus's ghost clipping: one backward pass for norms, a second one for the sum."""
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    # the engine's own loss does both passes; its optimiser and loader are not used
    made: Any = PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=len(x)),
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=0.0,
        max_grad_norm=CLIP_NORM,
        poisson_sampling=False,
        grad_sample_mode="ghost",
    )
    wrapped, criterion = made[0], made[2]

    def step() -> None:
        wrapped.zero_grad()
        criterion(wrapped(x), y).backward()

    return step


def contestant(method: str, model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Prepare one step of a method on a copy of the model."""
    own = copy.deepcopy(model)
    if method.startswith("opacus"):
        if method == "opacus_ghost":
            return opacus_ghost(own, x, y)
        return opacus_rows(own, x, y, functorch=method == "opacus_functorch")
    return {"plain": plain, "perdure": perdure, "vmap": vmap}[method](own, x, y)


# ---------------------------------------------------------------------------------- measuring


def timed(step: Step) -> float:
    """Measure the processor time of a step."""
    start = time.process_time()
    step()
    return time.process_time() - start


def measure(name: str, batch: int, repeats: int) -> list[dict[str, object]]:
    """Time the methods in turn; every ratio is the median over turns of method / plain."""
    torch.manual_seed(0)
    model = MODELS[name][0]()
    x, y = data(name, batch)
    steps: dict[str, Step] = {}
    for method in METHODS:
        step = contestant(method, model, x, y)
        try:
            step()
        except Exception as error:  # whatever a foreign mode cannot run
            if not method.startswith("opacus"):
                raise
            print(f"{name}: {method} fails: {str(error).splitlines()[0]}")
        else:
            steps[method] = step
    turns = [{method: timed(step) for method, step in steps.items()} for _ in range(repeats)]
    ratios = {
        method: statistics.median(turn[method] / turn["plain"] for turn in turns)
        for method in steps
    }
    rows: list[dict[str, object]] = [
        {
            "benchmark": "private_models",
            "model": name,
            "batch": batch,
            "method": method,
            "time_ratio": ratios.get(method),
            "milliseconds": 1e3 * statistics.median(turn[method] for turn in turns)
            if method in steps
            else None,
            "repeats": repeats,
        }
        for method in METHODS
    ]
    judged = judgement(ratios)
    return [row | judged if row["method"] == "perdure" else row for row in rows]


def judgement(ratios: dict[str, float]) -> dict[str, object]:
    """Compare perdure with the methods that it should not be slower than."""
    best = min(value for method, value in ratios.items() if method.startswith("opacus"))
    over_vmap = ratios["perdure"] / ratios["vmap"]
    over_opacus = ratios["perdure"] / best
    return {
        "over_vmap": over_vmap,
        "over_best_opacus": over_opacus,
        "target": {"over_vmap": VMAP_TARGET, "over_best_opacus": 1.0},
        "met": over_vmap <= VMAP_TARGET and over_opacus <= 1.0,
    }


def show(rows: Iterable[dict[str, object]]) -> None:
    """Print the rows as a table."""
    table = Table(title="a clipped gradient sum relative to the plain gradient, one thread")
    columns = ("model", "batch", "method", "time_ratio", "over_vmap", "over_best_opacus", "met")
    for column in columns:
        table.add_column(column.replace("_", " "))
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        table.add_row(*[f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells])
    Console(width=120).print(table)


def main() -> None:
    """Measure the models at both batch sizes."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; all by default"
    )
    parser.add_argument("--batch", type=int, action="append", help="batch size; 64 and 256")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="store the rows in this file")
    args = parser.parse_args()
    unknown = sorted(set(args.models) - set(MODELS))
    if unknown:
        parser.error(f"unknown models {unknown}; allowed: {', '.join(MODELS)}")
    torch.set_num_threads(1)
    with flushed():
        rows = [
            row
            for name in args.models or MODELS
            for batch in args.batch or BATCHES
            for row in measure(name, batch, args.repeats)
        ]
    show(rows)
    if args.json:
        store_rows(args.json, rows, seed=0)


if __name__ == "__main__":
    main()
