"""Results over seeds: means and standard errors of the trials of an arm."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, cast

from perdure.experiment.config import Arm
from perdure.experiment.finding_rows import each_once
from perdure.experiment.result_schema import MEASURES, ArmResult, TrialResult

ROBUST = ("robust_forgetting", "robust_backward_transfer", "zero_gradients")
"""Keys of a trial's result that it has only since robustness is measured over time."""

CERTIFIED = ("certified_accuracy", "certified_forgetting")
"""Keys of a trial's result that it has only since certificates are measured."""

REASONS = ("reason_correlation", "reason_overlap")
"""Keys of a trial's result that it has only since the drift of reasons is measured."""

MATRICES = ("robust_matrix", "certified_matrix", "reason_matrix", "reason_overlap_matrix")
"""Keys of matrices that a trial has only if they are measured."""

AVERAGED = (*MEASURES, "robust_accuracy", *ROBUST, *CERTIFIED, *REASONS)
"""Keys of a trial's result that are averaged over seeds, with a standard error."""


def arm_result(arm: Arm, trials: Sequence[TrialResult]) -> ArmResult:
    """Combine the trials of an arm into one result, with means and standard errors over seeds.

    Args:
        arm: arm of the config.
        trials: results of the arm, one for each seed of the run.
    """
    done = [trial for trial in trials if trial["failure"] is None]
    columns = {name: _known(done, name) for name in AVERAGED}
    worst = max(trials, key=lambda trial: trial["epsilon"]["value"] if trial["epsilon"] else 0.0)
    errors = [trial["calibration_error"] for trial in done]
    calibrated = [each for each in errors if each is not None]
    row: dict[str, Any] = {
        "name": arm.name,
        "strategy": arm.file,
        "options": repr(arm.strategy),
        "private": arm.private,
        "accuracy_matrix": _mean_matrix([trial["accuracy_matrix"] for trial in done]),
        **{name: _known_matrix(done, name) for name in MATRICES},
        **{name: mean(values) for name, values in columns.items()},
        "calibration_error": _mean_rows(calibrated) if calibrated else None,
        "state_bytes": max(trial["state_bytes"] for trial in trials),
        "seconds": sum(trial["seconds"] for trial in trials),
        "standard_error": {name: standard_error(values) for name, values in columns.items()},
        "epsilon": worst["epsilon"],
        "epsilon_over_time": worst["epsilon_over_time"],
        "spending": worst["spending"],
        "failures": [
            {name: trial[name] for name in ("seed", "trial", "failure")}
            for trial in trials
            if trial["failure"] is not None
        ],
        "findings": each_once(row for trial in trials for row in trial.get("findings", ())),
        "seeds": list(trials),
    }
    return cast(ArmResult, row)


def _known_matrix(trials: Sequence[TrialResult], name: str) -> list[list[float | None]] | None:
    """Average the matrices of one name over seeds; None where no trial has one."""
    known = [matrix for trial in trials if (matrix := cast(Any, trial).get(name))]
    return _mean_matrix(known) if known else None


def mean(values: Sequence[float]) -> float | None:
    """Mean of some numbers, or None where there is none; one number is returned as it is."""
    if len(values) < 2:
        return values[0] if values else None
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean: sample deviation / sqrt(n); None below two numbers."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _known(trials: Sequence[TrialResult], name: str) -> list[float]:
    """Return the values of one number from all trials in which it was measured."""
    values = [cast(Any, trial).get(name) for trial in trials]
    if len(values) == 1:  # as it is, not-a-number included
        return [value for value in values if value is not None]
    return [value for value in values if value is not None and not math.isnan(value)]


def _mean_matrix(
    matrices: Sequence[Sequence[Sequence[float | None]]],
) -> list[list[float | None]]:
    """Average accuracy matrices over seeds, each entry over the seeds at which it was measured.

    Seeds may have streams with different numbers of experiences; the result has the shape of the
    largest matrix. An entry that no seed measured is null.
    """
    rows = max(map(len, matrices), default=0)
    return [_mean_rows([matrix[i] for matrix in matrices if i < len(matrix)]) for i in range(rows)]


def _mean_rows(rows: Sequence[Sequence[float | None]]) -> list[Any]:
    if len(rows) == 1:
        return list(rows[0])
    width = max(map(len, rows))
    columns = [[row[j] for row in rows if j < len(row)] for j in range(width)]
    known = [
        [value for value in column if value is not None and not math.isnan(value)]
        for column in columns
    ]
    return [mean(values) if values else math.nan for values in known]
