"""Trained models of finished runs: their trials, tensors and training history."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from perdure.errors import RunError
from perdure.experiment.config import Arm, Config
from perdure.learner.model_history import Training
from perdure.privacy.ledger.merged import read as read_ledger


def trials(config: Config) -> dict[str, tuple[Arm, int]]:
    """Return the arm and the seed of every trial of a config by the trial's name, in order."""
    return {config.trial(arm, s): (arm, s) for s in config.all_seeds for arm in config.arms}


def chosen_trial(
    folder: Path, known: Mapping[str, tuple[Arm, int]], arm: str | None, seed: int | None
) -> str:
    """Return the name of the only trial with this arm and this seed.

    Args:
        folder: folder of the run, for messages.
        known: trials of the run's config, from `trials`.
        arm: name of an arm or trial; None if the run has one arm.
        seed: seed of the trial; None if the run has one seed.

    Raises:
        RunError: if no trial or several trials match.
    """
    found = [
        trial
        for trial, (each, its_seed) in known.items()
        if arm in (None, each.name, trial) and seed in (None, its_seed)
    ]
    if len(found) != 1:
        asked = "model" if arm is None else f"arm {arm!r}"
        several = "models" if arm is None else f"models for arm {arm!r}"
        problem = f"has {len(found)} {several}" if found else f"has no {asked}"
        place = "" if seed is None else f" with seed {seed}"
        raise RunError(f"{folder} {problem}{place}; give one of {', '.join(found or known)}")
    return found[0]


def training_of(folder: Path, trial: str, *, private: bool) -> Training:
    """Return the training history of a finished trial's model, which exported models keep."""
    by = f"{folder.resolve()}, {trial}"
    own = folder / "arms" / trial / "ledger.jsonl"
    if not private:
        return Training(by=by, uncounted=f"trained without privacy in {folder}")
    if not own.exists():
        told = f"trained in {folder} by clients, who hold the ledgers"
        return Training(by=by, uncounted=told, private=True)
    (part,) = read_ledger(own).parts
    account = part.account
    return Training(
        by=by,
        sizes=account.sizes,
        rules=account.rules,
        entries=account.entries,
        simulated=account.simulated,
    )


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors whose names begin with `prefix`; the prefix is removed from the names."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def tensors_of(folder: Path, trial: str) -> dict[str, Tensor]:
    """Read the tensors of a finished trial: `model.` and `state.`, by name.

    Raises:
        RunError: if training diverged, or the file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "checkpoint" / trial / "model.safetensors"
    row = folder / "arms" / trial / "arm.json"
    failure = json.loads(row.read_text())["failure"] if row.exists() else None
    if failure is not None:
        raise RunError(f"{trial} of {folder} has no model, because its training failed: {failure}")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read ({error}); let the run finish first") from None
