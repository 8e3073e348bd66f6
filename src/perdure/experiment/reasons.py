"""Drift of reasons: agreement of explanations of fixed probes with those when they were learnt."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import torch
from safetensors.torch import load_file

from perdure.data.experience import Stage, Stream
from perdure.data.records import Records
from perdure.experiment.explain_config import ExplainConfig
from perdure.explain import Attribution, grid_groups, rank_correlation, top_overlap
from perdure.learner.learner import Learner
from perdure.utils.atomic_files import save_tensors
from perdure.utils.seeding import generator


class ReasonRow(TypedDict):
    """Agreement of explanations after an experience, for the probes of each experience so far.

    Args:
        correlation: mean rank correlation with the explanations when the experience was learnt.
        overlap: mean share of the most important tenth of the features that are the same.
    """

    correlation: list[float | None]
    overlap: list[float | None]


class ReasonNumbers(TypedDict):
    """Drift of reasons of a trained model, for a run's result; null where it is not measured."""

    reason_matrix: Sequence[Sequence[float | None]] | None
    reason_overlap_matrix: Sequence[Sequence[float | None]] | None
    reason_correlation: float | None
    reason_overlap: float | None


def reasons_after(
    learner: Learner, stream: Stream, chosen: ExplainConfig, folder: Path, index: int, seed: int
) -> ReasonRow:
    """Explain the probes of every experience that a learner has seen, and compare them with before.

    Probes are test records, which are public; the label of each is explained. The first explanation
    of an experience is stored in `folder`.

    Args:
        learner: learner after stage `index`.
        stream: stream of the run.
        chosen: explainer and number of probes of an experience.
        folder: folder of the arm.
        index: number of the stage that was trained last.
        seed: seed of the explainer's random numbers.
    """
    stages = stream.to(learner.device).stages
    last = stages[index].last
    row: ReasonRow = {"correlation": [], "overlap": []}
    for stage in stages[: index + 1]:
        probes = _probes(stage, chosen.records)
        if probes is None:
            row["correlation"].append(None)
            row["overlap"].append(None)
            continue
        now = _explained(learner, stage, last, probes, chosen, seed)
        then = _first(folder / f"reasons-{stage.number}.safetensors", now)
        row["correlation"].append(float(rank_correlation(now, then).mean()))
        row["overlap"].append(float(top_overlap(now, then).mean()))
    return row


def _probes(stage: Stage, count: int) -> Records | None:
    """Return test records from the whole stage, at even distances; None if there are none."""
    count = min(count, len(stage.test))
    return stage.test.take(torch.arange(count) * len(stage.test) // count) if count else None


def _explained(
    learner: Learner, stage: Stage, last: int, probes: Records, chosen: ExplainConfig, seed: int
) -> Attribution:
    """Explain the labels of the probes; superpixels count as one feature each."""
    explainer = chosen.explainer
    inputs = probes.inputs
    with torch.no_grad():
        found = explainer.explain(
            learner.predictor(stage.latest(last), after=last),
            inputs,
            chosen.background(inputs),
            targets=probes.labels,
            generator=generator(seed, "reasons", stage.number),
        )
    cells = getattr(explainer, "cells", None)
    shape = inputs.shape[1:]
    values = found.values if cells is None else found.by_group(grid_groups(shape, cells))
    return Attribution(values=values, base=found.base, targets=found.targets)


def _first(path: Path, now: Attribution) -> Attribution:
    """Return the stored explanation of the same probes; without one, store and return `now`."""
    if not path.exists():
        save_tensors(path, {"values": now.values})
        return now
    values = load_file(path)["values"].to(now.values.device)
    return Attribution(values=values, base=now.base, targets=now.targets)


def reason_numbers(rows: Sequence[ReasonRow]) -> ReasonNumbers:
    """Return the drift of reasons of an arm, from its rows after each stage; none for no rows."""
    if not rows:
        return without_reasons()
    several = len(rows) > 1
    return {
        "reason_matrix": _matrix([row["correlation"] for row in rows]),
        "reason_overlap_matrix": _matrix([row["overlap"] for row in rows]),
        "reason_correlation": _mean(rows[-1]["correlation"][:-1]) if several else None,
        "reason_overlap": _mean(rows[-1]["overlap"][:-1]) if several else None,
    }


def _matrix(rows: Sequence[list[float | None]]) -> list[list[float | None]]:
    width = len(rows[-1])
    return [[*row, *[None] * (width - len(row))] for row in rows]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def without_reasons() -> ReasonNumbers:
    """Return the drift of reasons of an arm in which it is not measured: null."""
    return {
        "reason_matrix": None,
        "reason_overlap_matrix": None,
        "reason_correlation": None,
        "reason_overlap": None,
    }
