"""Checks of a config that is to be trained by an app."""

from perdure.errors import ConfigError
from perdure.experiment.config import Config


def refuse_undeployable(config: Config, source: str) -> None:
    """Refuse a config that an app cannot train.

    Args:
        config: the config.
        source: its name, for messages.

    Raises:
        ConfigError: if it has no federation.
    """
    if config.federation is None:
        raise ConfigError(
            f"{source} has no table [federation]; allowed: a config with clients and rounds, such "
            "as clients = 2 and rounds = 3, because an app trains a federation"
        )
