"""Server app and client app of a config, for a deployment with Flower."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

with warnings.catch_warnings():
    # Flower imports typer, which uses names that click has deprecated
    warnings.filterwarnings("ignore", "'click.utils", DeprecationWarning)
    from flwr.app import Context
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

from perdure.data.experience import Stream
from perdure.data.value_checks import check_streams
from perdure.deployment.config_checks import refuse_undeployable
from perdure.deployment.template import RUN_FOLDER
from perdure.errors import FederationError
from perdure.experiment.arm import ArmRun, open_stream
from perdure.experiment.config import Config, parse, read_text, table_of
from perdure.experiment.metrics_log import MetricsLog
from perdure.experiment.overrides import set_path, toml_text
from perdure.experiment.results import client_streams
from perdure.experiment.run import run
from perdure.experiment.served_federation import federation_of
from perdure.experiment.trained_models import trials
from perdure.federated.client import ClientSessions, app_of
from perdure.federated.client_streams import participation, without_gaps
from perdure.federated.trials import TrialGrid, app_of_trials
from perdure.learner.learner import Learner
from perdure.report import write_report

STATE = "state"
DATA = "data"
"""Keys of a node config: the site's folder for client state, and its folder of data sets."""


def server_app_of(path: Path | str) -> ServerApp:
    """Build the server app that trains every arm of a config with the sites, and writes the run.

    The folder of the run is the key `run-folder` of Flower's run config; default runs/NAME. All
    other keys of the run config replace settings of the config, such as training.epochs. A run that
    was stopped continues when it is submitted again.

    Args:
        path: TOML file of the config.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config, text = configured(path, context.run_config)
        given = str(context.run_config.get(RUN_FOLDER, ""))
        folder = Path(given) if given else Path("runs") / config.name
        run(config, text, folder, grid=partial(TrialGrid, grid))
        write_report(folder, figures=True)

    return app


def client_app_of(path: Path | str) -> ClientApp:
    """Build the client app that trains one client of a config's federation.

    The node config of a SuperNode has the keys `partition-id`, `num-partitions`, `state` (folder
    for the client's state, which outlives the SuperNode) and, if the data set is not in one of the
    usual places, `data` (folder of the data).

    Args:
        path: TOML file of the config.
    """
    return app_of_trials(partial(_client_of_trial, path))


def configured(path: Path | str, values: Mapping[str, Any]) -> tuple[Config, str]:
    """Read a config, and replace settings by those of Flower's run config.

    Args:
        path: TOML file of the config.
        values: path of a setting to its value, such as {"training.epochs": 3}.

    Returns:
        The config, and its text; the text of the file if no value differs.

    Raises:
        ConfigError: if the config has no federation, or a value is not allowed.
    """
    text = read_text(Path(path))
    table = table_of(text, str(path))
    asked = {key: value for key, value in values.items() if key != RUN_FOLDER}
    changed = {key: value for key, value in asked.items() if _at(table, key) != value}
    for key, value in changed.items():
        set_path(table, key, value)
    if changed:
        text = toml_text(table)
    config = parse(text, source=str(path))
    refuse_undeployable(config, str(path))
    return config, text


def _at(table: Mapping[str, Any], path: str) -> Any:
    inner: Any = table
    for name in path.split("."):
        inner = inner.get(name) if isinstance(inner, Mapping) else None
    return inner


def _client_of_trial(path: Path | str, trial: str, context: Context) -> ClientApp:
    """Build the client app of one training for the client that this node holds."""
    config, _ = configured(path, context.run_config)
    partition = _place(config, context)
    known = trials(config)
    if trial not in known:
        raise FederationError(
            f"the server trains {trial!r}; allowed: {', '.join(known)}, the trainings of this "
            "site's config; install the same app on all sites"
        )
    arm, seed = known[trial]
    mine = config.of_seed(seed)
    if DATA in context.node_config:
        mine = replace(mine, data=replace(mine.data, root=str(context.node_config[DATA])))
    torch.set_num_threads(config.threads)
    folder = Path(str(context.node_config[STATE])) / config.name
    whole = open_stream(mine)
    party = ArmRun(mine, arm, whole, folder, MetricsLog(folder / "metrics.jsonl"), name=trial)
    streams = client_streams(mine, whole)
    own = streams[partition]
    rounds = None
    if arm.private:
        # here, because an error of the client app about a value would reach the server
        check_streams([without_gaps(own, partition)], training=True)
        assert mine.federation is not None
        rounds = participation(federation_of(mine.federation, mine.seed), streams)

    def make(number: int) -> tuple[Learner, Stream]:
        return party.learner(whole, number), own

    seats = ClientSessions(
        make,
        party.folder,
        distinct=True,
        participation=rounds,
        readmit=mine.federation is not None and mine.federation.readmit,
    )
    return app_of(seats)


def _place(config: Config, context: Context) -> int:
    """Return the number of this node's client, and refuse a node config that does not fit.

    Raises:
        FederationError: names the key of the node config.
    """
    assert config.federation is not None
    clients = config.federation.clients
    given = context.node_config
    if not given.get(STATE):
        raise FederationError(
            "the SuperNode's --node-config has no state; add state=FOLDER, a folder of this site "
            "that outlives the SuperNode"
        )
    number, count = given.get("partition-id"), given.get("num-partitions")
    if not isinstance(number, int) or not 0 <= number < clients or count != clients:
        raise FederationError(
            f"the SuperNode's --node-config has partition-id={number} num-partitions={count}; "
            f"allowed: partition-id 0 .. {clients - 1}, num-partitions {clients}, as the config's "
            "federation.clients says"
        )
    return number
