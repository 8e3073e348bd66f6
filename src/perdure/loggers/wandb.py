"""Curves for Weights & Biases, written offline.

    wandb sync runs/curves/wandb/offline-run-*

uploads them, if you want that. Every process of a run adds one folder; all have the key of the
run, so that they become one run.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perdure.loggers.base import Logger
from perdure.loggers.run_log import LoggedRun, Value
from perdure.utils.extras import imported

STEP = "step"
"""Name of the x axis of all curves."""


@dataclass(frozen=True, kw_only=True)
class WandB(Logger):
    """Write a run of Weights & Biases to `folder/wandb`, offline; see `Logger`.

    Nothing is sent over the network, and no code, output or measurement of the machine is stored.
    A process that is killed loses what the service of Weights & Biases has not stored yet. Needs
    the extra `perdure[wandb]`.
    """

    def open(self, run: LoggedRun) -> "_OfflineWriter":
        """Begin a folder of the run. See `Logger.open`."""
        # its reports of errors go over the network otherwise
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb = imported("wandb", "wandb", "the logger wandb")
        run.folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            silent=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        begun = wandb.init(
            mode="offline",
            dir=str(run.folder),
            project=run.project,
            id=run.key,
            name=run.name,
            config=dict(run.settings),
            resume="allow" if run.resumed else None,
            reinit="create_new",
            settings=settings,
        )
        # its own step does not go back, but an evaluation is at the step of the last batch
        begun.define_metric(STEP)
        begun.define_metric("*", step_metric=STEP)
        return _OfflineWriter(begun)


class _OfflineWriter:
    """Writer of one offline run."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def write(self, values: Sequence[Value]) -> None:
        rows: dict[int, dict[str, float]] = {}
        for each in values:
            rows.setdefault(each.step, {STEP: each.step})[each.name] = float(each.value)
        for row in rows.values():
            self._run.log(row)

    def describe(self, name: str, text: str, step: int) -> None:
        self._run.summary[name] = text

    def close(self) -> None:
        self._run.finish()
