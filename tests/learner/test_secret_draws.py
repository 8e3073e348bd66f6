"""Random draws inside a private step start from the whole secret key."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from helpers.learners import SIMULATED
from perdure.adversarial import PGD
from perdure.data.augmentation import Views
from perdure.models.classifier import Classifier

SEEN: list[torch.Tensor] = []
WORDS = slice(24, 24 + 8 * 624)


def from_32_bits(state):
    """True if the state of a generator was set by `manual_seed` only."""
    kept = int.from_bytes(bytes(state[24:28].tolist()), "little")
    return torch.equal(torch.Generator().manual_seed(kept).get_state()[WORDS], state[WORDS])


class Look(nn.Module):
    """A layer that draws by a function, which no list of modules contains."""

    def forward(self, x):
        SEEN.append(torch.get_rng_state())
        return x


def look(record):
    SEEN.append(torch.get_rng_state())
    return record + 0.01 * torch.randn(record.shape)


@dataclass(frozen=True, kw_only=True)
class Watched(PGD):
    def perturb(self, losses, inputs, *, generator=None):
        SEEN.append(generator.get_state())
        return super().perturb(losses, inputs, generator=generator)


def dropping(stream, layer):
    features = stream.input_shape[0]
    body = nn.Sequential(nn.Linear(features, 8), nn.ReLU(), *layer)
    return Classifier(body, feature_size=8, num_classes=stream.num_classes)


def trained(learner_of, toy_stream, *, layer=(), privacy=SIMULATED, **changes):
    """Return the states of the generators that were used in two steps, and the learner."""
    stream = toy_stream()
    torch.manual_seed(3)
    model = {"model": dropping(stream, layer)} if layer else {}
    learner = learner_of(privacy=privacy, **model, **changes)
    learner.prepare(stream)
    learner.begin(0)
    learner.callbacks = [*learner.callbacks, forget_probes]
    learner.train(range(2))
    return list(SEEN), learner


def forget_probes(point, learner):
    """Forget draws for synthetic records, which the block's digest makes before the first step."""
    if point == "step.sampled" and learner.position.step == 0:
        SEEN.clear()


DRAWERS = {
    "listed dropout": lambda: {"layer": [Look(), nn.Dropout(0.5)]},
    "a layer of the user": lambda: {"layer": [Look()]},
    "views": lambda: {"views": Views(count=1, change=look)},
    "a transform": lambda: {"views": Views(count=1, change=v2.Lambda(look))},
    "start of an attack": lambda: {"adversary": Watched(epsilon=0.1, steps=1, bounds=None)},
}


@pytest.mark.parametrize("what", DRAWERS)
def test_private_random_numbers_use_more_than_32_secret_bits(learner_of, toy_stream, what):
    seen, _ = trained(learner_of, toy_stream, **DRAWERS[what]())
    assert len(seen) >= 2
    assert not any(from_32_bits(state) for state in seen)


# the seeds of "a transform" follow from those of "views"
@pytest.mark.parametrize("what", [name for name in DRAWERS if name != "a transform"])
def test_private_random_numbers_change_with_the_key_and_step(learner_of, toy_stream, what):
    runs = [
        trained(learner_of, toy_stream, privacy=replace(SIMULATED, seed=seed), **DRAWERS[what]())[0]
        for seed in (0, 0, 1)
    ]
    first, again, other = ([state[WORDS] for state in run] for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[-1])
    assert not torch.equal(first[0], other[0])


def test_private_draws_do_not_change_the_global_generator(learner_of, toy_stream):
    """Numbers that a callback draws afterwards would reveal the secret state."""
    states = []

    def after(point, learner):
        if point in ("block.begin", "step.done", "block.end"):
            states.append(torch.get_rng_state())

    trained(learner_of, toy_stream, layer=[nn.Dropout(0.5)], callbacks=[after])
    assert all(torch.equal(state, states[0]) for state in states)


@pytest.mark.parametrize("what", ["listed dropout", "views", "a transform", "start of an attack"])
def test_random_numbers_without_privacy_come_from_the_seed(learner_of, toy_stream, what):
    seen, learner = trained(learner_of, toy_stream, privacy=None, **DRAWERS[what]())
    assert all(from_32_bits(state) for state in seen)
    assert isinstance(learner.session.seed_of("layers", 0), int)
