"""The ledger index: incremental sums of entries equal sums over all entries."""

from copy import copy
from dataclasses import dataclass, replace
from itertools import combinations
from random import Random

import pytest

from perdure.privacy import Account, Entry
from perdure.privacy.accounting import calibration
from perdure.privacy.accounting.charges import Charge, merged


@dataclass(frozen=True, kw_only=True)
class Counted(Entry):
    """An entry that counts how often its cost is read."""

    def charge(self, partitions):
        asked.append(self)
        return super().charge(partitions)


asked: list[Entry] = []
NAMES = ("a", "b", "c", "d")
WEAKEST = ("", "tested", "by construction")
SAMPLINGS = {
    None: "no sampling",
    False: "Poisson sampling",
    True: "Poisson sampling and full passes",
}


def entry(draw, kind=Entry, relation="add-remove"):
    chosen = draw.sample(NAMES, draw.randint(1, 3))
    return kind(
        purpose="gradient",
        mechanism="gaussian",
        noise_multiplier=draw.choice([4.0, 5.0]),
        clip_norm=1.0,
        first_step=0,
        steps=draw.randint(1, 4),
        sampling="poisson",
        scope={name: draw.choice([0.01, 0.02]) for name in chosen},
        relation=relation,
        data="",
        start="",
        simulated=True,
    )


def account(relation="add-remove"):
    own = Account(relation=relation)
    own.sizes = dict.fromkeys(NAMES, 100)
    return own


def anew(own, group):
    charges = (each.charge(group) for each in own.entries)
    return merged(charge for charge in charges if charge is not None)


@pytest.mark.parametrize("relation", ["add-remove", "replace-one"])
def test_indexed_histories_equal_histories_of_all_entries(relation):
    draw = Random(0)
    own = account(relation)
    groups = [group for n in (1, 2, 3) for group in combinations(NAMES, n)]
    for _ in range(30):
        own.entries += [entry(draw, relation=relation) for _ in range(draw.randint(0, 3))]
        for group in draw.sample(groups, 4):
            assert own.history(group) == merged(own.exposure(group)) == anew(own, group)


def varied(draw):
    """Return an entry like those of `entry`, with another sampling, trust and independence."""
    plain = entry(draw)
    full = draw.random() < 0.2
    return replace(
        plain,
        sampling=draw.choice(["poisson", "none"]) if full else "poisson",
        scope=dict.fromkeys(plain.scope, 1.0) if full else plain.scope,
        trust=draw.choice(["curator", "server"]) if draw.random() < 0.1 else "curator",
        independence=draw.choice(["by construction", "tested"])
        if draw.random() < 0.3
        else "tested",
        simulated=draw.random() < 0.1,
    )


def test_indexed_facts_equal_those_of_all_entries():
    draw = Random(2)
    own = account()
    for _ in range(20):
        new = varied(draw)
        own.entries += [new, replace(new, independence="")][: draw.choice([1, 1, 2])]
        kinds = {"none" if set(e.scope.values()) == {1.0} else e.sampling for e in own.entries}
        assert own.sampling == SAMPLINGS["none" in kinds if "poisson" in kinds else None]
        assert own.simulated == any(each.simulated for each in own.entries)
        for group in combinations(NAMES, 2):
            kept = [e.independence for e in own.entries if set(group) & set(e.scope)]
            assert own.independence_of(group) == min(kept, key=WEAKEST.index, default=WEAKEST[-1])
        trusts = {each.trust.replace("curator", "trusted curator") for each in own.entries}
        assert own.statement(1e-5).trust == " and ".join(sorted(trusts))


@pytest.mark.parametrize("relation", ["add-remove", "replace-one"])
def test_the_indexed_worst_epsilon_equals_that_of_all_entries(relation):
    draw = Random(1)
    own = account(relation)
    for _ in range(4):
        own.entries.append(entry(draw, relation=relation))
        histories = {name: anew(own, group) for name, group in own.groups().items()}
        expected = calibration.worst(histories, delta=1e-5, relation=relation)
        assert own.worst(1e-5) == own.worst(1e-5) == expected


def test_epsilon_reads_only_ledger_entries_that_are_new():
    draw = Random(2)
    own = account()
    own.entries += [entry(draw, Counted) for _ in range(50)]
    before = own.epsilon(delta=1e-5)
    asked.clear()
    assert own.epsilon(delta=1e-5) == before
    assert not asked
    own.entries.append(entry(draw, Counted))
    asked.clear()
    assert own.epsilon(delta=1e-5) >= before
    assert len(asked) <= len(NAMES)


def test_a_new_partition_enters_the_index_at_once():
    own = account()
    assert own.epsilon(delta=1e-5) == 0.0
    own.sizes["e"] = 5
    assert own.epsilon(delta=1e-5) == 0.0
    own.entries.append(entry(Random(3)))
    assert own.epsilon(delta=1e-5) > 0.0


def test_the_index_is_rebuilt_for_another_list_of_entries():
    draw = Random(4)
    own = account()
    own.entries += [entry(draw) for _ in range(5)]
    other = copy(own)
    spent = own.epsilon(delta=1e-5)
    other.entries = own.entries[:1]
    assert other.history(["a"]) == anew(other, ["a"])
    own.entries.append(entry(draw))
    assert own.history(["a"]) == anew(own, ["a"])
    assert other.epsilon(delta=1e-5) < spent < own.epsilon(delta=1e-5)


def test_the_index_leaves_out_only_histories_that_others_cover():
    draw = Random(5)
    kinds = [(0.1, 1.0), (0.1, 2.0), (0.2, 1.0)]
    histories = {
        str(i): [Charge(*kind, draw.randint(0, 3)) for kind in draw.sample(kinds, 2)]
        for i in range(12)
    }
    name, spent = calibration.worst(histories, delta=1e-5)
    each = {key: calibration.epsilon(own, delta=1e-5) for key, own in histories.items()}
    assert spent == max(each.values()) == each[name]
