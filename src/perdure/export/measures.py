"""Checks and measurements of an artifact, made by running it."""

import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from perdure.data.experience import Stream
from perdure.data.records import Records
from perdure.errors import ExportError
from perdure.export.formats import Format, Runner
from perdure.export.predictor import Predictor
from perdure.metrics import evaluate

TOLERANCE = 1e-5
"""Largest allowed difference of an artifact's output, relative to outputs above 1."""
CHECKED_ROWS = 256
"""Largest number of records on which an artifact is compared with the predictor."""
TIMED_ROWS = 32
"""Number of records in a call whose time is measured."""
TIMED_CALLS = 20


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Measurements of the exported model as trained, or after an option such as pruning.

    Args:
        name: name of the variant, such as "as trained" or "pruned".
        size_bytes: size of the variant's files.
        compressed_bytes: size of the variant's files in a zip archive (deflate).
        milliseconds: median time of a call with `rows_per_call` records, on this machine's
            processor.
        rows_per_call: number of records in a timed call.
        scores: the task's metric on the test records of every stage; None without test records.
        score: mean of `scores`; None where there is none.
        largest_difference: largest difference of the files' outputs from the predictor's; see
            `TOLERANCE`.
        zero_share: share of the model's parameters that are 0; None for int8 weights.
    """

    name: str
    size_bytes: int
    compressed_bytes: int
    milliseconds: float
    rows_per_call: int
    scores: tuple[float | None, ...]
    score: float | None
    largest_difference: float
    zero_share: float | None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Public records that artifacts are checked and measured on: the test records, by stage.

    Args:
        tests: test records of every stage.
        blank: (1, ...) an input of zeros.
    """

    tests: Sequence[Records]
    blank: Tensor

    @classmethod
    def of(cls, stream: Stream) -> "Rows":
        """Take the test records of a stream."""
        like = stream[0].test.inputs
        return cls(
            tests=[stage.test.to("cpu") for stage in stream.stages],
            blank=torch.zeros(1, *like.shape[1:], dtype=like.dtype),
        )

    def checked(self) -> tuple[Tensor, Tensor]:
        """Return inputs (n, ...) and tasks (n,) to compare an artifact with the predictor.

        They are equally many test records of every stage, and three blank inputs, so that a stream
        without test records has inputs to compare, too.
        """
        each = max(1, CHECKED_ROWS // len(self.tests))
        inputs = [rows.inputs[:each] for rows in self.tests]
        tasks = [torch.full((len(rows),), number) for number, rows in enumerate(inputs)]
        blank = self.blank.expand(3, *self.blank.shape[1:])
        return torch.cat([*inputs, blank]), torch.cat([*tasks, torch.zeros(3, dtype=torch.int64)])


def measured(name: str, predictor: Predictor, kind: Format, rows: Rows, folder: Path) -> Variant:
    """Write a predictor's files, run them, compare their outputs, and return measurements.

    Args:
        name: name of the variant.
        predictor: predictor to write.
        kind: format to write.
        rows: public records.
        folder: folder of the files.

    Raises:
        ExportError: if the outputs differ by more than `TOLERANCE`.
    """
    kind.write(predictor, rows.blank, folder)
    run = kind.load(predictor, folder)
    by_task = predictor.by_task
    with torch.no_grad():
        difference = _difference(predictor, run, rows)
        scores = _scores(run, rows.tests, by_task=by_task)
        inputs, tasks = rows.checked()
        given = (inputs[:TIMED_ROWS], tasks[:TIMED_ROWS])[: 1 + by_task]
        seconds = [_seconds(lambda: run(*given)) for _ in range(TIMED_CALLS)]
    files = [folder / each for each in kind.files]
    parameters = [value.detach() for value in predictor.model.parameters()]
    known = [score for score in scores if score is not None]
    return Variant(
        name=name,
        size_bytes=sum(path.stat().st_size for path in files),
        compressed_bytes=sum(len(zlib.compress(path.read_bytes())) for path in files),
        milliseconds=round(1000 * statistics.median(seconds), 3),
        rows_per_call=len(given[0]),
        scores=tuple(scores),
        score=statistics.fmean(known) if known else None,
        largest_difference=difference,
        zero_share=_zero_share(parameters),
    )


def _difference(predictor: Predictor, run: Runner, rows: Rows) -> float:
    """Return the largest difference between an artifact's outputs and the predictor's.

    Raises:
        ExportError: if the difference is above `TOLERANCE`.
    """
    inputs, tasks = rows.checked()
    worst = 0.0
    for first, last in ((0, len(inputs)), (0, 1)):  # many records, and one
        given = (inputs[first:last], tasks[first:last])[: 1 + predictor.by_task]
        expected = predictor(*given)
        found = run(*given)
        if found.shape != expected.shape:
            raise ExportError(
                f"the exported model has outputs of shape {tuple(found.shape)}; allowed: "
                f"{tuple(expected.shape)}, as the predictor; no file was kept; export to another "
                "format"
            )
        apart = (found.double() - expected.double()).abs() / expected.double().abs().clamp(min=1)
        worst = max(worst, apart.nan_to_num(nan=float("inf")).max().item())
    if worst > TOLERANCE:
        raise ExportError(
            f"outputs of the exported model differ from the predictor's by {worst:.2g}; allowed: "
            f"at most {TOLERANCE:g}; no file was kept; export to another format"
        )
    return worst


def scores_of(
    predict: Callable[..., Tensor], rows: Rows, *, by_task: bool
) -> tuple[float | None, ...]:
    """Return the task's metric of a predicting function on the test records of every stage."""
    with torch.no_grad():
        return tuple(_scores(predict, rows.tests, by_task=by_task))


def _scores(
    run: Callable[..., Tensor], tests: Sequence[Records], *, by_task: bool
) -> list[float | None]:
    found: list[float | None] = []
    for number, test in enumerate(tests):

        def answers(x: Tensor, number: int = number) -> Tensor:
            return run(x, torch.full((len(x),), number)) if by_task else run(x)

        score = evaluate(test.task, answers, test.inputs, test.labels)
        found.append(score if len(test) else None)
    return found


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _zero_share(values: Sequence[Tensor]) -> float | None:
    if not all(value.is_floating_point() for value in values):
        return None
    zeros = sum(int((value == 0).sum()) for value in values)
    return zeros / max(1, sum(value.numel() for value in values))
