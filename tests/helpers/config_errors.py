"""The smallest config that is right, and the one line with which another is refused."""

import pytest

from perdure.errors import ConfigError
from perdure.experiment.config import parse

ARM = '[[arms]]\nstrategy = "naive"\n'
HEAD = 'name = "x"\n'


def refusal(text):
    """The one line with which a config is refused."""
    with pytest.raises(ConfigError) as caught:
        parse(text)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message
