"""Checks of a config that is to be trained by an app."""

from perdure.errors import ConfigError, PrivacyError
from perdure.experiment.config import Config


def refuse_undeployable(config: Config, source: str) -> None:
    """Refuse a config that an app cannot train.

    Args:
        config: the config.
        source: its name, for messages.

    Raises:
        ConfigError: if it has no federation.
        PrivacyError: if it has private arms, whose ledgers the server would have to know.
    """
    if config.federation is None:
        raise ConfigError(
            f"{source} has no table [federation]; allowed: a config with clients and rounds, such "
            "as clients = 2 and rounds = 3, because an app trains a federation"
        )
    private = [arm.name for arm in config.arms if arm.private]
    if private:
        raise PrivacyError(
            f"{source} has private arms ({private[0]}), which an app cannot train yet: the ledgers "
            "stay at the sites, and the report of the server would have no epsilon; remove these "
            "arms, or train them with perdure run"
        )
