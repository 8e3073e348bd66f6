"""Wording of results (labels, numbers, units), the same in all reports."""

import math
from collections.abc import Sequence

from perdure.experiment.result_schema import ArmResult, AttackResult, Epsilon
from perdure.report.options import telling_options

SIMULATION = "simulation: not a private release"
MISSING = "–"


def labels(arms: Sequence[ArmResult]) -> list[str]:
    """Return a name for each arm: its strategy, with options if they are needed.

    They are needed if a strategy occurs twice with the same privacy; options that differ are added.
    """
    named = []
    for arm in arms:
        telling = ", ".join(telling_options(arm, arms))
        named.append(f"{arm['strategy']} ({telling})" if telling else arm["strategy"])
    return named


def by_privacy(arms: Sequence[ArmResult]) -> list[tuple[ArmResult, str]]:
    """Return arms with their names, those without privacy first, otherwise in the run's order."""
    return sorted(zip(arms, labels(arms), strict=True), key=lambda named: named[0]["private"])


def best(arms: Sequence[tuple[ArmResult, str]]) -> tuple[ArmResult, str] | None:
    """Return the arm with the highest average accuracy; None if no accuracy was evaluated."""
    measured = [named for named in arms if is_number(named[0]["average_accuracy"])]
    return max(measured, key=lambda named: named[0]["average_accuracy"] or 0.0, default=None)


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
    return f"{attack['name']}{repeated}, {norm} {attack['epsilon']:g}"


def explainer_name(method: str) -> str:
    """Write the name of an explainer as in its paper; an unknown explainer keeps its name."""
    shipped = {
        "kernel_shap": "Shapley values (SHAP)",
        "exact_shapley": "Shapley values",
        "lime": "local linear models (LIME)",
    }
    return shipped.get(method, method)
