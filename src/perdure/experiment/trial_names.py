"""Names of arms and trials, which are names of folders."""

import re


def arm_name(file: str, *, private: bool) -> str:
    """Name an arm: "my_package.my_module:Mine" gives my_package.my_module.Mine-private."""
    safe = re.sub(r"[^A-Za-z0-9._-]", ".", file)
    return f"{safe}-{'private' if private else 'plain'}"


def trial_name(arm: str, seed: int | None) -> str:
    """Name an arm with a seed: ewc-plain-seed-1; the arm's own where the run has one seed."""
    return arm if seed is None else f"{arm}-seed-{seed}"
