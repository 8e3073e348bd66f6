"""Curves for MLflow, in a SQLite database.

mlflow ui --backend-store-uri sqlite:///runs/curves/mlflow.db
"""

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perdure.loggers.base import Logger
from perdure.loggers.run_log import LoggedRun, Value
from perdure.utils.extras import imported

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

MOST = 1000
"""Most values that MLflow takes at once."""
TELEMETRY = "MLFLOW_DISABLE_TELEMETRY"
KEY = "perdure.key"
"""Tag of a run with the key by which it is found again."""


@dataclass(frozen=True, kw_only=True)
class MLflow(Logger):
    """Write a run of MLflow to the database `folder/mlflow.db`; see `Logger`.

    The project is MLflow's experiment. Nothing is sent over the network. Needs the extra
    `perdure[mlflow]`.
    """

    def open(self, run: LoggedRun) -> "_RunWriter":
        """Open the database, and begin or continue the run. See `Logger.open`."""
        # read at the import of MLflow, which reports its use over the network otherwise
        os.environ.setdefault(TELEMETRY, "true")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own use of other packages
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
            tracking = imported("mlflow.tracking", "mlflow", "the logger mlflow")
            imported("sqlalchemy", "mlflow", "the logger mlflow")
            run.folder.mkdir(parents=True, exist_ok=True)
            path = (run.folder / "mlflow.db").resolve()
            client = tracking.MlflowClient(tracking_uri=f"sqlite:///{path}")
        return _RunWriter(client, run)


class _RunWriter:
    """Writer of one run of MLflow."""

    def __init__(self, client: "MlflowClient", run: LoggedRun) -> None:
        self._client = client
        known = client.get_experiment_by_name(run.project)
        experiment = (
            known.experiment_id
            if known
            else client.create_experiment(
                run.project, artifact_location=(run.folder / "artifacts").resolve().as_uri()
            )
        )
        found = client.search_runs([experiment], filter_string=f"tags.`{KEY}` = '{run.key}'")
        if found:
            self._id = found[0].info.run_id
            client.update_run(self._id, status="RUNNING")
        else:
            begun = client.create_run(experiment, run_name=run.name, tags={KEY: run.key})
            self._id = begun.info.run_id
            for name, text in run.settings.items():
                client.log_param(self._id, name, text)

    def write(self, values: Sequence[Value]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(each.name, float(each.value), int(1000 * each.seconds), each.step)
            for each in values
        ]
        for start in range(0, len(metrics), MOST):
            self._client.log_batch(self._id, metrics=metrics[start : start + MOST])

    def describe(self, name: str, text: str, step: int) -> None:
        self._client.set_tag(self._id, name, text)

    def close(self) -> None:
        self._client.set_terminated(self._id)
