"""Facts that were found in private records are named by the privacy statement."""

import numpy as np
import pytest

from helpers.learners import SIMULATED, learner_of  # noqa: F401
from perdure.data import from_arrays, split
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.ledger.merged import merge
from perdure.privacy.noise.key import NoiseKey

FOUND = "the classes found in the records are declared public"


@pytest.mark.parametrize("declared", [False, True])
def test_the_privacy_statement_names_classes_found_in_records(learner_of, declared):  # noqa: F811
    words = ["no", "yes", "never", "always"]
    data = from_arrays(
        np.random.default_rng(0).normal(size=(40, 5)),
        [words[number % 4] for number in range(40)],
        test=(np.zeros((4, 5)), words),
        classes=words if declared else None,
        ids=np.arange(40),
        declared_size=40,
        name="words",
    )
    stream = split(data, scenario="class", experiences=2)
    learner = learner_of(stream=stream, privacy=SIMULATED)
    learner.prepare(stream)
    ledger = learner.private_sum.ledger
    assert (f"declared sizes public, {FOUND}" in str(ledger.statement(1e-5))) is not declared
    assert (FOUND in str(merge([ledger]).statement(1e-5))) is not declared


def test_public_facts_found_later_are_added_to_the_ledger(tmp_path):
    key = NoiseKey.from_seed(0)
    ledger = Ledger.open(tmp_path / "ledger.jsonl", key=key)
    for facts in ((), ("one",), ("two",), ()):
        ledger.declare("a", 10, "rule", facts)
    assert len(ledger.chain.bodies) == 4
    again = Ledger.open(tmp_path / "ledger.jsonl", key=key)
    assert again.statement(1e-5).public_facts == ("one", "two") and again.sizes == {"a": 10}
