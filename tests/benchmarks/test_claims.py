"""The comparison of claims of papers: entries, decision rule and stored rows. Outcomes are not
tested.

What comes out is not tested.
"""

import copy
import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from perdure.strategies import find, names

FOLDER = Path(__file__).parents[2] / "benchmarks"
SHORT = {"iterations": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def claims():
    """Import the script as a module from its folder, because its worker processes import it
    again.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("claims")


@pytest.fixture(scope="module")
def comparison(claims):
    return importlib.import_module("comparison")


@pytest.fixture
def tiny(claims, data_root, monkeypatch):
    """Return a claim reduced to a run of a few seconds."""
    monkeypatch.setenv("PERDURE_DATA", str(data_root))

    def cut(name):
        [claim] = [claim for claim in claims.CLAIMS if claim.name == name]
        return replace(claim, training=SHORT, trials=1, tuned_on=1)

    return cut


def middle(arm):
    return {name: (low * high) ** 0.5 for name, (low, high) in arm.search.items()}


def parts(strategy):
    return getattr(strategy, "parts", (strategy,))


def test_the_first_arm_of_a_claim_is_its_strategy(claims):
    assert len({claim.name for claim in claims.CLAIMS}) == len(claims.CLAIMS) >= 11
    for claim in claims.CLAIMS:
        assert claim.name in names()
        first = claim.arms[0]
        made = first.strategy(
            **{name: value for name, value in middle(first).items() if name != "learning_rate"}
        )
        assert any(isinstance(part, find(claim.name)) for part in parts(made))


def test_every_claim_names_a_rival_and_the_source_of_settings(claims, comparison):
    for claim in claims.CLAIMS:
        arms = [arm.name for arm in claim.arms]
        assert len(set(arms)) == len(arms) >= 2
        assert claim.sentence and not claim.sentence.endswith(".")
        assert any(str(year) in claim.paper for year in range(2010, 2030))
        assert set(claim.measures) <= set(comparison.MEASURES)
        assert all(
            arm.chosen in (comparison.PAPER, comparison.FIXED, comparison.NOTHING)
            for arm in claim.arms
        )
        assert "0x" not in json.dumps(comparison.options(claim)), (
            "an address would make every run another one"
        )


def test_two_claims_with_different_settings_store_other_options(claims, comparison):
    whole = [comparison.options(claim) for claim in claims.CLAIMS]
    assert json.loads(json.dumps(whole)) == whole, "they are compared with what was stored"
    claim = claims.CLAIMS[0]
    arm = replace(claim.arms[0], search={"strength": (0.5, 0.6)})
    others = [
        replace(claim, training=SHORT),
        replace(claim, trials=1),
        replace(claim, stream=claims.ONLINE),
        replace(claim, arms=(arm, *claim.arms[1:])),
    ]
    assert all(comparison.options(other) != whole[0] for other in others)
    assert comparison.options(replace(claim, sentence="another")) == whole[0]


def results(comparison, **values):
    """Return a result per seed; measures that are not given are equal."""
    length = len(next(iter(values.values())))
    same = dict.fromkeys([*comparison.MEASURES, "seconds"], [50.0] * length)
    return [
        dict(zip(same, seed, strict=True)) for seed in zip(*(same | values).values(), strict=True)
    ]


@pytest.mark.parametrize(
    ("measure", "own", "other", "difference", "shown"),
    [
        ("average_accuracy", [80.0, 82.0, 84.0], [70.0, 73.0, 76.0], 9.0, True),
        ("average_accuracy", [70.0, 73.0, 76.0], [80.0, 82.0, 84.0], -9.0, False),
        ("average_accuracy", [80.0, 40.0, 84.0], [70.0, 73.0, 76.0], -5.0, False),
        ("average_accuracy", [90.0, 72.0, 76.0], [70.0, 73.0, 76.0], 19 / 3, False),
        ("forgetting", [1.0, 2.0, 3.0], [21.0, 22.0, 24.0], 61 / 3, True),
        ("forgetting", [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], 0.0, False),
    ],
)
def test_a_claim_is_shown_if_it_exceeds_two_standard_errors(
    claims, comparison, measure, own, other, difference, shown
):
    claim = replace(claims.CLAIMS[1], measures=(measure,))
    method, against = (arm.name for arm in claim.arms)
    found = {
        method: results(comparison, **{measure: own}),
        against: results(comparison, **{measure: other}),
    }
    row = comparison.row(
        replace(claim, arms=tuple(replace(arm, strategy=claims.Naive) for arm in claim.arms)),
        {},
        found,
    )
    [compared] = row["compared"]
    assert compared["difference"] == pytest.approx(difference)
    assert (compared["method"], compared["against"], compared["measure"]) == (
        method,
        against,
        measure,
    )
    assert row["shown"] is compared["shown"] is shown
    assert row["arms"][method]["by_seed"][measure] == own


def test_additional_arms_do_not_decide_a_claim(claims, comparison):
    claim = replace(claims.CLAIMS[0], measures=("average_accuracy",))
    method, naive = (replace(arm, strategy=claims.Naive) for arm in claim.arms)
    other = replace(naive, name="other", beside=True)
    found = {
        name: results(comparison, average_accuracy=values)
        for name, values in {
            method.name: [80.0, 81.0],
            "naive": [70.0, 71.0],
            "other": [90.0, 91.0],
        }.items()
    }
    for beside, shown in ((True, True), (False, False)):
        row = comparison.row(
            replace(claim, arms=(method, naive, replace(other, beside=beside))), {}, found
        )
        assert [compared["shown"] for compared in row["compared"]] == [True, False]
        assert row["shown"] is shown


def test_a_required_exact_value_decides_a_claim(claims, comparison):
    [claim] = [claim for claim in claims.CLAIMS if claim.exactly is not None]
    claim = replace(claim, measures=("forgetting",))
    method, against = (arm.name for arm in claim.arms)
    for own, shown in (([0.0, 0.0], True), ([0.0, 0.5], False)):
        found = {
            method: results(comparison, forgetting=own),
            against: results(comparison, forgetting=[9.0, 9.5]),
        }
        row = comparison.row(claim, {}, found)
        assert row["compared"][0]["shown"] and row["shown"] is shown


@pytest.mark.slow
def test_a_claim_run_is_repeatable_and_packnet_forgets_nothing(comparison, tiny):
    claim = tiny("packnet")
    method, naive = claim.arms
    once, again = (comparison.run(claim, naive, {}, 0) for _ in range(2))
    assert once.pop("seconds") > 0 < again.pop("seconds")
    assert once == again
    assert [e.classes for e in claim.stream(0)] != [e.classes for e in claim.stream(1)]
    assert comparison.run(claim, method, {}, 0)["forgetting"] == 0.0


@pytest.mark.deep(reason="full replay: tunes, trains and stores a whole claim")
def test_the_claims_script_stores_rows_and_reuses_them(
    comparison, tiny, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "claims.json"
    claim = tiny("l2")
    monkeypatch.setattr("sys.argv", ["benchmarks/claims.py", "--seeds", "2", "--json", str(path)])
    comparison.main([claim], "words")
    content = json.loads(path.read_text())
    assert {"machine", "versions", "command"} <= set(content)
    [row] = content["rows"]
    assert (row["claim"], row["seeds"], row["rule"]) == ("l2", 2, comparison.RULE)
    assert row["sentence"] == claim.sentence and row["command"].startswith(
        "python benchmarks/claims.py --seeds 2"
    )
    l2 = row["arms"]["l2"]
    naive = row["arms"]["naive"]
    assert l2["chosen"].startswith(
        "strength: tuned on held-out training records of the first 1 experiences; no test"
    )
    assert (
        l2["strategy"] == f"L2(strength={l2['values']['strength']})"
        and len(l2["search"]["trials"]) == 1
    )
    assert naive["search"] is None and naive["chosen"] == comparison.NOTHING
    for arm in (l2, naive):
        accuracies = arm["by_seed"]["average_accuracy"]
        assert len(accuracies) == 2 and arm["average_accuracy"] == pytest.approx(
            sum(accuracies) / 2
        )
        assert arm["standard_error"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2)
    pairs = zip(
        l2["by_seed"]["average_accuracy"], naive["by_seed"]["average_accuracy"], strict=True
    )
    assert row["compared"][0]["differences"] == pytest.approx([own - its for own, its in pairs])
    assert "l2" in capsys.readouterr().out

    comparison.main([replace(claim, sentence="Put better")], "words")
    [later] = json.loads(path.read_text())["rows"]
    assert later == row | {"sentence": "Put better"}, "it was not run again"


def test_the_claims_script_refuses_a_single_seed(comparison, claims, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks/claims.py", "--seeds", "1"])
    with pytest.raises(SystemExit):
        comparison.main(copy.copy(claims.CLAIMS), "words")
    assert "allowed: 2 or more" in capsys.readouterr().err
