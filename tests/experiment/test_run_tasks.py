"""Runs of every task from a config, with data and model of one's own."""

import math

import pytest
from rich.console import Console

from helpers.config_errors import ARM, HEAD
from perdure.errors import ConfigError
from perdure.experiment.arm import open_stream
from perdure.experiment.config import parse
from perdure.experiment.model_config import make_model
from perdure.experiment.run import run
from perdure.report.figures import pictures
from perdure.report.page import html
from perdure.report.table import table

OWN = '[model]\nname = "helpers.own_data:Net"\nhidden = 3\n'
GRU = '[model]\nname = "gru"\nhidden = 4\nembedding = 3\n'
TASKS = {
    "prices": (OWN, "RMSE", ""),
    "tags": (OWN, "macro-F1", "%"),
    "words": (GRU, "bits per token", "bits"),
}


def config_of(data, model, more=""):
    """A config of data that the tests make."""
    told = f'[data]\nname = "helpers.own_data:{data}"\nstream = "by_domain"\n'
    return f"{HEAD}{told}{model}[training]\nepochs = 1\n{more}{ARM}"


@pytest.mark.parametrize("data", TASKS)
def test_a_run_reports_the_metric_of_its_task(tmp_path, data):
    model, metric, unit = TASKS[data]
    text = config_of(data, model, "micro_batch_size = 8\n")
    result = run(parse(text), text, tmp_path)
    assert (result["task"]["metric"], result["task"]["unit"]) == (metric, unit)
    (arm,) = result["arms"]
    last = arm["accuracy_matrix"][-1]
    assert arm["average_accuracy"] == pytest.approx(sum(last) / 2) and math.isfinite(last[0])
    assert arm["calibration_error"] is None
    page = html(result, pictures(result, tmp_path) if data == "words" else [], None)
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(table(result))
    assert metric.split()[0] in captured.get() and f"average {metric}" in page
    if unit != "%":
        assert f"<strong>{arm['average_accuracy']:.3f} {unit}".rstrip() in page
        assert "accuracy, %" not in page and "lower is better" in captured.get()


def test_parameters_of_a_users_model_depend_only_on_the_seed():
    config = parse(config_of("prices", OWN))
    stream = open_stream(config)
    first, again, other = (make_model(config.model, stream, seed) for seed in (1, 1, 2))
    assert first.head.weight.equal(again.head.weight)
    assert not first.head.weight.equal(other.head.weight)
    assert first.head.in_features == 3


def test_a_config_refuses_an_attack_on_regression_records():
    text = config_of("prices", OWN, '[attack]\nname = "fgsm"\nepsilon = 0.1\n')
    with pytest.raises(ConfigError, match=r"^\[attack\] does not support regression records"):
        open_stream(parse(text))


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ('name = "helpers.own_data:no_model"', "model.name = 'helpers.own_data:no_model of a int'"),
        (
            'name = "helpers.own_data:Net"\nwidth = 3',
            "model.width = 3 is not allowed; allowed: one",
        ),
        ('name = "helpers.own_data:Net"\nhidden = "3"', "model.hidden = '3' is not allowed"),
        ('name = "helpers.own_data:Nit"', "model.name = 'helpers.own_data:Nit' cannot be imported"),
        (
            'name = "gru"\nhidden = 1.5',
            "model.hidden = 1.5 is not allowed; allowed: a whole number",
        ),
    ],
)
def test_a_model_that_does_not_fit_its_task_is_refused_by_key(model, told):
    with pytest.raises(ConfigError) as caught:
        config = parse(config_of("prices", f"[model]\n{model}\n"))
        make_model(config.model, open_stream(config), 0)
    assert str(caught.value).startswith(told)
