"""The command `perdure explain` on a finished run."""

import json

import pytest
import torch
from typer.testing import CliRunner

from perdure.cli.main import app
from perdure.experiment import parse, run

TEXT = """
name = "small"
[data]
name = "digits"
experiences = 2
[model]
hidden = [8]
[training]
iterations = 5
[[arms]]
strategy = "naive"
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(parse(TEXT), TEXT, folder)
    (folder / "config.toml").write_text(TEXT)
    return folder


def explained(*arguments):
    return CliRunner().invoke(app, ["explain", *map(str, arguments)])


@pytest.mark.parametrize("method", ["kernel_shap", "lime"])
def test_explain_writes_json_text_and_a_picture(finished, tmp_path, method):
    options = ("--cells", 4, "--samples", 60, "--records", 2, "--experience", 2)
    done = explained(finished, "--method", method, "--out", tmp_path, *options)
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "explanations.json").read_text())["records"]
    assert [len(row["values"]) for row in rows] == [16, 16]
    if method == "kernel_shap":
        for row in rows:
            assert row["base"] + sum(row["values"]) == pytest.approx(row["output"], abs=1e-4)
    text = (tmp_path / "explanations.txt").read_text()
    first = max(range(16), key=lambda place: abs(rows[0]["values"][place]))
    assert text.splitlines()[1].split()[1] == str(first)
    assert (tmp_path / "explanations.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("superpixels", ["slic", "watershed"])
def test_explain_by_superpixels_of_colour_adds_up(finished, tmp_path, superpixels):
    options = ("--superpixels", superpixels, "--cells", 2, "--records", 2, "--out", tmp_path)
    done = explained(finished, *options)
    assert done.exit_code == 0, done.output
    for row in json.loads((tmp_path / "explanations.json").read_text())["records"]:
        assert 1 <= len(row["values"]) <= 12
        assert row["base"] + sum(row["values"]) == pytest.approx(row["output"], abs=1e-4)


def test_explain_replaces_results_only_if_asked(finished, tmp_path):
    options = ("--cells", 2, "--records", 1, "--out", tmp_path)
    assert explained(finished, *options).exit_code == 0
    before = (tmp_path / "explanations.json").read_bytes()
    again = explained(finished, *options, "--experience", 2)
    assert again.exit_code != 0
    assert "--overwrite" in again.output + str(again.exception)
    assert (tmp_path / "explanations.json").read_bytes() == before
    assert explained(finished, *options, "--experience", 2, "--overwrite").exit_code == 0
    assert (tmp_path / "explanations.json").read_bytes() != before


@pytest.fixture(scope="module")
def finished_texts(tmp_path_factory):
    text = TEXT.replace('"digits"', '"helpers.own_data:moods"').replace(
        "hidden = [8]", 'name = "lstm"\nvocabulary = 9\nhidden = 4\nembedding = 4'
    )
    folder = tmp_path_factory.mktemp("texts")
    run(parse(text), text, folder)
    (folder / "config.toml").write_text(text)
    return folder


@pytest.mark.parametrize("method", ["kernel_shap", "lime"])
def test_explain_shows_tokens_and_leaves_kept_ones_out(finished_texts, tmp_path, method):
    options = ("--method", method, "--kept", 1, "--kept", 8, "--baseline", 0, "--records", 3)
    done = explained(finished_texts, *options, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "explanations.txt").read_text()
    assert ("fidelity" in text) == (method == "lime")
    for row in json.loads((tmp_path / "explanations.json").read_text())["records"]:
        assert row["inputs"][0] == 1
        moved = {token for token, value in zip(row["inputs"], row["values"], strict=True) if value}
        assert moved and not moved & {1, 8}
        assert f"token {row['inputs'][4]:6}" in text
    assert not (tmp_path / "explanations.png").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--baseline", 9), "fails on the background with the tokens 9"),
        (("--baseline", 0.5), "--baseline = 0.5"),
        (("--superpixels", "slic"), "images"),
        (("--method", "integrated_gradients"), "for token numbers use kernel_shap or lime"),
    ],
)
def test_explain_refuses_what_does_not_fit_texts(finished_texts, tmp_path, arguments, named):
    done = explained(finished_texts, *arguments, "--out", tmp_path)
    assert done.exit_code != 0
    assert named in done.output + str(done.exception)


def test_explain_by_gradients_writes_values_that_add_up(finished, tmp_path):
    done = explained(finished, "--method", "integrated_gradients", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "explanations.json").read_text())["records"]
    for row in rows:
        total = torch.tensor(row["values"]).sum().item()
        assert row["base"] + total == pytest.approx(row["output"], rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--method", "paper"), "--method"),
        (("--kept", 1), "--kept = (1,)"),
        (("--out", __file__), "a folder; a file has this name"),
        (("--method", "exact_shapley", "--samples", 5), "--samples"),
        (("--method", "grad_cam"), "a convolution"),
        (("--superpixels", "voronoi"), "--superpixels"),
        (("--superpixels", "slic", "--method", "integrated_gradients"), "--superpixels"),
        (("--method", "lime", "--layer", "0"), "--layer"),
        (("--experience", 3), "--experience"),
        (("--records", 0), "--records"),
        (("other",), "arm"),
    ],
)
def test_explain_refuses_what_does_not_fit_and_names_it(finished, arguments, named):
    done = explained(finished, *arguments)
    assert done.exit_code != 0
    assert named in done.output + str(done.exception)
