"""The command `perdure attack` on a finished run."""

import json

import pytest
from typer.testing import CliRunner

from perdure.cli.main import app
from perdure.experiment import parse, run

TEXT = """
name = "small"
[data]
name = "digits"
experiences = 2
[model]
hidden = [16]
[training]
iterations = 40
[[arms]]
strategy = "naive"
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(parse(TEXT), TEXT, folder)
    (folder / "config.toml").write_text(TEXT)
    return folder


def attacked(*arguments):
    return CliRunner().invoke(app, ["attack", *map(str, arguments)])


def test_attack_prints_and_stores_cards_and_checks(finished, tmp_path):
    target = tmp_path / "cards.json"
    done = attacked(
        finished, "--eps", 0.05, "--steps", 5, "--records", 40, "--check", "--json", target
    )
    assert done.exit_code == 0, done.output
    cards = json.loads(target.read_text())["naive-plain"]
    assert [card["records"] for card in cards] == [40, 40]
    assert all(card["robust_accuracy"] <= card["clean_accuracy"] for card in cards)
    assert cards[1]["robust_accuracy"] < cards[1]["clean_accuracy"]
    assert f"{cards[1]['robust_accuracy']:.1f}" in done.output
    assert [card["experience"] for card in cards] == [0, 1]
    for word in ("PGD, linf 0.05, steps 5", "an attack without limit leaves", "are left:"):
        assert word in done.output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "--eps"),
        (("--eps", 0.1, "--records", 0), "records"),
        (("other", "--eps", 0.1), "arm"),
        (("--eps", 0.1, "--autoattack", "--check"), "attack"),
        (("--eps", 0.1, "--bounds", 2, 3), r"bounds"),
    ],
)
def test_attack_refuses_wrong_arguments_by_name(finished, arguments, named):
    done = attacked(finished, *arguments)
    assert done.exit_code != 0
    assert named in str(done.exception)
