"""Findings and remedies of a configured run: examination, healed configs, restarts, refusals."""

import ast
import contextlib
import importlib
import inspect
import json
import re
import shutil
from dataclasses import fields, replace

import pytest

from perdure import models
from perdure.doctor import Finding, Remedy, Trace, rules
from perdure.errors import ConfigError, LedgerError
from perdure.experiment import examine_run, heal, healed, parse, read_result, run
from perdure.experiment.calls import parameters
from perdure.experiment.data_config import DataConfig
from perdure.experiment.federation_table import FederationConfig
from perdure.experiment.finding_rows import finding_of, finding_row
from perdure.experiment.training_config import TrainingConfig
from perdure.models import ModelConfig
from perdure.privacy import Privacy
from perdure.report import findings_table, healing_table, write_report
from perdure.report.findings import finding_pictures, remedy_in_words

CONFIG = """
name = "small"
[data]
name = "helpers.own_data:blobs"
experiences = 2
[model]
hidden = [16]
[training]
optimizer = "SGD"
learning_rate = 1000.0
iterations = 8
[[arms]]
strategy = "naive"
"""
SLOW = CONFIG.replace("1000.0", "1e-6").replace("experiences = 2", 'stream = "joint"')
PRIVATE = """
[privacy]
noise_multiplier = 2.0
seed = 0
[[arms]]
strategy = "naive"
private = true
"""


def finding(cause="learning rate", rule="r", **changes):
    return Finding(
        rule=rule,
        cause=cause,
        evidence="e",
        measured=float("inf"),
        threshold=1.0,
        source="s",
        remedy=Remedy(advice="a", changes=changes),
        series=(1.0, float("inf")),
    )


def of(path, value, **others):
    return replace(finding(**others), remedy=Remedy(advice="a", changes={path: value}))


RATE = of("training.learning_rate", 0.1)


def test_remedies_of_the_first_cause_change_text_and_config():
    later = of("training.batch_size", 8, cause="memory", rule="later")
    none = finding(cause="data", rule="no setting")
    found = healed(CONFIG, [later, RATE, none])
    assert (found.cause, found.rules) == ("learning rate", ("r",))
    assert parse(found.config).training.learning_rate == 0.1
    assert found.refused == {
        "no setting": "no setting of a config applies it",
        "later": "waits for the repair of 'learning rate'",
    }
    config = parse(CONFIG)
    assert healed(config, [RATE]).config == parse(found.config)
    assert config.training.learning_rate == 1000.0


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("training.learning_rate", -1.0, "learning_rate"),
        ("training.no_such", 1, "no_such"),
        ("model.no_such", 1, "no_such"),
        ("data.options.standardise", "declared", "standardise"),
        ("training.learning_rate", 1000.0, "already"),
    ],
)
@pytest.mark.parametrize("given", [CONFIG, parse(CONFIG)], ids=["text", "config"])
def test_a_remedy_that_a_config_refuses_is_left_out(path, value, told, given):
    found = healed(given, [of(path, value)])
    assert found.cause == ""
    assert found.config == given
    assert told in found.refused["r"]


@pytest.mark.parametrize("path", ["training.learning_rate", "private_training.learning_rate"])
def test_a_remedy_for_some_arms_leaves_the_others_alone(path):
    for given in (CONFIG + PRIVATE, parse(CONFIG + PRIVATE)):
        after = healed(given, [of(path, 0.5)]).config
        config = parse(after) if isinstance(after, str) else after
        rates = {config.training.learning_rate, config.private_training.learning_rate}
        assert rates == {0.5, 1000.0}
        assert (config.training.learning_rate == 0.5) == path.startswith("training")


def test_findings_survive_the_result_file():
    found = replace(RATE, explained_by=("initial variance",))
    row = json.loads(json.dumps(finding_row(found), allow_nan=False))
    assert finding_of(row) == found


KEYS = {
    "training": {field.name for field in fields(TrainingConfig)},
    "federation": {field.name for field in fields(FederationConfig)},
    "privacy": {field.name for field in fields(Privacy)},
    "data": {field.name for field in fields(DataConfig)},
    "explain": {"samples"},
    "model": {field.name for field in fields(ModelConfig)} | {*parameters(models.decoder)},
}


SOURCES = [
    inspect.getsource(importlib.import_module(rules.find(name).__module__))
    for name in rules.names()
]


def test_every_path_that_a_rule_proposes_is_a_key_of_the_config():
    """Paths are read from the files of the rules."""
    proposed = {path for text in SOURCES for path in re.findall(r'"(\w+\.[\w.]+)": ', text)}
    assert len(proposed) > 12
    for path in proposed:
        table, key, *_ = path.split(".")
        assert key in KEYS[table], path


def constant_changes():
    """Yield every change without variables that a rule proposes, as path and value."""
    for node in (node for text in SOURCES for node in ast.walk(ast.parse(text))):
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Dict):
            for path, value in zip(node.value.keys, node.value.values, strict=True):
                with contextlib.suppress(ValueError):
                    yield ast.literal_eval(path), ast.literal_eval(value)


def test_every_constant_change_of_a_rule_is_accepted():
    tables = CONFIG.replace("[training]", "[federation]\nclients = 2\n[training]") + PRIVATE
    tables = tables.replace("hidden = [16]", "hidden = [16, 16]")
    text = tables.replace("seed = 0\n", 'seed = 0\ndiagnostics = "raw"\n')
    # options of a data set are arguments of its function, so a config may lack them
    tried = [each for each in constant_changes() if not each[0].startswith("data.options")]
    assert len(tried) > 8
    for path, value in tried:
        # a federation has no validation, whose clients would stop one by one
        given = CONFIG if path.startswith("training.validation") else text
        assert healed(given, [of(path, value)]).refused == {}, path


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return heal(SLOW, tmp_path_factory.mktemp("healing") / "small", restarts=1)


def test_healing_restarts_beside_the_run_and_reports_both(outcome):
    assert [folder.name for folder in outcome.folders][:2] == ["small", "small-healed"]
    first = outcome.restarts[0]
    assert first["cause"] == "learning rate"
    assert first["changes"]["training.learning_rate"] > 1e-4
    (values,) = first["arms"].values()
    assert values["after"] > (values["before"] or 25) + 20
    last = read_result(outcome.folders[-1])
    assert last["healing"] == list(outcome.restarts)
    assert "healing" not in read_result(outcome.folders[0])
    assert "learning_rate = 1e-6" in (outcome.folders[0] / "config.toml").read_text()


def test_a_healing_that_is_repeated_trains_nothing_again(outcome):
    before = [(folder / "result.json").read_bytes() for folder in outcome.folders]
    shares = []
    again = heal(SLOW, outcome.folders[0], restarts=1, progress=lambda *told: shares.append(told))
    assert again.restarts == outcome.restarts
    assert {told[1] for told in shares} == {1.0}
    assert [(folder / "result.json").read_bytes() for folder in again.folders] == before


def test_a_restart_that_is_worse_is_withdrawn(tmp_path):
    text = SLOW.replace("1e-6", "0.1")
    result = run(parse(text), text, tmp_path / "small")
    # the first finding misleads, and the second one proposes the same
    result["arms"][0]["findings"] = [
        finding_row(of("training.iterations", 1, rule="misleads")),
        finding_row(of("training.iterations", 1, rule="alike")),
        finding_row(of("training.reset_optimizer", True, rule="harmless", cause="memory")),
    ]
    (tmp_path / "small" / "result.json").write_text(json.dumps(result))
    told = []
    done = heal(text, tmp_path / "small", restarts=2, told=told.append)
    worse, further = done.restarts
    assert done.refused["misleads"] == worse["worse"]
    assert re.fullmatch(r"made it worse: [\d.]+ -> [\d.]+", worse["worse"])
    assert any("its remedies are withdrawn" in line for line in told)
    # the search goes on from the first run, and the whole list stays in every restart
    assert (further["start"], further["worse"]) == ("small", "")
    assert further["changes"] == {"training.reset_optimizer": True}
    assert done.best != done.folders[1]
    assert "iterations = 8" in (done.best / "config.toml").read_text()
    for folder in done.folders[1:]:
        assert read_result(folder)["healing"] == list(done.restarts)
    assert "worse, withdrawn" in next(iter(healing_table(done.restarts).columns[0].cells))


def test_the_report_shows_findings_with_pictures_and_restarts(outcome):
    page = write_report(outcome.folders[0]).read_text()
    assert "learning rate range (learning rate): naive-plain" in page
    assert 'aria-label="Line of ' in page
    page = write_report(outcome.folders[1]).read_text()
    assert "Restarts with remedies" in page
    assert healing_table(outcome.restarts).row_count == len(outcome.restarts)


def test_remedies_are_shown_as_they_stand_in_a_config():
    trace = Trace(experience=0, steps=0, done=0, private=False, names=(), matrices=())
    trace = replace(trace, clean=80.0, attacked=20.0, attack_epsilon=0.25)
    shown = remedy_in_words(finding_row(rules.find("fragile_to_attacks")().watch(trace)))
    attack = '{name = "pgd", epsilon = 0.25, steps = 5, step_size = 0.1}'
    assert shown == f"adversarial training (training.adversary = {attack})"


def test_pictures_of_findings_count_in_whole_numbers(outcome):
    row = {**finding_row(RATE), "series": [0.2, 0.4], "threshold": 0.3}
    result = read_result(outcome.folders[0])
    result["arms"][0]["findings"] = [row]
    (picture,) = finding_pictures(result)
    ticks = picture.figure.axes[0].get_xticks()
    assert all(float(tick).is_integer() for tick in ticks)


def test_the_table_of_findings_has_one_line_a_rule():
    first, second, other = (
        {**finding_row(of("training.reset_optimizer", True, rule=rule)), "experience": index}
        for index, rule in ((0, "r"), (2, "r"), (0, "s"))
    )
    drawn = findings_table({"a": [first, second, other], "b": [first]})
    assert drawn.row_count == 3
    assert list(drawn.columns[3].cells) == ["experience 1"] * 3
    assert list(drawn.columns[4].cells) == ["e; also in experience 3", "e", "e"]
    assert next(iter(drawn.columns[5].cells)) == "a (training.reset_optimizer = true)"


def test_findings_of_a_run_stand_in_its_result(tmp_path):
    text = CONFIG.replace(
        '"helpers.own_data:blobs"', '"helpers.own_data:blobs"\noptions = {spread = 90.0}'
    )
    quick = run(parse(text), text, tmp_path / "quick", examine="quick")
    assert [row["rule"] for row in quick["arms"][0]["findings"]][:1] == ["unscaled input"]
    assert quick["arms"][0]["seeds"][0]["findings"] == quick["arms"][0]["findings"]


def test_private_restarts_without_a_total_budget_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="every restart uses the private records again"):
        heal(CONFIG + PRIVATE, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for changes in ({"total_epsilon": 3.0}, {"restarts": 0}):
        with pytest.raises(ConfigError, match="is not allowed"):
            heal(CONFIG, tmp_path / "run", **changes)


@pytest.mark.deep(reason="full replay: trains privately twice, and accounts for both runs")
def test_a_private_restart_is_charged_after_the_first_run(tmp_path):
    text = SLOW.split("[[arms]]")[0] + PRIVATE
    done = heal(text, tmp_path / "run", restarts=1, total_epsilon=100.0)
    first, after = [read_result(folder)["arms"][0] for folder in done.folders]
    assert after["epsilon"]["value"] > first["epsilon"]["value"]
    spent = {row["purpose"]: row["steps"] for row in after["spending"]}
    assert spent["spent elsewhere"] == sum(row["steps"] for row in first["spending"])
    config = parse((done.folders[1] / "config.toml").read_text())
    assert config.privacy.epsilon == 100.0
    # without the first ledger, a further restart would forget its charges
    shutil.rmtree(done.folders[1])
    shutil.rmtree(done.folders[0] / "arms")
    with pytest.raises(LedgerError, match="has no ledger"):
        heal(text, tmp_path / "run", restarts=1, total_epsilon=100.0)
    assert not done.folders[1].exists()


def test_a_config_is_examined_arm_by_arm():
    found = examine_run(parse(CONFIG + PRIVATE), trials=False)
    assert list(found) == ["naive-plain", "naive-private"]
    assert {"undeclared size"} <= {each.rule for each in found["naive-private"]}
    assert all(
        path.startswith("private_training")
        for each in found["naive-private"]
        for path in each.remedy.changes
    )


ALONE = SLOW.split("[[arms]]")[0] + PRIVATE


@pytest.mark.parametrize(
    ("text", "changes", "told"),
    [
        (ALONE, {"total_epsilon": -1.0}, "privacy.epsilon = -1.0"),
        (ALONE, {"total_epsilon": float("nan")}, "privacy.epsilon = nan"),
        (ALONE, {"total_epsilon": "3"}, "total_epsilon = '3'"),
        (ALONE, {"restarts": "3"}, "restarts = '3'"),
        (ALONE, {"restarts": float("nan")}, "restarts = nan"),
        (ALONE.replace("noise_multiplier = 2.0", "epsilon = 8.0"), {}, "or more"),
        ("seeds = [0, 1]" + ALONE, {}, "2 private models"),
    ],
)
def test_a_private_healing_is_refused_before_its_first_run(tmp_path, text, changes, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        heal(text, tmp_path / "run", **{"total_epsilon": 3.0, **changes})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        "",
        'aggregator = "FedAdam"\naggregator_options = {eta = 0.1}',
        'aggregator = "Krum"\naggregator_options = {num_malicious_nodes = 1}',
        'pre_aggregators = [{name = "nearest_neighbours", hostile = 1}]',
    ],
    ids=["plain", "adam", "krum", "neighbours"],
)
def test_another_aggregator_drops_the_options_of_the_former(options):
    text = f"{CONFIG}\n[federation]\nclients = 7\nrounds = 2\n{options}\n"
    for given in (text, parse(text)):
        found = healed(given, [of("federation.aggregator", "FedMedian")])
        assert found.refused == {}
        config = parse(found.config) if isinstance(found.config, str) else found.config
        assert config.federation.aggregator == "FedMedian"
        assert config.federation.aggregator_options == {}
        assert config.federation.pre_aggregators == parse(text).federation.pre_aggregators
