"""Experiments on disk: configuration, runs, results, audits and tuning.

Import `read` or `parse` to get a `Config`, and `run` to train and evaluate it; a stopped run
continues. `tune` searches hyper-parameters of a learner on training records, `tune_run` searches
the settings of a config (`perdure tune`), and `lr_range_test` suggests a learning rate.
`cross_validate` measures a learner on every fold of public records, and `find_label_issues` finds
wrong labels. `attack_run` attacks the privacy of a run's models, `attack_models` their inputs, and
`audit_run` audits the private arms of a config. `read_result` reads the stored result of a run, and
`to_pandas` makes a table of it. `compare` compares arms over seeds, of one or several runs. `load`
loads a trained model, and `start_from` copies a run's parameters into a new model. `export_run`
writes a trained model to files that run without perdure. `examine_run` looks for mistakes before
training, `healed` applies remedies to a config, and `heal` restarts a run with them. `cards`
describes every strategy with its costs.
"""

from perdure.experiment.audits import attack_run, audit_run
from perdure.experiment.comparison import Comparison, Difference, compare
from perdure.experiment.config import Config, parse, read, read_text
from perdure.experiment.config_searches import Tuning, tune_run
from perdure.experiment.cross_validation import CrossValidated, cross_validate
from perdure.experiment.data_frames import to_pandas
from perdure.experiment.examinations import examine_run
from perdure.experiment.exports import export_run
from perdure.experiment.healing import Healing, heal
from perdure.experiment.label_issues import LabelIssues, find_label_issues
from perdure.experiment.overrides import toml_text
from perdure.experiment.paired_statistics import Estimate
from perdure.experiment.rate_test import RateTest, lr_range_test
from perdure.experiment.remedies import Healed, healed
from perdure.experiment.result_schema import Result, read_result
from perdure.experiment.results import spending
from perdure.experiment.robust_runs import AttackedModel, attack_models
from perdure.experiment.run import load, run, untimed
from perdure.experiment.search_space import Range, Space, Values
from perdure.experiment.starts import start_from
from perdure.experiment.strategy_catalogue import StrategyCard, cards
from perdure.experiment.tuning import Tuned, tune

__all__ = [
    "AttackedModel",
    "Comparison",
    "Config",
    "CrossValidated",
    "Difference",
    "Estimate",
    "Healed",
    "Healing",
    "LabelIssues",
    "Range",
    "RateTest",
    "Result",
    "Space",
    "StrategyCard",
    "Tuned",
    "Tuning",
    "Values",
    "attack_models",
    "attack_run",
    "audit_run",
    "cards",
    "compare",
    "cross_validate",
    "examine_run",
    "export_run",
    "find_label_issues",
    "heal",
    "healed",
    "load",
    "lr_range_test",
    "parse",
    "read",
    "read_result",
    "read_text",
    "run",
    "spending",
    "start_from",
    "to_pandas",
    "toml_text",
    "tune",
    "tune_run",
    "untimed",
]
