"""Results as pandas DataFrames. pandas is an extra and is loaded when it is used."""

from collections.abc import Mapping, Sequence
from typing import Any

from perdure.experiment.compared_runs import NUMBERS, numbers
from perdure.experiment.result_schema import Result, checked
from perdure.utils.extras import imported

COLUMNS = ("arm", "strategy", "options", "private", "seed", "failure", *NUMBERS)
"""Columns of the table of one result."""


def to_pandas(result: Mapping[str, object]) -> Any:
    """Return a result as a DataFrame: one row for each arm and seed, one column for each number.

    A number that was not measured is NaN. The calibration error is the mean over experiences.

    Args:
        result: result of a run, from `run` or `read_result`.

    Raises:
        ConfigError: without pandas.
        RunError: for a result of another schema.
    """
    run: Result = checked(result)
    rows = [
        {
            "arm": arm["name"],
            **{name: arm[name] for name in ("strategy", "options", "private")},
            "seed": trial["seed"],
            "failure": trial["failure"],
            **numbers(trial),
        }
        for arm in run["arms"]
        for trial in arm["seeds"]
    ]
    return data_frame(rows, COLUMNS)


def data_frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Any:
    """Return rows as a pandas DataFrame.

    Args:
        rows: one dictionary per row.
        columns: keys, in order.

    Raises:
        ConfigError: without pandas.
    """
    pd = imported("pandas", "tables", "to_pandas")
    return pd.DataFrame(rows, columns=list(columns))
