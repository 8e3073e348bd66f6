"""The command line: help, output and refusals."""

import json
import re
import resource
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
import warnings
from importlib import resources

import pytest

from helpers.command_line import CONFIG, assert_refused, plain
from perdure.experiment.config import parse

with warnings.catch_warnings():
    # typer takes names from click that click is about to move
    warnings.filterwarnings("ignore", message="'click", category=DeprecationWarning)
    import typer

    from perdure.cli import main as cli

SEEDED = """
name = "small"
seed = 7
[data]
name = "helpers.own_data:blobs"
experiences = 2
[model]
hidden = [4]
[training]
optimizer = "SGD"
learning_rate = 0.1
iterations = 2
[[arms]]
strategy = "naive"
[[arms]]
name = "wild"
strategy = "ewc"
strength = 1e30
"""


# --------------------------------------------------------------------------- what it teaches


@pytest.mark.parametrize("words", [["--help"], []])
def test_help_prints_the_first_steps(command, words):
    _, out, err = command(*words)
    told = plain(out + err)
    for sentence in (
        "`perdure demo` runs the built-in experiment and writes runs/demo/report.html",
        "`perdure demo --show-config > mine.toml` gives you its config to change; `perdure run "
        "mine.toml` runs it",
        "To continue a stopped run, give the same command again.",
        "run Run the experiment that CONFIG describes; a stopped run continues.",
        "report Print the table of a finished run and write its report.html again.",
    ):
        assert sentence in told


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("run", "CONFIG is a TOML file; perdure demo --show-config prints an example, and "),
        ("run", "Folder of the run; default runs/NAME."),
        ("demo", "Print the demo's config and stop."),
        ("report", "RUN is the folder of the run, such as runs/demo."),
    ],
)
def test_help_of_a_command_names_its_arguments(command, name, told):
    code, out, _ = command(name, "--help")
    assert code == 0
    assert told in plain(out)


def test_show_config_prints_the_packaged_file_unchanged(command):
    code, out, err = command("demo", "--show-config")
    assert (code, err) == (0, "")
    assert out == resources.files("perdure.experiment").joinpath("demo.toml").read_text(
        encoding="utf-8"
    )
    assert tomllib.loads(out)["name"] == "demo"


# --------------------------------------------------------------------------- a run


def test_a_run_prints_plain_progress_and_a_result_table(command, tmp_path):
    (tmp_path / "mine.toml").write_text(CONFIG)
    code, out, err = command("run", "mine.toml")
    assert (code, err) == (0, "")
    assert re.search(
        r"^naive-plain 50 %, experience 1/2, step \d+/\d+, .* steps/s, loss .* s left$", out, re.M
    )
    assert "naive-plain 100 %\n" in out
    assert out.endswith("report: runs/small/report.html\n")
    assert "accuracy" in out
    assert "\x1b" not in out
    assert "\r" not in out
    for name in ("result.json", "report.html", "config.toml", "figures"):
        assert (tmp_path / "runs" / "small" / name).exists()

    first = (tmp_path / "runs" / "small" / "result.json").read_bytes()
    code, again, _ = command("run", "mine.toml")
    assert code == 0
    assert again.splitlines()[-7:] == out.splitlines()[-7:]
    assert (tmp_path / "runs" / "small" / "result.json").read_bytes() == first

    page = tmp_path / "runs" / "small" / "report.html"
    before = page.read_bytes()
    page.unlink()
    code, shown, err = command("report", "runs/small")
    assert (code, err) == (0, "")
    assert page.read_bytes() == before
    assert shown.splitlines()[-7:] == out.splitlines()[-7:]


def test_an_output_folder_is_refused_for_a_second_config(command, tmp_path):
    (tmp_path / "mine.toml").write_text(CONFIG)
    code, out, _ = command("run", "mine.toml", "--out", "here")
    assert code == 0
    assert out.endswith("report: here/report.html\n")
    assert not (tmp_path / "runs").exists()
    assert_refused(
        command("demo", "--out", "here"), "here has a run that differs in config", "--out"
    )


# --------------------------------------------------------------------------- what it refuses

WRONG = {
    "syntax": ("name = ", "mine.toml is not valid TOML ("),
    "field": (CONFIG + "colour = 3\n", "arms[0].colour = 3", "one of the fields"),
    "type": (CONFIG.replace("0.1", '"fast"'), "training.learning_rate = 'fast'", "a finite number"),
    "range": (CONFIG.replace("0.1", "nan"), "training.learning_rate = nan"),
    "option": (CONFIG.replace("0.1", "0.1\nmomentum = -1.0"), "training.momentum = -1.0"),
    "optimizer": (CONFIG.replace('"SGD"', '"Sgd"'), "training.optimizer = 'Sgd'", "Adam, "),
    "strategy": (CONFIG.replace("naive", "nave"), "arms[0].strategy = 'nave'", "naive"),
    "escape": (CONFIG.replace("small", "../small"), "name = '../small'"),
    "markup": (CONFIG.replace("small", "[red]"), "name = '[red]'"),
    "slices": (
        CONFIG.replace("experiences = 2", "experiences = 3"),
        "experiences = 3",
        "1, 2, 5, 10",
    ),
    "shape": (
        CONFIG.replace("[data]", '[data]\nname = "breast-cancer"').replace(
            "hidden = [4]", 'name = "cnn"'
        ),
        "(30,)",
    ),
    "guard": (
        CONFIG.replace("hidden = [4]", 'name = "cnn"\nwidth = 2\nnorm = "batch"')
        + "private = true\n[privacy]\nnoise_multiplier = 1.0\n",
        "BatchNorm2d",
        "GroupNorm",
    ),
    "budget": (CONFIG + "private = true\n[privacy]\nepsilon = 1e-6\ndelta = 1e-9\n", "epsilon"),
    "clients": (CONFIG + "[federation]\nclients = 1000\n", "min_size = 10", "1000 clients"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_invalid_config_gives_one_error_line_and_exit_code_2(command, tmp_path, name):
    text, *words = WRONG[name]
    (tmp_path / "mine.toml").write_text(text)
    assert_refused(command("run", "mine.toml"), *words)


def test_a_refused_config_writes_no_files(command, tmp_path):
    (tmp_path / "mine.toml").write_text(WRONG["field"][0])
    command("run", "mine.toml")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


def test_a_corrected_config_runs_in_the_folder_of_a_refused_one(command, tmp_path):
    (tmp_path / "mine.toml").write_text(WRONG["slices"][0])
    assert_refused(command("run", "mine.toml"))
    (tmp_path / "mine.toml").write_text(CONFIG)
    assert command("run", "mine.toml")[0] == 0


@pytest.mark.parametrize("path", ["no.toml", ".", "bad.toml", "bad.toml/x.toml"])
def test_an_unreadable_config_path_gives_one_error_line(command, tmp_path, path):
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    assert_refused(command("run", path), f"config {path} cannot be read")


def test_an_unwritable_output_folder_gives_one_error_line(command, tmp_path):
    (tmp_path / "mine.toml").write_text(CONFIG)
    assert_refused(
        command("run", "mine.toml", "--out", "mine.toml/run"), "mine.toml/run cannot be written"
    )


@pytest.fixture
def no_network(monkeypatch):
    """Set a proxy without a listener, so that downloads fail at once."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    # None makes urllib read the proxies again: those above, and afterwards those from before
    urllib.request.install_opener(None)
    yield
    urllib.request.install_opener(None)


@pytest.mark.parametrize("data", ["mnist", "cifar10", "adult"])
def test_missing_data_files_give_one_error_line(command, tmp_path, monkeypatch, no_network, data):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PERDURE_DATA", str(tmp_path / "empty"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.toml").write_text(CONFIG.replace("[data]", f'[data]\nname = "{data}"'))
    assert_refused(command("run", "mine.toml"), str(tmp_path / "empty"))


def test_report_refuses_an_unfinished_run(command, tmp_path):
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "result.json").write_text('{"schema": 1')
    for folder, words in (
        (".", "let the run finish first"),
        ("no", "cannot be read"),
        ("torn", "not valid JSON"),
    ):
        assert_refused(command("report", folder), words)


def test_an_unknown_command_is_refused_without_a_traceback(command):
    code, out, err = command("rnu")
    assert (code, out) == (2, "")
    assert "No such command 'rnu'" in err
    assert "Traceback" not in err


# --------------------------------------------------------------------------- options of a run


def test_run_with_seeds_stores_the_config_that_was_run(command, tmp_path):
    (tmp_path / "mine.toml").write_text(SEEDED)
    code, out, err = command("run", "mine.toml", "--seeds", "1,3", "--device", "cpu")
    assert (code, err) == (1, "")
    assert "wild-seed-1 diverged: " in plain(out) and "of 2 seeds" in plain(out)
    stored = parse((tmp_path / "runs" / "small" / "config.toml").read_text())
    assert (stored.seeds, stored.device, stored.arms) == ((1, 3), "cpu", parse(SEEDED).arms)
    assert command("run", "mine.toml", "--seeds", "1,3")[0] == 1


def test_the_run_command_refuses_invalid_options(command, tmp_path):
    (tmp_path / "mine.toml").write_text(SEEDED)
    answer = command("run", "mine.toml", "--seeds", "1,x")
    assert_refused(answer, "--seeds = '1,x'", "whole numbers with commas")
    answer = command("run", "mine.toml", "--engine", "ray")
    assert_refused(answer, "--engine = 'ray'", "[federation]")
    answer = command("run", "mine.toml", "--device", "gpu")
    assert_refused(answer, "mine.toml: device = 'gpu'", "such as cpu or cuda")


def test_config_command_checks_a_file_and_prints_the_reference(command, tmp_path):
    (tmp_path / "mine.toml").write_text(SEEDED.replace("seed = 7", "seeds = [1, 3]"))
    code, out, err = command("config", "mine.toml")
    names = ["naive-plain-seed-1", "wild-seed-1", "naive-plain-seed-3", "wild-seed-3"]
    assert (code, out.split(), err) == (0, names, "")
    code, out, err = command("config", "--reference", "--table", "federation")
    assert (code, err) == (0, "") and out.startswith("[federation]\n  clients: a whole number;")
    assert_refused(command("config"), "--reference")
    assert_refused(command("config", "--reference", "--table", "x"), "--table = 'x'", "training")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


# --------------------------------------------------------------------------- Ctrl-C


def heed_interrupts():
    """Restore the default action of Ctrl-C, which shells switch off for background jobs and their
    children.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupt_ends_with_one_line_and_exit_code_130(capsys):
    with pytest.raises(typer.Exit) as ended, cli.resumable():
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err == "perdure: stopped; give the same command again to continue\n"


@pytest.mark.deep(reason="chaos: interrupts a running process")
def test_ctrl_c_prints_how_to_continue_the_run(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        CONFIG.replace("epochs = 1", "epochs = 999") + "[federation]\nclients = 2\nrounds = 999\n"
    )
    words = [
        sys.executable,
        "-m",
        "perdure.cli.main",
        "run",
        str(path),
        "--out",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    try:
        while not (
            tmp_path / "run" / "arms" / "naive-plain" / "checkpoint" / "latest.json"
        ).exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert out == ""
    assert err == "perdure: stopped; give the same command again to continue\n"


# --------------------------------------------------------------------------- the list of strategies


def test_strategies_json_lists_every_strategy_with_its_costs(command):
    from perdure.strategies import names

    code, out, err = command("strategies", "--json")
    assert (code, err) == (0, "")
    listed = {row["name"]: row for row in json.loads(out)}
    assert tuple(listed) == names()
    assert all(row["summary"] and row["privacy"] and row["memory"] for row in listed.values())
    ewc, replay, naive, joint = (listed[name] for name in ("ewc", "replay", "naive", "joint"))
    assert ewc["paper"].startswith("Kirkpatrick et al., Overcoming catastrophic forgetting")
    assert ewc["paper"].endswith("PNAS 2017")
    assert ewc["privacy"] == "gradient; 1 release per experience"
    assert (ewc["memory"], ewc["state_multiple"]) == ("3 x parameters", 3.0)
    assert replay["privacy"] == "gradient; records of earlier experiences are used again"
    assert joint["privacy"] == replay["privacy"]
    assert (replay["memory"], replay["state_multiple"]) == ("memory_size records", 0.0)
    assert (naive["privacy"], naive["memory"], joint["memory"]) == (
        "gradient",
        "none",
        "all records",
    )
    assert (listed["der"]["memory"], naive["paper"]) == (
        "memory_size records with logits (classes)",
        "",
    )
    assert listed["agem"]["privacy"].startswith(
        "gradient; 1 reference gradient of stored records per step;"
    )
    assert listed["icarl"]["privacy"].startswith("gradient; 1 release over memory per experience;")
    assert listed["ncm"]["privacy"] == "no gradient; 1 release per experience"
    assert "features x features" in listed["slda"]["memory"]
    assert listed["ogd"]["memory"] == "100 x parameters, 100 x 100, 1 number"
    assert listed["mir"]["privacy"] == "refused: it couples records"
    assert "quadratic program" in listed["gem"]["not_vmappable_because"]
    assert ewc["not_vmappable_because"] is None


def test_strategies_prints_a_table_of_every_strategy(command):
    from perdure.strategies import names

    code, out, err = command("strategies")
    assert (code, err) == (0, "")
    rows = [line.split()[0] for line in out.splitlines() if line[:1].isalpha()]
    assert set(names()) <= set(rows)
    assert "3 x parameters" in out
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.deep(reason="chaos: a run of the command that stops, and goes on to its report")
def test_a_full_disk_gives_one_error_line_and_the_run_continues(command, tmp_path):
    (tmp_path / "mine.toml").write_text(CONFIG)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        code, _, err = command("run", "mine.toml")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and err.count("\n") == 1
    assert "cannot be written: File too large; nothing that was stored is lost" in err
    assert command("run", "mine.toml")[0] == 0
