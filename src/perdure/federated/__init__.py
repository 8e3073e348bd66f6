"""Federations on Flower.

The same learner inside a client app, Flower's own aggregators on the server.

>>> from perdure.federated import Federation, dirichlet, fit_federated
>>> streams = dirichlet(stream, clients=10, alpha=0.5, min_size=20)
>>> federation = Federation(clients=10, rounds=5)
>>> matrix = fit_federated(make_learner, streams, federation, folder=Path("runs/mine"))
"""

import warnings

with warnings.catch_warnings():
    # Flower loads typer, which reads names that click has marked
    warnings.filterwarnings("ignore", "'click.utils", DeprecationWarning)
    from perdure.data.client_splits import dirichlet, iid
    from perdure.federated.client import client_app
    from perdure.federated.flower_adapter import InProcessGrid
    from perdure.federated.server import (
        Federation,
        Server,
        fit_federated,
        run_federation,
        server_app,
    )
    from perdure.federated.state_merging import combine

__all__ = [
    "Federation",
    "InProcessGrid",
    "Server",
    "client_app",
    "combine",
    "dirichlet",
    "fit_federated",
    "iid",
    "run_federation",
    "server_app",
]
