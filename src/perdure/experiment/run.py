"""Runs on disk: train and evaluate every arm of a config, and write the result.

Arms train alone or in a federation, and resume after a stop at any time.

runs/NAME/config.toml       the config
runs/NAME/result.json       the result, in the schema of `perdure.experiment.result_schema`
runs/NAME/metrics.jsonl     one line per trial and experience, appended as it goes
runs/NAME/ledger.jsonl      the ledgers of all trials and clients, each with its own chain and head
runs/NAME/checkpoint/TRIAL/ the trial's final model and strategy state, `model.safetensors`; see
                            `load`
runs/NAME/arms/TRIAL/       the trial's own checkpoints, clients and `private/` (keys and memory;
                            never exported)

A trial is an arm with one seed. Its name is the arm's, or ARM-seed-S where the config has `seeds`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from perdure.data.experience import Stream
from perdure.errors import ConfigError, RunError
from perdure.experiment.arm import ArmRun, GridOfTrial, Progress, open_stream, silent
from perdure.experiment.config import Config, read
from perdure.experiment.examinations import examine_arm
from perdure.experiment.helping_processes import announce, helped
from perdure.experiment.metrics_log import MetricsLog
from perdure.experiment.result_schema import Result, TrialResult, read_result
from perdure.experiment.results import (
    account_of_arm,
    collect_explanations,
    explained_arm,
    ledger_files,
    summary,
)
from perdure.experiment.run_checks import checked_stream
from perdure.experiment.seeds import arm_result
from perdure.experiment.trained_models import (
    chosen_trial,
    tensors_of,
    training_of,
    trials,
    under,
)
from perdure.learner.fingerprint import VERSION, flat, refuse_other_run
from perdure.learner.learner import Callback, Learner
from perdure.learner.model_history import mark
from perdure.privacy.ledger.merged import Merged, merge
from perdure.utils.atomic_files import write_atomically, write_json
from perdure.utils.folder_lock import locked
from perdure.utils.processes import Processes

TIMINGS = frozenset({"seconds", "findings"})
"""Keys of the result that may differ between two runs of one config on one machine: times, and
findings, because the monitor of a resumed run has no measurements of the part before the stop.
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
    examine: Literal["no", "quick", "full"] = "no",
    grid: GridOfTrial | None = None,
) -> Result:
    """Run every arm of a config and write the files of the run; a stopped run continues.

    If the training of a trial diverges, the result reports it (`failures`), and the other trials
    run.

    Args:
        config: parsed config.
        text: TOML text of the config, which is stored with the result.
        folder: folder of the run; it is created.
        progress: function that is called as progress(arm name, share done, state in words).
        callbacks: called as callback(point, learner) by every learner of every arm; see
            `perdure.learner.POINTS`.
        examine: examination by the doctor before the first seed of every arm: none, without trial
            trainings, or in full. Its findings stand in the result.
        grid: function from a trial's name to the grid of a deployment, whose sites train; None to
            train here.

    Raises:
        RunError: if the folder has a run of another config, is in use, or cannot be written.
    """
    folder = Path(folder)
    with locked(folder):
        keep_config(folder, config, text)
        if (folder / "result.json").exists():
            for name in trials(config):
                progress(name, 1.0, "")
            return read_result(folder)
        torch.set_num_threads(config.threads)
        if grid is None:
            begun = [name for name in trials(config) if (folder / "arms" / name).exists()]
            first = checked_stream(config, begun=begun)
        else:  # the sites of a deployment check their own records
            first = open_stream(config.of_seed(config.all_seeds[0]))
        with helped(config, folder / "config.toml") as processes:
            rows = _trained(config, first, folder, progress, callbacks, examine, processes, grid)
        merged = _merged(config, folder, at_sites=grid is not None)
        results = [arm_result(arm, rows[arm.name]) for arm in config.arms]
        explanations = collect_explanations(config, folder)
        write_json(folder / "result.json", summary(config, first, results, merged, explanations))
        return read_result(folder)


def _merged(config: Config, folder: Path, *, at_sites: bool) -> Merged | None:
    """Join the accounts of all private trials; ledgers that are here are written to one file.

    Args:
        config: config of the run.
        folder: folder of the run.
        at_sites: True if the sites of a deployment have the ledgers.
    """
    places = [folder / "arms" / name for name, (arm, _) in trials(config).items() if arm.private]
    if at_sites:
        parts = [part for place in places for part in account_of_arm(place).parts]
        return Merged(parts) if parts else None
    ledgers = [path for place in places for path in ledger_files(place)]
    merged = merge(ledgers) if ledgers else None
    if merged:
        merged.export(folder / "ledger.jsonl")
    return merged


def _trained(
    config: Config,
    first: Stream,
    folder: Path,
    progress: Progress,
    callbacks: Sequence[Callback],
    examine: Literal["no", "quick", "full"],
    processes: Processes | None,
    grid: GridOfTrial | None,
) -> dict[str, list[TrialResult]]:
    """Run the trials of every seed, and return the rows of each arm.

    Args:
        config: config of the run.
        first: stream of the first seed.
        folder: folder of the run.
        progress: function that is called with the progress.
        callbacks: callbacks of every learner.
        examine: examination by the doctor.
        processes: processes that divide every batch; None for this process alone.
        grid: function from a trial's name to the grid of a deployment; None to train here.
    """
    log = MetricsLog(folder / "metrics.jsonl")
    rows: dict[str, list[TrialResult]] = {arm.name: [] for arm in config.arms}
    for number, seed in enumerate(config.all_seeds):
        mine = config.of_seed(seed)
        stream = first if number == 0 else open_stream(mine)
        for arm in config.arms:
            name = config.trial(arm, seed)
            trial = ArmRun(mine, arm, stream, folder, log, progress, callbacks, name=name)
            trial.explained = number == 0
            trial.grid = grid
            if processes:
                trial.begins = partial(announce, processes, arm, seed)
            if examine != "no" and number == 0 and not trial.finished:
                trial.findings = examine_arm(mine, arm, stream, trials=examine == "full")
            rows[arm.name].append(trial.run())
    return rows


def load(run: Path | str, arm: str | None = None, *, seed: int | None = None) -> Learner:
    """Load a trained model of a finished run, as a learner.

    `predict`, `score` and `evaluate` of the learner predict as the strategy does. The data set of
    the run is loaded, too, because a prediction needs the declared facts of the stream.

    Args:
        run: folder of the run.
        arm: name of an arm, or of its folder in `checkpoint/`, such as ewc-private or
            ewc-private-seed-1; None where the run has one arm.
        seed: seed of the model; None if the run has one seed, or if `arm` contains the seed.

    Raises:
        RunError: if no model or several models match, if training diverged, or if the model
            cannot be read.
    """
    folder = Path(run)
    # the model's own parameters replace those of the run that it started from
    config = replace(read(folder / "config.toml"), start=None)
    known = trials(config)
    trial = chosen_trial(folder, known, arm, seed)
    tensors = tensors_of(folder, trial)
    chosen, its_seed = known[trial]
    mine = config.of_seed(its_seed)
    log = MetricsLog(folder / "metrics.jsonl")
    learner = ArmRun(mine, chosen, open_stream(mine), folder, log, name=trial).untrained()
    learner.model.load_state_dict(under("model.", tensors))
    learner.session.state = learner.state.replace(under("state.", tensors))
    mark(learner.model, training_of(folder, trial, private=chosen.private))
    return learner


def keep_config(folder: Path, config: Config, text: str) -> None:
    """Store the config in a run's folder, or check that the stored config has the same meaning.

    Comments may differ. If nothing was run yet, the config may change. Later it may get further
    seeds and arms after those of the stored one; the run then goes on with their trials.

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
    extended = _extends(config, stored)
    common = replace(config, seeds=stored.seeds, arms=stored.arms) if extended else config
    # loggers and the search of `perdure tune` change no result, so a run continues with others
    asked, known = (
        {"version": VERSION, **flat("config", replace(each, loggers=(), search=None))}
        for each in (common, stored)
    )
    refuse_other_run(asked, known, where=folder, fix=fix)
    if extended:
        # the result goes first: after a kill between the two, either config makes it again
        (folder / "result.json").unlink(missing_ok=True)
        write_atomically(path, text.encode())


def _extends(config: Config, stored: Config) -> bool:
    """Tell if a config adds seeds or arms at the end of those of a stored one.

    A single `seed` has trials of other names than `seeds`, and one arm alone is explained.
    """
    return (
        (config.seeds, config.arms) != (stored.seeds, stored.arms)
        and bool(stored.seeds or config.seeds == ())
        and config.seeds[: len(stored.seeds)] == stored.seeds
        and config.arms[: len(stored.arms)] == stored.arms
        and (config.explain is None or explained_arm(config) == explained_arm(stored))
    )
