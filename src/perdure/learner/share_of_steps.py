"""Numbers of steps that may be given as a share of the steps of an experience."""

MOST = 1_000_000_000
STEPS_OR_SHARE = "whole numbers of steps, or shares above 0 and at most 1"
"""Description of the allowed values, for messages."""


def are_steps(value: object) -> bool:
    """Return True for a whole number of steps, 1 or more, or a share of all as a fraction."""
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return 1 <= value <= MOST
    return isinstance(value, float) and 0 < value <= 1


def steps_of(value: int | float, steps: int) -> int:
    """Return the number of steps, at least 1.

    Args:
        value: a whole number of steps, or a share of all as a fraction.
        steps: number of all steps.
    """
    return max(1, round(value * steps)) if isinstance(value, float) else value
