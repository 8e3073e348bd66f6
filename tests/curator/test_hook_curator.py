"""The curator given to hooks, which offers only the members of the protocol."""

import copy
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch

from perdure.contract.curator import Curator
from perdure.curator.held_records import HeldRecords
from perdure.curator.hook_curator import MEMBERS, for_hooks
from perdure.curator.local_curator import LocalCurator
from perdure.errors import BudgetError, PrivacyError
from perdure.learner.learner import Learner
from perdure.privacy.settings import Privacy
from perdure.strategies import Naive

PRIVATE = Privacy(noise_multiplier=1.0, seed=0)


@dataclass(frozen=True, kw_only=True)
class Looking(Naive):
    """A strategy that keeps the curator that its hooks get."""

    kept: ClassVar[list] = []

    def after_experience(self, curator, params, state):
        self.kept.append(curator)
        return state


def learner_of(stream, make, privacy=None):
    optimizer = partial(torch.optim.SGD, lr=0.1)
    return Learner(
        model=make(stream), strategy=Looking(), optimizer=optimizer, iterations=2, privacy=privacy
    )


@pytest.fixture(params=[None, PRIVATE], ids=["exact", "private"])
def given(request, toy_stream, toy_model):
    """Return the hook's curator after a whole run, and the learner's own curator."""
    learner = learner_of(toy_stream(), toy_model, request.param)
    learner.fit(toy_stream())
    return Looking.kept.pop(), learner.curator


NUMBERS = (torch.Tensor, np.ndarray, str, int, float, bool, type(None))
"""Leaves of the search; attributes of arrays (`T`, `flat`) are new arrays without end."""


def reachable(start):
    """Yield objects that attributes, items and bound methods lead to; closures and modules are not
    followed.
    """
    seen = {}
    todo = [start]
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, type | torch.nn.Module):
            continue
        seen[id(value)] = value
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            todo += value
        elif not isinstance(value, NUMBERS):
            names = set(dir(value)) if not callable(value) else {"__self__"}
            for name in names:
                try:
                    todo.append(getattr(value, name))
                except Exception:  # a question that this is not the time for
                    continue
    return seen.values()


def test_hooks_get_exactly_the_members_of_the_curator_protocol(given):
    seen, _ = given
    public = {name for name in dir(seen) if not name.startswith("_")}
    assert public == set(MEMBERS)
    assert public == {name for name in vars(Curator) if not name.startswith("_")}


def test_no_attribute_of_the_curator_of_hooks_leads_to_records(given):
    seen, own = given
    found = list(reachable(seen))
    assert not any(isinstance(value, LocalCurator | HeldRecords) for value in found)
    # the search sees what there is to see: from the learner's own curator it finds them
    assert any(isinstance(value, HeldRecords) for value in reachable(own))
    assert vars(type(seen)).keys().isdisjoint({"__dict__", "__weakref__"})


@pytest.mark.parametrize(
    "name", ["sample", "snapshot", "raw", "stored", "diagnostics", "step", "_held", "_pool", "rows"]
)
def test_the_curator_of_hooks_refuses_members_that_return_rows(given, name):
    seen, _ = given
    with pytest.raises(
        PrivacyError,
        match=rf"reads curator\.{name}, which no charge in the ledger covers; allowed: context",
    ):
        getattr(seen, name)


def test_a_copied_curator_of_hooks_gives_no_access_to_records(given):
    seen, _ = given
    assert not hasattr(seen, "__dict__")
    assert vars(type(copy.copy(seen))).keys() == vars(type(seen)).keys()


def test_a_hook_cannot_set_attributes_of_its_curator(given):
    seen, _ = given
    with pytest.raises(AttributeError):
        seen.kept = torch.zeros(1)
    with pytest.raises(AttributeError):
        seen.private = False


def test_the_curator_of_hooks_returns_what_the_curator_returns(toy_stream, toy_model):
    learner = learner_of(toy_stream(), toy_model)
    learner.prepare(toy_stream())
    learner.begin(0)
    own = learner.curator
    seen = for_hooks(own)

    def query(forward, batch):
        return batch.inputs

    asked = {"clip_norm": 1.0, "purpose": "a sum"}
    expected = own.release(query, **asked)
    assert torch.equal(seen.release(query, **asked)["value"], expected["value"])
    assert seen.declared_size == own.declared_size and seen.private == own.private
    assert torch.equal(
        seen.count(lambda batch: batch.labels, bins=4, purpose="classes"),
        own.count(lambda batch: batch.labels, bins=4, purpose="classes"),
    )
    assert len(seen.synthetic(3)) == 3


@dataclass(frozen=True, kw_only=True)
class Undeclared(Naive):
    """A strategy that asks for an undeclared release after an experience."""

    member: str = "release"

    def after_experience(self, curator, params, state):
        if self.member == "release":
            curator.release(lambda forward, batch: batch.inputs, clip_norm=1.0, purpose="mine")
        else:
            curator.count(lambda batch: batch.labels, bins=4, purpose="mine")
        return state


@pytest.mark.parametrize(("member", "field"), [("release", "releases"), ("count", "histograms")])
def test_the_error_of_an_undeclared_release_names_the_fix(toy_stream, toy_model, member, field):
    stream = toy_stream()
    learner = Learner(
        model=toy_model(stream),
        strategy=Undeclared(member=member),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        iterations=1,
        privacy=Privacy(epsilon=8.0, delta=1e-3, seed=0),
    )
    told = (
        rf"^Undeclared asks for curator\.{member}\(purpose='mine'\), which its plan does not "
        rf"contain \(partition .* allows 0 .*\); .* privacy_cost = PrivacyCost\({field}=1\)$"
    )
    with pytest.raises(BudgetError, match=told):
        learner.fit(stream)
