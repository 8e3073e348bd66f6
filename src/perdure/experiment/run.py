"""Runs on disk: train and evaluate every arm of a config, and write the result.

Arms train alone or in a federation, and resume after a stop at any time.

runs/NAME/config.toml       the config of the run
runs/NAME/result.json       the result, in the schema of `perdure.report.wording`
runs/NAME/metrics.jsonl     one line per arm and experience, appended as it goes
runs/NAME/ledger.jsonl      the ledgers of all arms and clients, each with its own chain and head
runs/NAME/checkpoint/ARM/   the arm's final model and strategy state, `model.safetensors`; see
                            `trained`
runs/NAME/arms/ARM/         the arm's own checkpoints, clients and `private/` (keys and memory;
                            never exported)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perdure.errors import ConfigError, RunError
from perdure.experiment.arm import ArmRun, MetricsLog, Progress, open_stream, silent
from perdure.experiment.config import Arm, Config, read
from perdure.experiment.result_schema import Result, read_result
from perdure.experiment.results import (
    collect_explanations,
    ledger_files,
    summary,
)
from perdure.learner.fingerprint import VERSION, flat, refuse_other_run
from perdure.learner.learner import Callback, Learner
from perdure.learner.model_history import Training, mark
from perdure.privacy.ledger.merged import merge
from perdure.privacy.ledger.merged import read as read_ledger
from perdure.utils.atomic_files import write_atomically, write_json
from perdure.utils.folder_lock import locked

TIMINGS = frozenset({"seconds"})
"""Keys of the result that contain times, and so may differ between two runs of one config on one
machine.
"""


def untimed(value: Any) -> Any:
    """Copy a result without its timings, to compare it with the result of another run."""
    if isinstance(value, dict):
        return {name: untimed(inner) for name, inner in value.items() if name not in TIMINGS}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


def run(
    config: Config,
    text: str,
    folder: Path | str,
    progress: Progress = silent,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Run every arm of a config and write the files of the run; a stopped run continues.

    Args:
        config: parsed config.
        text: TOML text of the config, which is stored with the result.
        folder: folder of the run; it is created.
        progress: see `Progress`.
        callbacks: called as callback(point, learner) by every learner of every arm; see
            `perdure.learner.learner.POINTS`.

    Raises:
        RunError: if the folder has a run of another config, is in use, or cannot be written.
    """
    folder = Path(folder)
    with locked(folder):
        keep_config(folder, config, text)
        if (folder / "result.json").exists():
            for arm in config.arms:
                progress(arm.name, 1.0)
            return read_result(folder)
        torch.set_num_threads(config.threads)
        stream = open_stream(config)
        log = MetricsLog(folder / "metrics.jsonl")
        rows = [
            ArmRun(config, arm, stream, folder, log, progress, callbacks).run()
            for arm in config.arms
        ]
        ledgers = [path for arm in config.arms for path in ledger_files(folder / "arms" / arm.name)]
        merged = merge(ledgers) if ledgers else None
        if merged:
            merged.export(folder / "ledger.jsonl")
        explanations = collect_explanations(config, folder)
        write_json(folder / "result.json", summary(config, stream, rows, merged, explanations))
        return read_result(folder)


def trained(folder: Path | str, arm: str) -> Learner:
    """Load an arm of a finished run: a learner with the final model, ready for `evaluate`.

    Args:
        folder: folder of the run.
        arm: name of the arm's folder in `checkpoint/`, such as ewc-private.

    Raises:
        RunError: if there is no such arm, or its model cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    config = read(folder / "config.toml")
    path = folder / "checkpoint" / arm / "model.safetensors"
    names = [one.name for one in config.arms]
    if arm not in names:
        raise RunError(f"{folder} has no arm {arm!r}; it has {', '.join(names)}")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read ({error}); let the run finish first") from None
    chosen = config.arms[names.index(arm)]
    learner = ArmRun(
        config, chosen, open_stream(config), folder, MetricsLog(folder / "metrics.jsonl")
    ).untrained()
    learner.model.load_state_dict(under("model.", tensors))
    learner.session.state = learner.state.replace(under("state.", tensors))
    mark(learner.model, training_of(folder, chosen))
    return learner


def training_of(folder: Path, arm: Arm) -> Training:
    """Return the training history for the model of a finished run's arm."""
    by = f"{folder.resolve()}, {arm.name}"
    own = folder / "arms" / arm.name / "ledger.jsonl"
    if not arm.private:
        return Training(by=by, uncounted=f"trained without privacy in {folder}")
    if not own.exists():
        return Training(by=by, uncounted=f"trained in {folder} by clients, who hold the ledgers")
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
    """Tensors whose name begins with `prefix`, by the rest of their names."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def keep_config(folder: Path, config: Config, text: str) -> None:
    """Write the config, or check that the folder's config has the same meaning.

    Comments may differ. If nothing was run yet, the config may change.

    Raises:
        RunError: names each field that differs.
    """
    path = folder / "config.toml"
    if path.exists() and path.read_bytes() == text.encode():
        return
    if not (folder / "arms").exists():
        write_atomically(path, text.encode())
        return
    fix = "give another folder with --out, or delete the folder"
    try:
        stored = read(path)
    except ConfigError as error:
        raise RunError(f"{folder} has a run whose config cannot be read ({error}); {fix}") from None
    asked = {"version": VERSION, **flat("config", config)}
    refuse_other_run(asked, {"version": VERSION, **flat("config", stored)}, where=folder, fix=fix)
