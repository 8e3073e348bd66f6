"""Folders of finished runs that were never trained: plain numbers in the schema of a result."""

import json

TERMS = {
    "delta": 1e-5,
    "unit": "record",
    "relation": "add-remove",
    "accountant": "pld",
    "sampling": "poisson",
    "trust": "trusted curator",
    "simulated": True,
    "text": "a statement",
}
CONFIG = """
name = "{name}"
[data]
name = "digits"
experiences = 5
[training]
epochs = {epochs}
[[arms]]
strategy = "naive"
"""


def trial(seed, accuracy, *, epsilon=None, failure=None, **changes):
    """One seed of an arm: the accuracy given, and numbers that follow from it."""
    measured = None if failure else accuracy
    return {
        "seed": seed,
        "trial": f"seed-{seed}",
        "failure": failure,
        "progress": [],
        "accuracy_matrix": [],
        "average_accuracy": measured,
        "learning_accuracy": measured,
        "forgetting": None if failure else 100 - accuracy,
        "backward_transfer": None if failure else accuracy - 100,
        "forward_transfer": None,
        "worst_experience_accuracy": measured,
        "area_under_accuracy": measured,
        "calibration_error": None if failure else [0.1, 0.3],
        "state_bytes": 8,
        "robust_accuracy": None,
        "seconds": 2.0,
        "epsilon": None if epsilon is None else TERMS | {"value": epsilon},
        "epsilon_over_time": None,
        "spending": [],
    } | changes


def arm(name, trials, *, options="Naive()"):
    """An arm of the result; its own means are not read here."""
    first = trials[0]
    return first | {
        "name": name,
        "strategy": name.partition("-")[0],
        "options": options,
        "private": first["epsilon"] is not None,
        "standard_error": {},
        "failures": [],
        "seeds": trials,
    }


def stored_run(folder, arms, *, name="small", epochs=1, config=None, **changes):
    """Write a finished run and return its folder.

    Args:
        folder: that is made.
        arms: from `arm`, or by name the accuracies of each seed.
        name: of the run.
        epochs: a setting in which runs may differ.
        config: text of the config instead.
        changes: further keys of the result.
    """
    if isinstance(arms, dict):
        arms = [
            arm(key, [trial(seed, value) for seed, value in seeds.items()])
            for key, seeds in arms.items()
        ]
    result = {
        "schema": 2,
        "name": name,
        "seeds": [each["seed"] for each in arms[0]["seeds"]],
        "task": {
            "name": "single-label",
            "metric": "accuracy",
            "unit": "%",
            "higher_is_better": True,
        },
        "stream": {"name": "digits", "scenario": "class", "experiences": 5, "classes": []},
        "model": {},
        "federation": None,
        "environment": {},
        "attack": None,
        "arms": arms,
        "epsilon_of_all_arms": None,
        "explanations": None,
    } | changes
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "config.toml").write_text(config or CONFIG.format(name=name, epochs=epochs))
    return folder
