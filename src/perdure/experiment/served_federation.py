"""Settings of a config's federation, and its server in a deployment.

Flower is imported here, for runs that need it.
"""

from collections.abc import Sequence
from pathlib import Path

from flwr.serverapp import Grid

from perdure.data.experience import Stream
from perdure.experiment.federation_config import make_aggregator, make_pre_aggregators
from perdure.experiment.federation_table import FederationConfig
from perdure.federated.server import Server, ServerCallback
from perdure.federated.settings import Federation
from perdure.learner.learner import Learner


def federation_of(chosen: FederationConfig, seed: int) -> Federation:
    """Make the settings of a federation from the table of a config.

    Args:
        chosen: table of the config.
        seed: seed of the run, which draws the clients of each round.
    """
    return Federation(
        clients=chosen.clients,
        rounds=chosen.rounds,
        local_epochs=chosen.local_epochs,
        local_steps=chosen.local_steps,
        fraction=chosen.fraction,
        aggregator=make_aggregator(chosen.aggregator, chosen.aggregator_options),
        pre_aggregators=make_pre_aggregators(chosen.pre_aggregators),
        seed=seed,
        quorum=chosen.quorum,
        deadline=chosen.deadline,
        grace=chosen.grace,
        alive=chosen.alive,
        readmit=chosen.readmit,
        max_update_norm=chosen.max_update_norm,
    )


def serve_on(
    grid: Grid,
    learner: Learner,
    streams: Sequence[Stream],
    federation: Federation,
    folder: Path,
    callbacks: Sequence[ServerCallback],
) -> Server:
    """Train one model with the clients of a deployment, who hold the records.

    Args:
        grid: grid that carries the messages of this training.
        learner: learner like those of the clients.
        streams: public part of the stream of every client, with the declared sizes.
        federation: clients, rounds, aggregator.
        folder: folder of the training, for checkpoints.
        callbacks: called as callback(point, server).
    """
    server = Server(
        learner=learner,
        stream=streams[0],
        federation=federation,
        folder=folder,
        callbacks=callbacks,
        sizes=[[each.train.declared_size for each in stream] for stream in streams],
        tests=[[each.test for each in stream] for stream in streams],
    )
    server.serve(grid)
    return server
