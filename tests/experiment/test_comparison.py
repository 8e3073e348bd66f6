"""Comparison of arms over seeds, out of the results of one or several runs."""

import io
import json

import pytest
from scipy import stats

from helpers.stored_runs import TERMS, arm, stored_run, trial
from perdure.errors import ConfigError, RunError
from perdure.experiment import compare

EWC = {0: 71.0, 1: 69.5, 2: 74.0}
NAIVE = {0: 70.0, 1: 66.0, 2: 70.5}


@pytest.fixture
def run_of(tmp_path):
    """Write a finished run into a folder of its own."""

    def make(arms=None, *, folder="run", **options):
        chosen = {"naive-plain": NAIVE, "ewc-plain": EWC} if arms is None else arms
        return stored_run(tmp_path / folder, chosen, **options)

    return make


@pytest.mark.reference
def test_intervals_between_two_runs_equal_those_of_scipy(run_of):
    one = run_of({"naive-plain": NAIVE}, folder="one")
    two = run_of({"ewc-plain": EWC}, folder="two", epochs=2)
    [found] = compare(one, two).differences("average_accuracy")
    theirs = stats.ttest_rel(list(EWC.values()), list(NAIVE.values())).confidence_interval()
    assert (found.arm, found.minus) == ("ewc-plain", "naive-plain")
    assert (found.estimate.low, found.estimate.high) == pytest.approx(tuple(theirs), rel=1e-12)


def test_compare_joins_seeds_of_an_arm_from_several_runs(run_of):
    runs = [
        run_of(
            {"naive-plain": {seed: NAIVE[seed]}, "ewc-plain": {seed: EWC[seed]}}, folder=f"{seed}"
        )
        for seed in NAIVE
    ]
    assert compare(*runs).rows() == compare(run_of()).rows()


def test_arms_with_different_settings_are_named_by_their_run(run_of):
    one = run_of({"ewc-plain": EWC}, folder="one", name="slow")
    two = run_of({"ewc-plain": EWC}, folder="two", name="fast", epochs=2)
    found = compare(one, two)
    assert list(found.arms) == ["slow/ewc-plain", "fast/ewc-plain"]
    [difference] = found.differences("average_accuracy")
    assert (difference.estimate.mean, difference.estimate.low) == (0, 0)


def test_arms_with_one_seed_in_two_runs_are_named_by_their_run(run_of):
    one = run_of({"ewc-plain": EWC}, folder="one")
    two = run_of({"ewc-plain": {0: 50.0}}, folder="two")
    assert list(compare(one, two).arms) == [f"{one}/ewc-plain", f"{two}/ewc-plain"]


def test_ranks_know_if_a_high_or_low_metric_value_is_better(run_of):
    found = compare(run_of())
    for metric in ("average_accuracy", "forgetting", "backward_transfer"):
        assert found.mean_ranks(metric) == {"naive-plain": 2.0, "ewc-plain": 1.0}
    task = {"name": "regression", "metric": "RMSE", "unit": "", "higher_is_better": False}
    found = compare(run_of(folder="errors", task=task))
    assert found.mean_ranks("average_accuracy") == {"naive-plain": 1.0, "ewc-plain": 2.0}
    assert found.metrics["average_accuracy"].name == "average RMSE"


def test_a_baseline_is_subtracted_from_all_others(run_of):
    run = run_of({"naive-plain": NAIVE, "ewc-plain": EWC, "lwf-plain": EWC})
    pairs = [(each.arm, each.minus) for each in compare(run).differences("forgetting")]
    assert pairs == [
        ("ewc-plain", "naive-plain"),
        ("lwf-plain", "naive-plain"),
        ("lwf-plain", "ewc-plain"),
    ]
    chosen = compare(run, baseline="ewc-plain").differences("forgetting")
    assert [(each.arm, each.minus) for each in chosen] == [
        ("naive-plain", "ewc-plain"),
        ("lwf-plain", "ewc-plain"),
    ]


def test_compare_leaves_out_a_failed_seed_and_names_it(run_of):
    trials = [trial(0, 71.0), trial(1, 0.0, failure="training ran away"), trial(2, 73.0)]
    found = compare(
        run_of(
            [arm("naive-plain", [trial(s, v) for s, v in NAIVE.items()]), arm("ewc-plain", trials)]
        )
    )
    assert found.estimates("average_accuracy")["ewc-plain"].seeds == (0, 2)
    [difference] = found.differences("average_accuracy")
    assert difference.estimate.seeds == (0, 2)
    assert "ewc-plain failed at seed 1 and is left out there: training ran away" in found.notes


def test_a_comparison_of_one_seed_notes_the_missing_interval(run_of):
    found = compare(run_of({"naive-plain": {0: 70.0}, "ewc-plain": {0: 71.0}}))
    [difference] = found.differences("average_accuracy")
    assert (difference.estimate.mean, difference.estimate.low) == (1.0, None)
    assert any(note.startswith("One seed has no standard error") for note in found.notes)


def test_compared_epsilons_have_delta_unit_and_relation(run_of):
    private = arm("ewc-private", [trial(0, 60.0, epsilon=3.0), trial(1, 61.0, epsilon=3.0)])
    plain = arm("ewc-plain", [trial(0, 60.0), trial(1, 61.0)])
    found = compare(run_of([private, plain]))
    assert list(found.values("epsilon")) == ["ewc-private"]
    [note] = [note for note in found.notes if "epsilon" in note]
    for word in (
        "per record, add-remove, delta 1e-05",
        "pld, poisson",
        "trusted curator",
        "simulation: not a private release",
        "several models",
    ):
        assert word in note
    other = [trial(seed, 60.0, epsilon=3.0) for seed in (0, 1)]
    for each in other:
        each["epsilon"] = TERMS | {"value": 3.0, "unit": "client"}
    mixed = compare(run_of([private, arm("lwf-private", other)], folder="mixed"))
    assert "epsilon" not in mixed.metrics
    assert any("left out" in note for note in mixed.notes)


def test_the_csv_of_a_comparison_equals_its_pandas_table(run_of):
    import pandas as pd

    found = compare(run_of())
    read = pd.read_csv(io.StringIO(found.to_csv()))
    table = found.to_pandas()
    assert list(read.columns) == list(table.columns)
    mine = read[(read["metric"] == "average_accuracy") & read["minus"].isna()].set_index("arm")
    assert mine.loc["ewc-plain", "mean"] == pytest.approx(71.5)
    assert mine.loc["ewc-plain", "seeds"] == 3
    paired = table[(table["metric"] == "forgetting") & table["minus"].notna()]
    assert paired["mean"].tolist() == pytest.approx([-(71.5 - 206.5 / 3)])


def test_the_json_of_a_comparison_has_its_rows_and_every_seed(run_of):
    found = compare(run_of())
    content = json.loads(found.to_json())
    assert content["rows"] == found.rows()
    assert content["values"]["average_accuracy"]["naive-plain"] == {
        str(seed): value for seed, value in NAIVE.items()
    }
    assert content["stream"] == "digits, class-incremental, 5 experiences"


# --------------------------------------------------------------------------- what is refused


def test_compare_refuses_runs_without_a_common_seed(run_of):
    one = run_of({"naive-plain": {0: 70.0, 1: 71.0}}, folder="one")
    two = run_of({"ewc-plain": {2: 70.0}}, folder="two")
    with pytest.raises(ConfigError) as refused:
        compare(one, two)
    assert str(refused.value) == (
        "naive-plain has the seeds 0, 1 and ewc-plain has 2, none in common; run both with the "
        "same seeds"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stream": {"name": "digits", "scenario": "task", "experiences": 5, "classes": []}},
            "stream.scenario = 'class' and .* 'task'; compare runs on the same data and stream",
        ),
        (
            {
                "task": {
                    "name": "regression",
                    "metric": "RMSE",
                    "unit": "",
                    "higher_is_better": False,
                }
            },
            "task = 'single-label' and .* 'regression'",
        ),
        (
            {"config": '[data]\nname = "digits"\nexperiences = 5\nchunk = 20'},
            "data.chunk = None and .* 20",
        ),
    ],
)
def test_compare_refuses_runs_on_different_streams(run_of, changes, message):
    with pytest.raises(ConfigError, match=message):
        compare(run_of(folder="one"), run_of(folder="two", **changes))


def test_compare_refuses_invalid_arguments_in_one_line(run_of, tmp_path):
    run = run_of()
    for call, message in (
        (lambda: compare(run, run), "is given twice"),
        (lambda: compare(), "runs = "),
        (lambda: compare(run, confidence=1.0), "confidence = 1.0"),
        (lambda: compare(run, baseline="ewc"), "baseline = 'ewc'.* naive-plain, ewc-plain"),
        (lambda: compare(run).estimates("speed"), "metric = 'speed'.* average_accuracy"),
    ):
        with pytest.raises(ConfigError, match=message) as refused:
            call()
        assert "\n" not in str(refused.value)
    with pytest.raises(RunError, match=r"result.json cannot be read"):
        compare(tmp_path / "nowhere")
    (run / "config.toml").unlink()
    with pytest.raises(RunError, match=r"config.toml cannot be read .*whole folders"):
        compare(run)
