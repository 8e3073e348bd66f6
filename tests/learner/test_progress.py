"""The progress of a training: bars on a terminal, lines elsewhere, and silence."""

import io
import re

import pytest
from rich.console import Console

from helpers.learners import SIMULATED
from perdure.errors import ConfigError
from perdure.learner.progress import display
from perdure.privacy import Privacy

LINE = re.compile(
    r"training (25|50|75) %, (accuracy [\d.]+ %, )?"
    r"(experience [12]/2, step [1-4]/4, [\d.e+]+ steps/s|1/2 experiences)"
    r"(, loss [\d.e-]+)?, \d+ s left"
)


def test_a_bar_of_eighty_columns_has_room_for_the_accuracy():
    state = "accuracy 97.31 %, experience 2/5, step 40/200"
    written = io.StringIO()
    with display(Console(file=written, force_terminal=True, width=80)) as show:
        show("naive-plain", 0.3, state)
    assert "accuracy 97.31 %, experience 2/5" in written.getvalue()


def test_a_display_has_bars_on_a_terminal_and_lines_in_a_pipe():
    for terminal in (True, False):
        written = io.StringIO()
        with display(Console(file=written, force_terminal=terminal, width=120)) as show:
            for hundredth in (0, 10, 26, 27, 80, 100):
                show("naive-plain", hundredth / 100, f"step {hundredth}")
            show("ewc-plain", 1.0, "")
        if terminal:
            assert "━" in written.getvalue()
            assert "100%" in written.getvalue()
            assert "step 100" in written.getvalue()
        else:
            shown = re.sub(r"\d+ s left", "N s left", written.getvalue())
            assert shown.splitlines() == [
                "naive-plain 25 %, step 26, N s left",
                "naive-plain 75 %, step 80, N s left",
                "naive-plain 100 %, step 100",
                "ewc-plain 100 %",
            ]


def test_fit_prints_lines_without_a_terminal_if_asked(learner_of, toy_stream, capsys):
    learner = learner_of(show_progress=True)
    learner.fit(toy_stream())
    out, err = capsys.readouterr()
    *lines, last = err.splitlines()
    assert out == ""
    assert lines and all(map(LINE.fullmatch, lines)), err
    assert "loss" in lines[0] and "accuracy" in lines[-1]
    assert re.fullmatch(r"training 100 %, accuracy [\d.]+ %", last)
    assert learner.callbacks == []


@pytest.mark.parametrize("wanted", [None, False])
def test_fit_prints_nothing_without_a_terminal(learner_of, toy_stream, capsys, wanted):
    learner_of(show_progress=wanted).fit(toy_stream())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("diagnostics", "seen"), [("released", False), ("raw", True)], ids=["released", "raw"]
)
def test_progress_shows_no_training_loss_under_privacy(
    learner_of, toy_stream, capsys, diagnostics, seen
):
    privacy = Privacy(noise_multiplier=1.0, seed=0, diagnostics=diagnostics)
    learner_of(show_progress=True, privacy=privacy).fit(toy_stream())
    err = capsys.readouterr().err
    assert "training 100 %" in err and ("loss" in err) == seen


def test_progress_changes_no_bit_of_a_training(learner_of, toy_stream):
    shown, silent = (
        learner_of(show_progress=wanted, privacy=SIMULATED).fit(toy_stream())
        for wanted in (True, False)
    )
    assert shown.equal(silent)


def test_show_progress_of_another_type_is_refused(learner_of):
    with pytest.raises(ConfigError, match="show_progress = 'bar' is not allowed; allowed: True or"):
        learner_of(show_progress="bar")
