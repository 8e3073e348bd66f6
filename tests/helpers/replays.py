"""Small private experiments for the replay audit, alone and federated."""

from functools import partial

import torch

from helpers.strategy_examples import example, model_of
from perdure.data.client_splits import dirichlet
from perdure.federated import Federation
from perdure.learner.learner import Learner
from perdure.privacy.adaptive_clipping import Adaptive
from perdure.privacy.settings import Privacy

CLIPPINGS = {
    "flat": {},
    "per-layer": {"clipping": "per-layer"},
    "adaptive": {"clipping": Adaptive(count_noise=0.5)},
    "correlated": {"bands": 2},
}
PLACES = {"alone": 12, "federated": 4}
"""Expected records a step; a client has fewer of them."""


def settings(**changes):
    """Return privacy settings of a simulation whose clip norm every record reaches."""
    usual = {"noise_multiplier": 1.0, "clip_norm": 0.05, "release_noise": 1.0, "seed": 0}
    return Privacy(**(usual | changes))


def maker(stream, strategy, model, *, privacy=None, kind=Learner, **changes):
    """Return a function from a client's number to a new learner with three steps per experience."""
    options = {"iterations": 3, "batch_size": 12, "privacy": privacy or settings()} | changes

    def make(number):
        return kind(
            model=model(stream),
            strategy=strategy,
            optimizer=partial(torch.optim.Adam, lr=0.02),
            **options,
        )

    return make


def experiment(stream, name, clipping, place, otherwise):
    """Return the arguments of `replay` for one strategy, clipping and place."""
    make = maker(
        stream,
        example(name),
        lambda own: model_of(name, own, otherwise),
        privacy=settings(**CLIPPINGS[clipping]),
        batch_size=PLACES[place],
    )
    if place == "alone":
        return {"make_learner": make, "streams": [stream]}
    clients = dirichlet(stream, clients=2, alpha=100.0, min_size=1, exact=False)
    return {
        "make_learner": make,
        "streams": clients,
        "federation": Federation(clients=2, rounds=1),
    }
