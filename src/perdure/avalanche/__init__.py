"""Adapters to and from Avalanche.

Import `from_avalanche` to turn a benchmark of Avalanche into a stream, `as_plugin` to use a
strategy in an Avalanche template, and `log_to` to send metrics to the loggers of Avalanche.
"""

from perdure.avalanche.benchmarks import from_avalanche, task_labels
from perdure.avalanche.loggers import log_to
from perdure.avalanche.plugin import StrategyPlugin, as_plugin

__all__ = [
    "StrategyPlugin",
    "as_plugin",
    "from_avalanche",
    "log_to",
    "task_labels",
]
