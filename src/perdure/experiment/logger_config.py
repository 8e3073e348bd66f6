"""Loggers of a configured run: each training has a run of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from perdure.experiment.from_tables import extension
from perdure.loggers import Logger
from perdure.loggers import find as find_logger
from perdure.loggers import names as logger_names
from perdure.utils.checked_fields import CheckedFields


@dataclass(frozen=True, kw_only=True)
class LoggerConfig(CheckedFields):
    """A logger of every training.

    Args:
        name: one of `perdure.loggers.names()`, or "my_package.my_module:MyLogger".
        logger: the logger with the values of its own fields.
    """

    TABLE: ClassVar[str] = "a table with name = NAME and the logger's own fields"

    name: str
    logger: Logger

    @classmethod
    def from_table(cls, table: Mapping[str, Any], where: str) -> "LoggerConfig":
        """Find the logger by its name, and build it from the other fields of the table."""
        name, logger = extension(find_logger, logger_names, "name", table, where)
        return cls(name=name, logger=logger)

    def of_trial(self, trial: str, *, project: str, folder: Path) -> Logger:
        """Return a new logger for one training.

        Args:
            trial: name of the training, which is the name of its run, or the end of it.
            project: name of the config, which is the default of the project.
            folder: folder of the configured run, whose `loggers` is the default folder.
        """
        given = self.logger
        return replace(
            given,
            folder=folder / "loggers" if given.folder is None else given.folder,
            project=given.project or project,
            run=f"{given.run}-{trial}" if given.run else trial,
        )
