"""Learners on the toy problem, and bit comparisons of tensors."""

import json
from functools import partial

import pytest
import torch

from perdure.errors import RunError
from perdure.learner.checkpoint import SUM, sum_of
from perdure.learner.learner import Learner
from perdure.privacy.settings import Privacy
from perdure.strategies import Naive
from perdure.utils.atomic_files import write_json

SIMULATED = Privacy(noise_multiplier=1.0, seed=0)
adam = partial(torch.optim.Adam, lr=0.02)


@pytest.fixture
def learner_of(toy_stream, toy_model):
    def make(strategy=None, stream=None, **changes):
        options = {"optimizer": adam, "iterations": 4, "batch_size": 8, "seed": 5} | changes
        model = options.pop("model", None) or toy_model(stream or toy_stream())
        return Learner(model=model, strategy=strategy or Naive(), **options)

    return make


def refused_then_unseen(learner, stream):
    """Assert that a learner with changed settings is refused, then rewrite the stored settings, to
    test the checks behind the fingerprint.
    """
    with pytest.raises(RunError, match="has a run that differs in"):
        learner.fit(stream)
    for path in (learner.folder / "checkpoint").glob("0*.json"):
        change_facts(path, run=learner.fingerprint)


def change_facts(path, **changes):
    """Change the facts in a file of a checkpoint, as somebody could who knows the checksum."""
    facts = json.loads(path.read_text()) | changes
    del facts[SUM]
    write_json(path, facts | {SUM: sum_of(facts)})


def bits(tensors):
    return {name: value.detach().clone() for name, value in tensors.items()}


def same_bits(mine, theirs):
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[name], theirs[name]) for name in mine
    )


def distinct_rows(rows, rtol=1e-3, atol=1e-6):
    """Return the number of rows that differ by more than rounding.

    Equal records need not give equal bits in one batch: rounding depends on the place in the batch,
    the processor and the build of torch.
    """
    count = 0
    while len(rows):
        rows = rows[~torch.isclose(rows, rows[:1], rtol=rtol, atol=atol, equal_nan=True).all(1)]
        count += 1
    return count
