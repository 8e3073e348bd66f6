"""Searches: draws after a stop, batches, samplers, and notations of a space. Nothing is trained."""

import math

import pytest

from perdure.errors import ConfigError, RunError
from perdure.experiment.search_space import Range, checked_space, space_of_table
from perdure.experiment.searches import Score, Search

SPACE = checked_space(
    {"rate": (1e-4, 1.0), "width": (1, 64), "kind": ["a", "b"], "shape": [[8], [8, 8]]}
)
ALL = (("tpe", 1), ("cmaes", 1), ("nsga2", 2), ("random", 1))


def scores(values, goals):
    first = -abs(math.log10(values["rate"]) + 2) - len(values["shape"])
    return Score(values=(first, float(values["width"]))[:goals], failed=False)


def search(sampler, goals, file, *, stop=None, batch=1, trials=14, seed=3, space=SPACE):
    """Run a search; `stop` ends it before the score of this trial is known."""
    made = Search(
        space=space, higher_is_better=(True, False)[:goals], sampler=sampler, seed=seed, batch=batch
    )
    trained = []

    def evaluate(asked):
        for number, values in asked:
            if number == stop:
                raise KeyboardInterrupt
            trained.append(number)
            yield scores(values, goals)

    try:
        found = made.run(trials, evaluate, file=file, identity={"seed": seed})
    except KeyboardInterrupt:
        found = None
    return found, trained


@pytest.mark.parametrize(("sampler", "goals"), ALL)
def test_a_stopped_search_draws_as_one_that_never_stopped(tmp_path, sampler, goals):
    whole, _ = search(sampler, goals, None)
    file = tmp_path / "study.db"
    assert search(sampler, goals, file, stop=11)[1] == list(range(11))
    found, trained = search(sampler, goals, file)
    assert trained == list(range(11, 14))
    assert found == whole
    assert len({trial.values["rate"] for trial in whole}) > 8


def test_a_search_in_batches_is_stopped_inside_a_batch(tmp_path):
    whole, _ = search("tpe", 1, None, batch=4)
    file = tmp_path / "study.db"
    search("tpe", 1, file, stop=10, batch=4)
    found, trained = search("tpe", 1, file, batch=4)
    assert trained == list(range(10, 14)) and found == whole
    assert [trial.values for trial in whole] != [t.values for t in search("tpe", 1, None)[0]]


def test_a_file_with_other_draws_is_refused(tmp_path):
    file = tmp_path / "study.db"
    search("random", 1, file, trials=2)
    with pytest.raises(RunError, match="another seed"):
        search("random", 1, file, trials=3, seed=4)
    other = {**SPACE, "rate": Range(low=1e-3, high=1.0)}
    with pytest.raises(RunError, match="this installation draws"):
        search("random", 1, file, trials=3, space=other)


def test_a_space_of_a_table_means_what_it_means_in_python():
    table = {
        "training.learning_rate": [0.001, 1.0],
        "training": {"momentum": [0.0, 0.9], "epochs": [1, 8]},
        "model.hidden": {"choices": [[32], [64, 64]]},
        "arms.0.strength": {"low": 1.0, "high": 5.0, "scale": "linear"},
    }
    assert space_of_table(table, "space") == {
        **checked_space(
            {
                "training.learning_rate": (0.001, 1.0),
                "training.momentum": (0.0, 0.9),
                "training.epochs": (1, 8),
                "model.hidden": [[32], [64, 64]],
            }
        ),
        "arms.0.strength": Range(low=1.0, high=5.0, scale="linear"),
    }
    rate, momentum, epochs = (
        Range(low=low, high=high) for low, high in ((0.001, 1.0), (0.0, 0.9), (1, 8))
    )
    assert (rate.logarithmic, momentum.logarithmic, epochs.logarithmic) == (True, False, False)
    assert (rate.whole, epochs.whole) == (False, True)


@pytest.mark.parametrize("wrong", [[1.0], [2.0, 1.0], ["a", "b"], 3, {"choices": []}, {"low": 1}])
def test_values_of_a_space_that_are_no_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=r'space\."training\.epochs"'):
        space_of_table({"training.epochs": wrong}, "space")


def test_samplers_that_do_not_fit_are_refused():
    one = checked_space({"rate": (0.1, 1.0)})
    with pytest.raises(ConfigError, match="cmaes needs two ranges"):
        Search(space=one, sampler="cmaes")
    with pytest.raises(ConfigError, match="nsga2 for several goals"):
        Search(space=one, higher_is_better=(True, True))
