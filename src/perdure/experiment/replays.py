"""Replay of a config: its private arms with all records and without one (`perdure audit`)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from perdure.data.experience import Stream
from perdure.errors import ConfigError
from perdure.experiment.arm import ArmRun, open_stream
from perdure.experiment.config import Arm, Config
from perdure.experiment.metrics_log import MetricsLog
from perdure.experiment.results import ledger_files, summary
from perdure.experiment.run import untimed
from perdure.experiment.seeds import arm_result
from perdure.learner.learner import Learner
from perdure.privacy.ledger.merged import merge
from perdure.testing.replay import ALONE, ReplayResult, ReplayRun, replayed


@dataclass(kw_only=True)
class ReplayedArm(ArmRun):
    """Arm of a run whose learners are recorded for a replay.

    Args:
        replay: recorder of the outputs and noise draws of this run of the replay.
    """

    replay: ReplayRun

    def learner(
        self,
        stream: Stream,
        client: int = 0,
        folder: Path | None = None,
        processes: int = 1,
    ) -> Learner:
        """Make a new learner for one party, with `replay` as recorder of its outputs."""
        made = super().learner(stream, client, folder, processes)
        return self.replay.attach(made, f"client {client}" if self.config.federation else ALONE)


def replay_run(config: Config, *, record: int | None = None) -> dict[str, ReplayResult]:
    """Replay every private arm of a config, with all records and without one record.

    Noise is simulated, a federation runs in this process, and no files are written.

    Args:
        config: config of the run.
        record: id of the record that is removed before the data are split; None for the first
            record of the first experience.

    Returns:
        The result of every private arm, by its name.

    Raises:
        ConfigError: if no arm is private, the data have no such record, or an arm cannot be
            replayed (adversary, dropout).
    """
    config = config.of_seed(config.all_seeds[0])
    private = [arm for arm in config.arms if arm.private]
    if not private or config.privacy is None:
        raise ConfigError.of(
            "arms", [arm.name for arm in config.arms], "at least one with private = true"
        )
    whole = open_stream(config)
    ids = torch.cat([experience.train.ids for experience in whole])
    left_out = int(ids[0]) if record is None else record
    if left_out not in ids.tolist():
        raise ConfigError.of("record", left_out, "an id of a training record, counted from 0")
    fewer = declared_like(open_stream(config, without=left_out), whole)
    federation = config.federation and replace(config.federation, engine="inprocess")
    simulated = replace(
        config, privacy=replace(config.privacy, seed=0), federation=federation, explain=None
    )
    return {arm.name: _replayed(simulated, arm, whole, fewer, left_out) for arm in private}


def declared_like(stream: Stream, other: Stream) -> Stream:
    """Return `stream` with the declared sizes of `other`.

    The stream without one record must declare the sizes of the whole one, because they are public.
    """
    parts = [
        replace(
            experience,
            train=replace(experience.train, declared_size=declared.train.declared_size),
        )
        for experience, declared in zip(stream, other, strict=True)
    ]
    return replace(stream, experiences=tuple(parts))


def _replayed(config: Config, arm: Arm, whole: Stream, fewer: Stream, record: int) -> ReplayResult:
    mine = replace(config, arms=(arm,))

    def experiment(run: ReplayRun, stream: Stream) -> None:
        torch.set_num_threads(mine.threads)
        with TemporaryDirectory() as name:
            run.outputs |= _outputs(mine, arm, stream, run, Path(name))

    return replayed(experiment, whole, fewer, record=record)


def _outputs(
    config: Config, arm: Arm, stream: Stream, run: ReplayRun, folder: Path
) -> dict[str, object]:
    """Run an arm; return all outputs of its run, by name."""
    from safetensors.torch import load_file

    log = MetricsLog(folder / "metrics.jsonl")
    row = ReplayedArm(config, arm, stream, folder, log, listen=run.listen, replay=run).run()
    merged = merge(ledger_files(folder / "arms" / arm.name))
    shown = arm_result(arm, [row])
    result: Mapping[str, Any] = untimed(summary(config, stream, [shown], merged, None))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found: dict[str, object] = {
        f"metrics.jsonl, line {i}": json.loads(line) for i, line in enumerate(lines, 1)
    }
    found |= {f"result.json, {name}": value for name, value in result.items() if name != "arms"}
    found |= {f"result.json, {name}": value for name, value in result["arms"][0].items()}
    final = load_file(folder / "checkpoint" / arm.name / "model.safetensors")
    return found | {f"model.safetensors, {name}": value for name, value in final.items()}
