"""Wording of results (labels, numbers, units), the same in all reports."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from perdure.experiment.result_schema import ArmResult, AttackResult, Epsilon, TaskResult
from perdure.experiment.trial_names import arm_name
from perdure.report.options import telling_options

SIMULATION = "simulation: not a private release"
MISSING = "–"


def labels(arms: Sequence[ArmResult]) -> list[str]:
    """Return the name of each arm in reports: the name in the config, or else the strategy's name.

    If a strategy occurs twice with the same privacy, the options that differ are added.
    """
    named = []
    for arm in arms:
        telling = ", ".join(telling_options(arm, arms))
        if has_own_name(arm):
            named.append(arm["name"])
        else:
            named.append(f"{arm['strategy']} ({telling})" if telling else arm["strategy"])
    return named


def has_own_name(arm: ArmResult) -> bool:
    """Return True if an arm has a name from its config, not one made from the strategy's name."""
    return arm["name"] != arm_name(arm["strategy"], private=arm["private"])


def by_privacy(arms: Sequence[ArmResult]) -> list[tuple[ArmResult, str]]:
    """Return (arm, name) of all arms, arms without privacy first, otherwise in the run's order."""
    return sorted(zip(arms, labels(arms), strict=True), key=lambda named: named[0]["private"])


def best(arms: Sequence[tuple[ArmResult, str]], task: TaskResult) -> tuple[ArmResult, str] | None:
    """Return the arm with the best average metric after training; None if none was measured."""
    measured = [named for named in arms if is_number(named[0]["average_accuracy"])]
    sign = 1 if task["higher_is_better"] else -1
    return max(
        measured, key=lambda named: sign * (named[0]["average_accuracy"] or 0.0), default=None
    )


# --------------------------------------------------------------------------- the task's metric


def is_percent(task: TaskResult) -> bool:
    """Tell if the metric of a task is in percent, as accuracy is."""
    return task["unit"] == "%"


def digits(task: TaskResult) -> int:
    """Return the number of digits after the decimal point for the metric of a task."""
    return 1 if is_percent(task) else 3


def points(task: TaskResult) -> str:
    """Return the unit of differences of the metric: points for percent, else the metric's unit."""
    return "points" if is_percent(task) else task["unit"]


def with_unit(value: float | None, task: TaskResult) -> str:
    """Write a value of the metric with its unit, such as 97.1 % or 2.345 bits."""
    return f"{decimal(value, digits(task))} {task['unit']}".rstrip()


def axis_name(task: TaskResult) -> str:
    """Write the metric with its unit, for an axis: accuracy, %."""
    return ", ".join(filter(None, (task["metric"], task["unit"])))


def sentence_start(metric: str) -> str:
    """Write a metric at the beginning of a sentence: Accuracy; RMSE."""
    return metric[:1].upper() + metric[1:]


def with_error(value: float | None, error: float | None, places: int) -> str:
    """Write a mean with its standard error, where there is one: 56.6 ± 3.1."""
    shown = decimal(value, places)
    return shown if error is None else f"{shown} ± {decimal(error, places)}"


def failed_in_words(arm: ArmResult) -> str:
    """Say at which seeds an arm's training failed: "diverged", or "diverged with seeds 1, 2"."""
    if len(arm["failures"]) == len(arm["seeds"]):
        return "diverged"
    return f"diverged with {seeds_in_words([each['seed'] for each in arm['failures']])}"


def seeds_in_words(seeds: Sequence[int]) -> str:
    """Write the seeds of a run: seed 0; seeds 0, 1, 2."""
    return f"seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}"


# --------------------------------------------------------------------------- numbers


def is_number(value: float | None) -> bool:
    """Return True if a value is a number: neither null nor NaN."""
    return value is not None and not math.isnan(value)


def decimal(value: float | None, digits: int = 1) -> str:
    """Write a number with fixed digits and a true minus sign; a dash for a missing number."""
    if value is None or math.isnan(value):
        return MISSING
    rounded = round(value, digits) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{rounded:.{digits}f}".replace("-", "−")


def epsilon_number(value: float | None) -> str:
    """Write an epsilon with two decimals, rounded up, so that it is never below the true value.

    A missing epsilon is written as a dash.
    """
    if value is None or math.isnan(value):
        return MISSING
    return "∞" if math.isinf(value) else f"{math.ceil(value * 100 - 1e-9) / 100:.2f}"


def small(value: float) -> str:
    """Write a small number such as delta: 1e-5, 0.001."""
    return f"{value:g}".replace("e-0", "e-")


def terms(epsilon: Epsilon) -> str:
    """Write unit, relation and delta of an epsilon in words."""
    return f"per {epsilon['unit']}, {epsilon['relation']}, δ = {small(epsilon['delta'])}"


def phrase(epsilon: Epsilon) -> str:
    """Write an epsilon with its unit, relation, delta, and a note if it is simulated."""
    label = f"; {SIMULATION}" if epsilon["simulated"] else ""
    return f"{epsilon_number(epsilon['value'])} ({terms(epsilon)}{label})"


def count(number: int, noun: str) -> str:
    """Write a number of things: 1 arm, 5 experiences."""
    return f"{number} {noun}{'s' * (number != 1)}"


def attack_name(attack: AttackResult | None) -> str:
    """Write the name of an attack with its strength, such as PGD-10, L∞ 0.1."""
    if attack is None:
        return "no attack"
    steps = attack.get("steps", 1)
    repeated = f"-{steps}" if steps > 1 else ""
    norm = {"linf": "L∞", "l2": "L2", "l1": "L1"}.get(attack["norm"], attack["norm"])
    epsilon = attack["epsilon"]
    radius = f"{epsilon:g}" if isinstance(epsilon, int | float) else "by feature"
    return f"{attack['name']}{repeated}, {norm} {radius}"


def certificate_name(certificate: Mapping[str, Any]) -> str:
    """Write the method of a certificate with its radius, such as interval bounds, L∞ 0.1.

    Args:
        certificate: table `certificate` of a result.
    """
    norm = "L2" if certificate["method"] == "smoothing" else "L∞"
    return f"{certificate['method'].replace('_', ' ')}, {norm} {certificate['epsilon']:g}"


def explainer_name(method: str) -> str:
    """Write the name of an explainer as in its paper; an unknown explainer keeps its name."""
    shipped = {
        "kernel_shap": "Shapley values (SHAP)",
        "exact_shapley": "Shapley values",
        "lime": "local linear models (LIME)",
        "integrated_gradients": "integrated gradients",
        "gradient_shap": "expected gradients (Gradient SHAP)",
        "deep_lift_shap": "DeepLIFT (Deep SHAP)",
        "grad_cam": "Grad-CAM",
    }
    return shipped.get(method, method)
