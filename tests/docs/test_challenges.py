"""The page of challenges: each remedy is a part of a config that `perdure config` accepts."""

import re
import tomllib

import pytest

from helpers.pages import ROOT
from perdure.experiment import parse, toml_text
from perdure.experiment.run_checks import checked_stream

PAGE = (ROOT / "docs/concepts/challenges.md").read_text()
REMEDY = re.compile(r"^\*([^*\n]+):\*[^`]*?(?:`[^`\n]+`[^`]*?)*```toml\n(.*?)```$", re.S | re.M)
REMEDIES = {name.lower(): block for name, block in REMEDY.findall(PAGE)}
CHALLENGES = re.findall(r"^\| ([a-z -]+) \|", PAGE, re.M)[1:]
WITHOUT_TABLE = {"deployment"}
"""Challenges whose remedy is a command, as the page says."""
OUTSIDE = {"sequences", "transfer and domain adaptation"}
"""Remedies that need an earlier run or a downloaded data set, so that only their keys are read."""
BASE = {
    "name": "challenge",
    "data": {"name": "digits"},
    "model": {"name": "mlp"},
    "training": {"epochs": 1},
    "arms": [{"strategy": "naive"}],
}


def merged(base, part):
    """Tables of `base` with the keys of `part`."""
    both = [key for key in part if isinstance(part[key], dict) and isinstance(base.get(key), dict)]
    return base | part | {key: merged(base[key], part[key]) for key in both}


def test_every_challenge_has_its_remedy_in_toml():
    assert len(CHALLENGES) == 25
    assert [name for name in CHALLENGES if name not in WITHOUT_TABLE] == list(REMEDIES)


@pytest.mark.parametrize("name", REMEDIES)
def test_a_remedy_in_toml_is_accepted_as_part_of_a_config(name):
    part = tomllib.loads(REMEDIES[name])
    config = parse(toml_text(merged(BASE, part)))
    assert part.keys() - {"name"}
    if name not in OUTSIDE:
        assert len(checked_stream(config)) == 5
