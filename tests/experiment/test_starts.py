"""Start from the parameters of an earlier run, and the privacy that these carry."""

import shutil

import pytest
import torch

from perdure.errors import ConfigError, PrivacyError, RunError
from perdure.experiment import load, parse, run, start_from
from perdure.models import mlp

EARLIER = """
name = "earlier"
[data]
name = "helpers.own_data:blobs"
experiences = 2
[model]
hidden = [4]
[training]
iterations = 2
[privacy]
noise_multiplier = 1.0
delta = 1e-3
seed = 0
[[arms]]
strategy = "naive"
[[arms]]
strategy = "naive"
private = true
"""
PLAIN = EARLIER.replace('\n[[arms]]\nstrategy = "naive"\nprivate = true', "")
PRIVATE = EARLIER.replace('[[arms]]\nstrategy = "naive"\n[[arms]]', "[[arms]]")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("starts") / "earlier"
    run(parse(EARLIER), EARLIER, folder)
    return folder


def started(text, earlier, folder, arm, **keys):
    """Run a config that starts from an arm of the earlier run."""
    told = "".join(f"{key} = {value}\n" for key, value in keys.items())
    text = f'{text}\n[start]\nrun = "{earlier}"\narm = "{arm}"\n{told}'
    return run(parse(text), text, folder)


def new_model(classes=4, hidden=4):
    return mlp(input_shape=(1, 2, 2), num_classes=classes, hidden=(hidden,), seed=9)


def test_a_model_starts_from_the_parameters_of_a_run(earlier):
    source = load(earlier, "naive-plain").model.state_dict()
    model = start_from(new_model(), earlier, "naive-plain")
    assert all(torch.equal(value, source[name]) for name, value in model.state_dict().items())
    kept = new_model(classes=7)
    model = start_from(new_model(classes=7), earlier, "naive-plain", new_head=True)
    assert torch.equal(model.head.weight, kept.head.weight)
    assert torch.equal(model.body[1].weight, source["body.1.weight"])


def test_other_shapes_are_refused_by_name(earlier):
    with pytest.raises(ConfigError, match=r"head\.weight .*\(7, 4\).*new_head = true keeps"):
        start_from(new_model(classes=7), earlier, "naive-plain")
    with pytest.raises(ConfigError, match=r"body\.1\.weight .*shape \(4, 4\).*allowed: \(5, 4\)"):
        start_from(new_model(hidden=5), earlier, "naive-plain", new_head=True)
    with pytest.raises(ConfigError, match="false for a model without a head"):
        start_from(torch.nn.Linear(2, 2), earlier, "naive-plain", new_head=True)


def test_a_run_that_starts_from_another_trains_its_head(earlier, tmp_path):
    text = PLAIN.replace("iterations = 2", 'iterations = 2\nfine_tune = "head"')
    started(text, earlier, tmp_path / "run", "naive-plain", new_head="true")
    learner = load(tmp_path / "run")
    source = load(earlier, "naive-plain").model
    assert torch.equal(learner.model.body[1].weight, source.body[1].weight)
    assert not torch.equal(learner.model.head.weight, source.head.weight)


def test_a_private_start_adds_its_epsilon(earlier, tmp_path):
    result = started(PRIVATE, earlier, tmp_path / "run", "naive-private")
    fresh = run(parse(PRIVATE), PRIVATE, tmp_path / "fresh")
    both, one = (each["arms"][0]["epsilon"]["value"] for each in (result, fresh))
    assert both > 1.2 * one
    purposes = [each["purpose"] for each in result["arms"][0]["spending"]]
    assert "spent before, by the model that was warm-started" in purposes


def test_a_private_arm_refuses_a_start_that_no_ledger_counts(earlier, tmp_path):
    with pytest.raises(PrivacyError, match=r"trained without privacy in .*earlier"):
        started(PRIVATE, earlier, tmp_path / "run", "naive-plain")
    with pytest.raises(PrivacyError, match="whose records are private in this run"):
        started(PRIVATE, earlier, tmp_path / "same", "naive-plain", public="true")
    with pytest.raises(ConfigError, match=r"false for naive-private of .*records are private"):
        start_from(new_model(), earlier, "naive-private", public=True)


def test_a_public_start_is_free_and_stated(earlier, tmp_path):
    text = PRIVATE.replace("own_data:blobs", "own_data:other_blobs")
    result = started(text, earlier, tmp_path / "run", "naive-plain", public="true")
    fresh = run(parse(PRIVATE), PRIVATE, tmp_path / "fresh")
    spent = [each["arms"][0]["epsilon"] for each in (result, fresh)]
    assert spent[0]["value"] == spent[1]["value"]
    assert "whose training records are declared public" in spent[0]["text"]


OTHER = PLAIN.replace("own_data:blobs", "own_data:other_blobs")


@pytest.mark.parametrize("arm", ["naive-plain", "naive-private"])
def test_a_public_start_covers_all_runs_before_it(earlier, tmp_path, arm):
    between = tmp_path / "between"
    started(OTHER, earlier, between, arm)
    refused = pytest.raises(ConfigError, match=r"public .*false for naive-private of .*earlier")
    if arm == "naive-plain":
        refused = pytest.raises(
            PrivacyError, match=r"records of .*earlier public, .*own_data:blobs"
        )
    else:
        with pytest.raises(ConfigError, match=r"false for naive-private of .*earlier"):
            start_from(new_model(), between, public=True)
    with refused:
        started(PRIVATE, between, tmp_path / "run", "naive-plain", public="true")


def test_a_private_run_keeps_the_public_start_before_it(earlier, tmp_path):
    between = tmp_path / "between"
    text = PRIVATE.replace("own_data:blobs", "own_data:other_blobs")
    started(text, earlier, between, "naive-plain", public="true")
    with pytest.raises(PrivacyError, match=r"records of .*earlier public, .*own_data:blobs"):
        started(PRIVATE, between, tmp_path / "run", "naive-private")


def test_a_start_without_its_earlier_run_is_refused(earlier, tmp_path):
    gone = tmp_path / "gone"
    shutil.copytree(earlier, gone)
    between = tmp_path / "between"
    started(OTHER, gone, between, "naive-plain")
    shutil.rmtree(gone)
    with pytest.raises(RunError, match=r"gone has no config\.toml, but .*between starts from it"):
        started(PRIVATE, between, tmp_path / "run", "naive-plain", public="true")
