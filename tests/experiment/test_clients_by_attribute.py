"""Runs whose clients each hold the records of one value of an attribute."""

import pytest

import perdure.federated  # noqa: F401 - first, because it knows which warnings to let pass
from perdure.errors import ConfigError
from perdure.experiment import parse, run

CONFIG = """
name = "wards"
[data]
name = "helpers.own_data:blobs"
experiences = 2
[model]
name = "mlp"
hidden = [4]
[training]
optimizer = "SGD"
learning_rate = 0.1
epochs = 2
batch_size = 8
[federation]
clients = 2
rounds = 1
split = "by_attribute"
attribute = "domain"
[[arms]]
strategy = "naive"
"""
PRIVATE = (
    CONFIG
    + """private = true
[privacy]
noise_multiplier = 1.0
delta = 1e-2
"""
)


def run_of(text, folder):
    return run(parse(text), text, folder)


def test_a_run_has_a_client_for_each_value(tmp_path):
    result = run_of(CONFIG, tmp_path / "run")
    told = result["federation"]
    assert (told["split"], told["attribute"]) == ("by_attribute", "domain")
    assert told["declared_sizes"] == [[12, 12], [12, 12]]
    assert result["arms"][0]["average_accuracy"] is not None
    one = CONFIG.replace('"domain"', '"domain"\nvalues = [1]').replace("clients = 2", "clients = 1")
    assert run_of(one, tmp_path / "one")["federation"]["declared_sizes"] == [[12, 12]]


def test_a_private_run_by_attribute_needs_public_sizes(tmp_path):
    with pytest.raises(ConfigError, match=r"federation.client_sizes = None .*public sizes for ev"):
        run_of(PRIVATE, tmp_path / "refused")
    sizes = 'attribute = "domain"\nclient_sizes = [[10, 0], [12, 14]]'
    result = run_of(PRIVATE.replace('attribute = "domain"', sizes), tmp_path / "run")
    assert result["federation"]["declared_sizes"] == [[10, 0], [12, 14]]
    ledger = (tmp_path / "run" / "ledger.jsonl").read_text()
    assert "client-0/experience-0" in ledger and "client-1/experience-1" in ledger
    assert "client-0/experience-1" not in ledger, "no record of a declared gap was used"
    assert result["arms"][0]["epsilon"]["unit"] == "record"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("clients = 2", "clients = 3", r"federation.clients = 3 .*domain, which are 0, 1;"),
        ('"domain"', '"ward"', r"no attribute 'ward'; its attributes: time, domain"),
        ('attribute = "domain"', "", r"federation.attribute = None .* an attribute of the records"),
        ('"by_attribute"', '"iid"', r'attribute = .domain. .* split = "by_attribute"'),
        ('"domain"', '"domain"\nvalues = [0]', r"federation.values = \(0,\) .* each of the 2 cl"),
    ],
)
def test_a_wrong_split_by_attribute_is_refused(tmp_path, old, new, words):
    with pytest.raises(ConfigError, match=words):
        run_of(CONFIG.replace(old, new), tmp_path / "run")
    assert not list(tmp_path.glob("run/arms/*/*.safetensors"))
