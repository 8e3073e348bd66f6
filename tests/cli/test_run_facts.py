"""Facts of a config that a ledger is read with."""

from helpers.config_errors import ARM, HEAD
from perdure.cli.run_facts import read_facts
from perdure.experiment.config import parse
from perdure.experiment.trained_models import trials


def test_config_facts_list_trainings_of_private_and_plain_arms(tmp_path):
    privacy = "[privacy]\nepsilon = 1.0\n"
    named = '[[arms]]\nname = "mine"\nstrategy = "naive"\nprivate = true\n'
    for seeds in ("", "seeds = [2, 7]\n"):
        text = f"{HEAD}{seeds}{privacy}{ARM}{named}"
        (tmp_path / "config.toml").write_text(text)
        facts = read_facts(tmp_path / "config.toml")
        names = trials(parse(text))
        assert facts.private_arms == tuple(n for n, (arm, _) in names.items() if arm.private)
        assert facts.plain_arms == tuple(n for n, (arm, _) in names.items() if not arm.private)
