"""Federations on Flower: a `Learner` in each client app, and an aggregator of Flower on the server.

Import `Federation` for the settings, and `fit_federated` to train and evaluate in one process.
`client_app` and `server_app` build the apps for a deployment with Flower.

>>> from perdure.data import dirichlet
>>> from perdure.federated import Federation, fit_federated
>>> streams = dirichlet(stream, clients=10, alpha=0.5, min_size=20)
>>> federation = Federation(clients=10, rounds=5)
>>> matrix = fit_federated(make_learner, streams, federation, folder=Path("runs/mine"))
"""

import warnings

with warnings.catch_warnings():
    # Flower imports typer, which uses names that click has deprecated
    warnings.filterwarnings("ignore", "'click.utils", DeprecationWarning)
    from perdure.federated.client import client_app
    from perdure.federated.ensemble_distillation import EnsembleDistillation
    from perdure.federated.flower_adapter import InProcessGrid
    from perdure.federated.pre_aggregators import (
        Buckets,
        ClipUpdates,
        NearestNeighbours,
        PreAggregator,
    )
    from perdure.federated.server import Server, server_app
    from perdure.federated.settings import Federation
    from perdure.federated.state_merging import combine
    from perdure.federated.whole_runs import fit_federated, run_federation

__all__ = [
    "Buckets",
    "ClipUpdates",
    "EnsembleDistillation",
    "Federation",
    "InProcessGrid",
    "NearestNeighbours",
    "PreAggregator",
    "Server",
    "client_app",
    "combine",
    "fit_federated",
    "run_federation",
    "server_app",
]
