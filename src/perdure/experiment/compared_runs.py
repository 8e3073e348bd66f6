"""Finished runs, read for a comparison: each arm with its numbers at every seed."""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from perdure.errors import ConfigError, RunError
from perdure.experiment.data_config import DataConfig
from perdure.experiment.result_schema import (
    MEASURES,
    ArmResult,
    Epsilon,
    Result,
    TrialResult,
    read_result,
)
from perdure.tasks import Metric

OF_NO_ARM = ("name", "seed", "seeds", "threads", "device", "arms", "data", "explain", "search")
"""Top-level keys of a config that are ignored when the settings of two arms are compared."""
OF_NO_STREAM = ("root", "experiences", "scenario")
"""Fields of `[data]` that are ignored when the streams of two runs are compared."""
PLAIN = (*MEASURES, "robust_accuracy", "state_bytes", "seconds")
"""Keys of a trial's result whose numbers are compared unchanged."""
NUMBERS = (*PLAIN, "calibration_error", "epsilon")
"""All numbers of a trial that are compared."""


@dataclass(frozen=True, kw_only=True)
class ComparedArm:
    """One arm of a comparison, with the numbers that were measured at each seed.

    Args:
        strategy: name of the strategy.
        options: options of the strategy, such as "EWC(strength=100.0)".
        private: True if the arm was trained with differential privacy.
        trials: for every seed, the numbers that were measured, by name.
        failures: for every seed at which training failed, the reason in one line.
        guarantee: unit, relation and delta of the arm's epsilon; "" without privacy.
        assumptions: accountant, sampling and trust model of the arm's epsilon; "" without privacy.
    """

    strategy: str
    options: str
    private: bool
    trials: Mapping[int, Mapping[str, float]]
    failures: Mapping[int, str]
    guarantee: str
    assumptions: str


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """A finished run with the tables of its config.

    Args:
        folder: folder of the run.
        result: content of the run's `result.json`.
        tables: content of the run's `config.toml`.
    """

    folder: Path
    result: Result
    tables: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "ComparedRun":
        """Read a run.

        Raises:
            RunError: if it is not finished, or a file cannot be read.
        """
        result = read_result(folder)
        path = folder / "config.toml"
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RunError(
                f"{path} cannot be read ({error.strerror}); compare whole folders of runs"
            ) from None
        except ValueError as error:
            raise RunError(f"{path} is not valid TOML ({error}); restore it") from None
        return cls(folder=folder, result=result, tables=tables)

    @property
    def stream(self) -> str:
        """Stream in a few words, such as "digits, class-incremental, 5 experiences"."""
        told = self.result["stream"]
        return f"{told['name']}, {told['scenario']}-incremental, {told['experiences']} experiences"

    def metrics(self) -> dict[str, Metric]:
        """Every metric that an arm may have, by its name in the result."""
        task = self.result["task"]
        base, unit, higher = task["metric"], task["unit"], task["higher_is_better"]
        points = "points" if unit == "%" else unit
        own = {
            "average_accuracy": f"average {base}",
            "learning_accuracy": f"learning {base}",
            "worst_experience_accuracy": f"worst {base}",
            "area_under_accuracy": f"{base} over time",
            "robust_accuracy": f"robust {base}",
        }
        return {
            name: Metric(name=title, unit=unit, higher_is_better=higher)
            for name, title in own.items()
        } | {
            "forgetting": Metric(name="forgetting", unit=points, higher_is_better=False),
            "backward_transfer": Metric(name="backward transfer", unit=points),
            "forward_transfer": Metric(name="forward transfer", unit=points),
            "calibration_error": Metric(name="calibration error", unit="", higher_is_better=False),
            "epsilon": Metric(name="epsilon", unit="", higher_is_better=False),
            "state_bytes": Metric(name="state", unit="bytes", higher_is_better=False),
            "seconds": Metric(name="time", unit="s", higher_is_better=False),
        }

    def settings(self, arm: ArmResult) -> str:
        """Return all settings of an arm except the seed, as text to compare with another arm's."""
        tables = {name: table for name, table in self.tables.items() if name not in OF_NO_ARM}
        return json.dumps([arm["options"], arm["private"], tables], sort_keys=True, default=str)


def refuse_other_data(runs: Sequence[ComparedRun]) -> None:
    """Refuse to compare runs that were trained on different data or streams.

    Raises:
        ConfigError: names the first difference; also if one folder is given twice.
    """
    folders = [run.folder.resolve() for run in runs]
    for number, folder in enumerate(folders):
        if folder in folders[:number]:
            raise ConfigError(f"{runs[number].folder} is given twice; give every run once")
    for other in runs[1:]:
        for (field, one), (_, two) in zip(_facts(runs[0]), _facts(other), strict=True):
            if one != two:
                raise ConfigError(
                    f"{runs[0].folder} has {field} = {one!r} and {other.folder} has {two!r}; "
                    "compare runs on the same data and stream"
                )


def _facts(run: ComparedRun) -> Iterator[tuple[str, object]]:
    """Yield names and values of the facts of the stream that must be equal in compared runs."""
    told = run.result["stream"]
    yield "task", run.result["task"]["name"]
    for name in ("name", "scenario", "experiences"):
        yield f"stream.{name}", told[name]
    asked = run.tables.get("data", {})
    for field in fields(DataConfig):
        if field.name not in OF_NO_STREAM:
            yield f"data.{field.name}", asked.get(field.name, field.default)


def named_arms(runs: Sequence[ComparedRun]) -> dict[str, ComparedArm]:
    """Return the arms of all runs, each under a unique name.

    Arms of one name are one arm with all seeds, if their settings are the same and no seed occurs
    twice; otherwise the name of the run comes first, or its folder where runs have one name.
    """
    found: dict[str, list[tuple[ComparedRun, ArmResult]]] = {}
    for run in runs:
        for arm in run.result["arms"]:
            found.setdefault(arm["name"], []).append((run, arm))
    titles = [run.result["name"] for run in runs]
    named = {}
    for name, same in found.items():
        if _are_one(same):
            named[name] = _joined([arm for _, arm in same])
            continue
        for run, arm in same:
            title = run.result["name"]
            place = title if titles.count(title) == 1 else str(run.folder)
            named[f"{place}/{name}"] = _joined([arm])
    return named


def _are_one(same: Sequence[tuple[ComparedRun, ArmResult]]) -> bool:
    seeds = [trial["seed"] for _, arm in same for trial in arm["seeds"]]
    settings = {run.settings(arm) for run, arm in same}
    return len(settings) == 1 and len(set(seeds)) == len(seeds)


def _joined(arms: Sequence[ArmResult]) -> ComparedArm:
    trials = [trial for arm in arms for trial in arm["seeds"]]
    told = [trial["epsilon"] for trial in trials if trial["epsilon"]]
    return ComparedArm(
        strategy=arms[0]["strategy"],
        options=arms[0]["options"],
        private=arms[0]["private"],
        trials={trial["seed"]: numbers(trial) for trial in trials},
        failures={trial["seed"]: trial["failure"] for trial in trials if trial["failure"]},
        guarantee="; ".join(sorted({guarantee(epsilon) for epsilon in told})),
        assumptions="; ".join(sorted({assumptions(epsilon) for epsilon in told})),
    )


def numbers(trial: TrialResult) -> dict[str, float]:
    """Return the measured numbers of a trial by name; only epsilon if training failed."""
    epsilon = trial["epsilon"]
    found: dict[str, Any] = {"epsilon": epsilon["value"] if epsilon else None}
    if trial["failure"] is None:
        errors = trial["calibration_error"]
        found |= {name: trial[name] for name in PLAIN}  # type: ignore[literal-required]
        found["calibration_error"] = sum(errors) / len(errors) if errors else None
    return {name: float(value) for name, value in found.items() if _is_measured(value)}


def _is_measured(value: float | None) -> bool:
    """Return True for a finite number, and False for null, NaN and infinity."""
    return value is not None and abs(value) < float("inf")


def guarantee(epsilon: Epsilon) -> str:
    """Write unit, relation and delta of an epsilon; only epsilons with the same can be compared."""
    return f"per {epsilon['unit']}, {epsilon['relation']}, delta {epsilon['delta']:g}"


def assumptions(epsilon: Epsilon) -> str:
    """Write accountant, sampling and trust model of an epsilon, and if noise was simulated."""
    stated = f"{epsilon['accountant']}, {epsilon['sampling']}, {epsilon['trust']}"
    return f"{stated}, simulation: not a private release" if epsilon["simulated"] else stated
