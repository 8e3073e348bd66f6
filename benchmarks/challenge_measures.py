"""Measures of `challenges.py`: a number of a finished run, and the doctor's findings about it."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rows import Row
from torch.utils.flop_counter import FlopCounterMode

from perdure import Learner
from perdure.data import digits, permuted
from perdure.doctor.rules import find
from perdure.experiment import examine_run, export_run, load, parse, run, toml_text, tune
from perdure.explain import find as find_explainer
from perdure.models import mlp
from perdure.strategies import Naive

EXPLAINED = 10
"""Number of test records whose explanations are compared."""
REFERENCE = 32_768
"""Samples of the explanation that the others are compared with."""
TRIALS = 15
"""Trainings of a search for hyper-parameters."""
OWN = ("export", "tune")
"""Tables of a set-up that are not for the config, but for what happens after or before the run."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished run, for a measure.

    Args:
        folder: folder of the run.
        trial: row of its only training.
        tables: tables of its config, with those of `OWN`.
        seed: seed of the run.
        kept: largest number of bytes that a pass kept for its backward pass.
        seconds: processor time of the run.
    """

    folder: Path
    trial: Row
    tables: Mapping[str, Any]
    seed: int
    kept: int
    seconds: float

    @property
    def learner(self) -> Learner:
        """Learner with the trained model."""
        return load(self.folder, self.trial["trial"])


# --------------------------------------------------------------------------- measures


def of_result(name: str) -> Callable[[Finished], float]:
    """Return a function that reads a number of the training's row."""
    return lambda done: float(done.trial[name])


def stored_bytes(done: Finished) -> float:
    """Bytes of the strategy's state, and of the records that its memory may hold."""
    arm = done.tables["arms"][0]
    train = done.learner.stream[0].train
    record = train.inputs[0].nbytes + train.labels[0].nbytes + train.ids[0].nbytes
    return float(done.trial["state_bytes"] + arm.get("memory_size", 0) * record)


def multiply_adds(done: Finished) -> float:
    """Multiplications with additions in a forward pass of one record."""
    learner = done.learner
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        learner.model(learner.stream[0].test.inputs[:1])
    return float(counted.get_total_flops()) / 2


def exported_bytes(done: Finished) -> float:
    """Bytes of the exported model, in the format safetensors."""
    folder = done.folder / "exported"
    options = dict(done.tables.get("export", {}))
    export_run(done.folder, folder=folder, to="safetensors", **options)
    return float((folder / "model.safetensors").stat().st_size)


def fidelity(done: Finished) -> float:
    """Correlation, in percent, of an explanation's values with those of `REFERENCE` samples."""
    learner = done.learner
    predict = learner.predictor(0, after=0)
    inputs = learner.stream[0].test.inputs[:EXPLAINED]
    background = torch.zeros_like(inputs[:1])
    kind: Any = find_explainer(done.tables["explain"]["method"])  # its fields differ
    samples = done.tables["explain"]["samples"]
    found = []
    for number, seed in ((samples, done.seed), (REFERENCE, 10_000 + done.seed)):
        draws = torch.Generator().manual_seed(seed)
        explainer = kind(samples=number)
        found.append(explainer.explain(predict, inputs, background, generator=draws).values)
    rows = [each.flatten(1) - each.flatten(1).mean(1, keepdim=True) for each in found]
    return 100 * float(torch.cosine_similarity(rows[0], rows[1], dim=1).mean())


MEASURES: dict[str, tuple[str, bool, Callable[[Finished], float]]] = {
    "average_accuracy": ("accuracy in %", True, of_result("average_accuracy")),
    "robust_accuracy": ("accuracy in %, under attack", True, of_result("robust_accuracy")),
    "stored_bytes": ("bytes of state and stored records", False, stored_bytes),
    "step_bytes": ("bytes kept for a backward pass", False, lambda done: float(done.kept)),
    "cpu_seconds": ("seconds of processor time", False, lambda done: done.seconds),
    "multiply_adds": ("multiply-adds of a forward pass", False, multiply_adds),
    "exported_bytes": ("bytes of the exported model", False, exported_bytes),
    "fidelity": ("correlation with the explanation of 32,768 samples, in %", True, fidelity),
}
"""Measures: unit, direction (True where higher is better), and function."""


class StepBytes:
    """Count the bytes that steps keep for their backward passes; the largest count of a pass."""

    def __init__(self) -> None:
        self.largest = 0
        self._now = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a tensor that a pass keeps."""
        self._now += tensor.nbytes
        self.largest = max(self.largest, self._now)
        return tensor

    def unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Begin a new count: the backward pass has begun."""
        self._now = 0
        return tensor

    def counting(self) -> AbstractContextManager[object]:
        """Return a context in which passes are counted."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)


# --------------------------------------------------------------------------- runs


def measured(
    tables: Mapping[str, Any],
    measure: str,
    seed: int,
    *,
    limits: Mapping[str, Mapping[str, Any]],
    examined: bool,
) -> tuple[float, float | None, list[str]]:
    """Run a set-up.

    Args:
        tables: tables of its config, with those of `OWN`.
        measure: one of `MEASURES`.
        seed: seed of the run.
        limits: thresholds of rules whose limit the user declares, such as the memory of a device.
        examined: True to examine the config before training; it is watched in any case.

    Returns:
        The measure, the accuracy in percent (None after a divergence), and the names of the
        doctor's findings.
    """
    own = {name: tables[name] for name in OWN if name in tables}
    config = {name: value for name, value in tables.items() if name not in OWN} | {"seed": seed}
    if "tune" in own:
        config["training"] = {**config["training"], **tuned(own["tune"], seed)}
    text = toml_text(config)
    rules = [find(name)(**values) for name, values in limits.items()] if examined else []
    count = StepBytes()
    with TemporaryDirectory() as name:
        folder = Path(name) / "run"
        with count.counting() if measure == "step_bytes" else nullcontext():
            result = run(parse(text), text, folder, examine="full" if examined else "no")
        trial: Row = dict(result["arms"][0]["seeds"][0])
        found = [finding["rule"] for finding in trial["findings"]]
        for extra in examine_run(parse(text), rules=rules).values() if rules else ():
            found += [finding.rule for finding in extra]
        seconds = _seconds(text, Path(name) / "timed") if measure == "cpu_seconds" else 0.0
        _, higher, function = MEASURES[measure]
        if trial["failure"] is not None:
            # a training that diverged answers by chance
            return (100.0 / 10 if higher else math.nan), None, found
        done = Finished(
            folder=folder,
            trial=trial,
            tables=tables,
            seed=seed,
            kept=count.largest,
            seconds=seconds,
        )
        return function(done), trial["average_accuracy"], found


def _seconds(text: str, folder: Path) -> float:
    """Processor time of a run without examination."""
    began = time.process_time()
    run(parse(text), text, folder)
    return time.process_time() - began


def tuned(space: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Search for settings of SGD for an MLP on the digits, on held-out training records only.

    Args:
        space: ranges of `learning_rate` and `momentum`.
        seed: seed of the search.
    """

    def make(values: dict[str, Any]) -> Learner:
        return Learner(
            model=mlp(input_shape=(1, 8, 8), num_classes=10, hidden=(64,), seed=seed),
            strategy=Naive(),
            optimizer=partial(
                torch.optim.SGD, lr=values["learning_rate"], momentum=values["momentum"]
            ),
            epochs=10,
            batch_size=32,
            seed=seed,
        )

    ranges = {name: (float(low), float(high)) for name, (low, high) in space.items()}
    # the search needs a later experience, which it does not use; the first is the digits unchanged
    stream = permuted(digits(), experiences=2)
    found = tune(make, ranges, stream, experiences=1, trials=TRIALS, seed=seed)
    return {name: float(value) for name, value in found.values.items()}
