"""The smallest valid config, and the one-line error of an invalid one."""

import pytest

from perdure.errors import ConfigError
from perdure.experiment.config import parse

ARM = '[[arms]]\nstrategy = "naive"\n'
HEAD = 'name = "x"\n'


def refusal(text):
    """Return the one-line error of an invalid config."""
    with pytest.raises(ConfigError) as caught:
        parse(text)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message
