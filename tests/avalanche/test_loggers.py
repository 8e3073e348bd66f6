"""Metrics of perdure through the loggers of Avalanche."""

import io

import pytest
import torch

from helpers.avalanche_harness import BATCH, EPOCHS, SameBatches, accuracies, adam, quiet
from perdure.avalanche.benchmarks import from_avalanche
from perdure.avalanche.loggers import log, log_to
from perdure.avalanche.plugin import as_plugin
from perdure.errors import ConfigError
from perdure.learner.learner import Learner
from perdure.strategies.replay import Replay

pytestmark = [pytest.mark.reference, pytest.mark.slow]


# ---------------------------------------------------------------- metrics through their loggers


def logger(kind, *args):
    import avalanche.logging

    return getattr(avalanche.logging, kind)(*args)


def evaluator(*loggers):
    from avalanche.training.plugins import EvaluationPlugin

    return EvaluationPlugin(loggers=list(loggers))


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_logged_names_and_values_equal_those_of_avalanche(scenario, benchmark, toy_model, template):
    from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics
    from avalanche.training.plugins import EvaluationPlugin

    made = benchmark(scenario)
    ours = io.StringIO()
    theirs = io.StringIO()
    plugged = EvaluationPlugin(
        accuracy_metrics(experience=True),
        forgetting_metrics(experience=True),
        loggers=[logger("TextLogger", theirs)],
    )
    stream = from_avalanche(made)
    strategy = Replay(memory_size=8)
    teacher = template(
        toy_model(stream),
        SameBatches(stream, toy_model(stream)),
        as_plugin(strategy),
        evaluator=plugged,
    )
    for experience in made.train_stream:
        teacher.train(experience)
        teacher.eval(made.test_stream)
    shown = evaluator(logger("TextLogger", ours))
    learner = Learner(
        model=toy_model(stream),
        strategy=strategy,
        optimizer=adam,
        epochs=EPOCHS,
        batch_size=BATCH,
        callbacks=[log_to(shown)],
    )
    learner.fit(stream)
    expected = plugged.get_last_metrics()
    given = shown.get_last_metrics()
    assert {name: given[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert shown.get_all_metrics()["average_accuracy/eval_phase/test_stream"][0] == [5, 10], "steps"
    kept = [line for line in theirs.getvalue().splitlines() if not line.startswith("Epoch")]
    own = [line for line in ours.getvalue().splitlines() if "/eval_phase/test_stream =" not in line]
    assert own == kept


def test_the_csv_file_holds_the_whole_accuracy_matrix(avalanche, tmp_path):
    file = logger("CSVLogger", str(tmp_path))
    log(torch.tensor([[100.0, 0.0, float("nan")], [60.0, 90.0, 10.0]]), evaluator(file))
    file.close()
    rows = (tmp_path / "eval_results.csv").read_text().splitlines()
    assert rows == [
        "eval_exp,training_exp,eval_accuracy,eval_loss,forgetting",
        "0,0,1.0000,0,0",
        "1,0,0.0000,0,0",
        "0,1,0.6000,0,0.4000",
        "1,1,0.9000,0,0",
        "2,1,0.1000,0,0",
    ]


def test_a_logged_accuracy_matrix_gives_metrics_as_fractions(avalanche, capsys):
    last = log(torch.tensor([[100.0, 0.0], [60.0, 90.0]]), evaluator(logger("InteractiveLogger")))
    assert last == pytest.approx(
        {
            "Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp000": 0.6,
            "Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp001": 0.9,
            "ExperienceForgetting/eval_phase/test_stream/Task000/Exp000": 0.4,
            "average_accuracy/eval_phase/test_stream": 0.75,
            "area_under_accuracy/eval_phase/test_stream": 0.875,
            "learning_accuracy/eval_phase/test_stream": 0.95,
            "forgetting/eval_phase/test_stream": 0.4,
            "backward_transfer/eval_phase/test_stream": -0.4,
            "worst_experience_accuracy/eval_phase/test_stream": 0.6,
        }
    )
    assert "backward_transfer/eval_phase/test_stream = -0.4000" in capsys.readouterr().out


def test_log_to_refuses_unsupported_evaluators(avalanche):
    with pytest.raises(ConfigError, match="EvaluationPlugin"):
        log_to(logger("TextLogger"))
    with pytest.raises(ConfigError, match="no metrics"):
        log_to(accuracies())
    with pytest.raises(ConfigError, match="accuracy_matrix"):
        log(torch.tensor([101.0]), quiet())
