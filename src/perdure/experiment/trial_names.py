"""Names of arms and trials, which are names of folders."""

import re


def arm_name(file: str, *, private: bool) -> str:
    """Return the default name of an arm, such as ewc-private or my_module.Mine-plain."""
    safe = re.sub(r"[^A-Za-z0-9._-]", ".", file)
    return f"{safe}-{'private' if private else 'plain'}"


def trial_name(arm: str, seed: int | None) -> str:
    """Return the name of a trial, such as ewc-plain-seed-1; without a seed, the arm's name."""
    return arm if seed is None else f"{arm}-seed-{seed}"
