"""File of calibrated noise multipliers in a run's folder, so that each plan is calibrated once.

Guarantee: the file only saves computing time. A noise multiplier from the file is used in
`Ledger.grant`, which refuses the plan unless its epsilon was checked, now or when the same plan was
written to the ledger. So a changed file cannot make a run cost more privacy.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

from perdure.planning.budget import horizon, planned
from perdure.planning.training_plan import TrainingPlan
from perdure.privacy.accounting.calibration import NOISE_RANGE
from perdure.privacy.accounting.charges import merged
from perdure.privacy.private_sum import Schedule
from perdure.utils.atomic_files import write_json
from perdure.utils.hashing import canonical_text

FILE = "calibration.json"
VERSION = 1
REFERENCES = (1.0, 2.0)
"""Noise multipliers at which the charges of a plan are computed to identify the plan.

Two are enough, because every charge is linear in the noise.
"""


class KeptNoise:
    """Calibrated noise multipliers of the plans of one folder.

    Args:
        folder: folder of the run or client; None to store nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = folder / FILE if folder else None

    def recall(self, training: TrainingPlan) -> Schedule | None:
        """Return the stored noise for this plan; None if there is none."""
        if not _is_calibrated(training):
            return None
        noise = self._read().get(plan_key(training), [])
        return Schedule(noise=tuple(noise)) if _fits(noise, training) else None

    def keep(self, training: TrainingPlan, schedule: Schedule) -> None:
        """Store the noise that was calibrated for this plan."""
        if self._path is None or not _is_calibrated(training):
            return
        key = plan_key(training)
        kept = self._read()
        if kept.get(key) != list(schedule.noise):
            plans = {**kept, key: list(schedule.noise)}
            # if it cannot be stored, for example because of a folder of that name, it is computed
            # again
            with suppress(OSError, RecursionError):
                write_json(self._path, {"version": VERSION, "plans": plans})

    def _read(self) -> Mapping[str, list[float]]:
        """Noise multipliers in the file, by the key of the plan; empty if it cannot be read."""
        try:
            found = json.loads(self._path.read_text()) if self._path else {}
            plans = found["plans"] if found.get("version") == VERSION else {}
        except (OSError, ValueError, AttributeError, KeyError, RecursionError):
            return {}
        return plans if isinstance(plans, dict) else {}


def plan_key(training: TrainingPlan) -> str:
    """Digest of everything that decides the noise of a plan; key of the plan in the file."""
    privacy = training.privacy
    assert privacy is not None
    histories = [
        {
            name: [list(astuple(charge)) for charge in merged(charges)]
            for name, charges in planned(training, Schedule(noise=(noise,))).items()
        }
        for noise in REFERENCES
    ]
    budget = [list(privacy.epsilons), isinstance(privacy.epsilon, tuple), privacy.delta]
    reuses = training.strategy.privacy_cost.reuses_past_records
    least = [list(training.lost.noise)] if training.lost else []
    text = canonical_text([VERSION, budget, reuses, histories, *least])
    return hashlib.sha256(text.encode()).hexdigest()


def _is_calibrated(training: TrainingPlan) -> bool:
    """Return True if the noise of a plan is computed from a budget, which the ledger checks."""
    privacy = training.privacy
    return (
        privacy is not None
        and bool(privacy.epsilons)
        and privacy.noise_multiplier is None
        and privacy.diagnostics == "released"
    )


def _fits(noise: object, training: TrainingPlan) -> bool:
    """Return True if a stored value can be the noise of this plan."""
    privacy = training.privacy
    assert privacy is not None
    wanted = len(horizon(training)) if isinstance(privacy.epsilon, tuple) else 1
    return (
        isinstance(noise, list)
        and len(noise) == wanted
        and all(isinstance(value, float) and math.isfinite(value) for value in noise)
        and all(NOISE_RANGE[0] <= value <= NOISE_RANGE[1] for value in noise)
    )
