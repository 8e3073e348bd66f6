"""Fingerprints of folders: the settings of a run may not change in its folder."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR

from helpers.learners import SIMULATED, change_facts
from perdure.adversarial import FGSM
from perdure.data.scenarios import split
from perdure.errors import ConfigError, RunError
from perdure.learner.fingerprint import differences
from perdure.models.classifiers import mlp
from perdure.strategies import EWC, Combine, LwF, Naive, Replay


class Stop(Exception):  # noqa: N818
    """An exception in place of a power failure."""


def stopping(point, learner):
    if point == "experience.begin" and learner.position.experience == 1:
        raise Stop


@pytest.fixture
def stopped(learner_of, toy_stream, tmp_path):
    """Return a function from settings to a folder whose run stopped after its first experience."""

    def make(strategy=None, stream=None, **settings):
        learner = learner_of(strategy, folder=tmp_path, callbacks=[stopping], **settings)
        with pytest.raises(Stop):
            learner.fit(stream or toy_stream())
        return tmp_path

    return make


def model(stream, **changes):
    options = {"hidden": (6,), "seed": 3, "activation": "tanh"} | changes
    return mlp(input_shape=stream.input_shape, num_classes=stream.num_classes, **options)


def stepwise(optimizer, steps):
    return StepLR(optimizer, step_size=1)


CHANGES = {
    "learning rate": (
        {"optimizer": partial(torch.optim.Adam, lr=0.5)},
        r"optimizer.lr \(given 0.5, stored 0.02\)",
    ),
    "optimiser": ({"optimizer": partial(torch.optim.SGD, lr=0.02)}, r"optimizer \(given SGD"),
    "betas": (
        {"optimizer": partial(torch.optim.Adam, lr=0.02, betas=(0.5, 0.9))},
        r"optimizer.betas \(given \[0.5, 0.9\]",
    ),
    "scheduler": (
        {"scheduler": stepwise},
        r"scheduler \(given \[\"stepwise\"\], stored null\)",
    ),
    "seed": ({"seed": 6}, r"seed \(given 6, stored 5\)"),
    "steps": ({"iterations": 5}, r"iterations \(given 5, stored 4\)"),
    "epochs": ({"iterations": None, "epochs": 1}, r"epochs \(given 1, stored null\)"),
    "batch size": ({"batch_size": 4}, r"batch_size \(given 4, stored 8\)"),
    "micro-batches": ({"micro_batch_size": 4}, "micro_batch_size"),
    "precision": ({"precision": "bfloat16"}, r"precision \(given bfloat16, stored float32\)"),
    "blocks": ({"blocks": 2}, r"blocks \(given 2, stored 1\)"),
    "adversary": ({"adversary": FGSM(epsilon=0.1)}, r"adversary \(given FGSM, stored null\)"),
    "fresh optimisers": ({"reset_optimizer": True}, r"reset_optimizer \(given true"),
    "owner": ({"owner": "other"}, r"owner \(given other, stored curator\)"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_error_names_a_changed_setting_with_both_values(learner_of, toy_stream, stopped, name):
    changes, told = CHANGES[name]
    folder = stopped()
    with pytest.raises(RunError, match=f"has a run that differs in .*{told}.*another folder"):
        learner_of(folder=folder, **changes).fit(toy_stream())


@pytest.mark.parametrize(
    ("first", "then", "told"),
    [
        (EWC(strength=1.0), EWC(strength=2.0), r"strategy.strength \(given 2.0, stored 1.0\)"),
        (EWC(strength=1.0), LwF(), r"strategy \(given LwF, stored EWC\)"),
        (Replay(memory_size=12), Replay(memory_size=14), r"strategy.memory_size \(given 14"),
        (
            Combine(EWC(strength=1.0), LwF()),
            Combine(EWC(strength=3.0), LwF()),
            r"strategy.*strength \(given 3.0, stored 1.0\)",
        ),
    ],
)
def test_the_error_names_the_changed_field_of_a_strategy(
    learner_of, toy_stream, stopped, first, then, told
):
    folder = stopped(first)
    with pytest.raises(RunError, match=told):
        learner_of(then, folder=folder).fit(toy_stream())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 4}, "differs in model.start "),
        ({"hidden": (7,)}, "model.shapes"),
        ({"activation": "relu"}, "differs in model.modules "),
    ],
)
def test_a_checkpoint_folder_refuses_another_model(learner_of, toy_stream, stopped, changes, told):
    folder = stopped()
    stream = toy_stream()
    with pytest.raises(RunError, match=told):
        learner_of(folder=folder, model=model(stream, **changes)).fit(stream)


def reordered(stream):
    """Return the same experiences with their classes in reverse order."""
    first, second = stream.experiences
    moved = (replace(second, index=0, stage=0), replace(first, index=1, stage=1))
    return replace(stream, experiences=moved)


def with_ids(stream, first):
    """Return the same records under other ids."""
    experience = stream[0]
    train = replace(experience.train, ids=experience.train.ids + first)
    changed = replace(experience, train=train)
    return replace(stream, experiences=(changed, *stream.experiences[1:]))


@pytest.mark.parametrize("privacy", [None, SIMULATED], ids=["plain", "private"])
@pytest.mark.parametrize(
    "change", [reordered, partial(with_ids, first=10**6)], ids=["class order", "ids"]
)
def test_a_checkpoint_folder_refuses_other_data(learner_of, toy_stream, stopped, change, privacy):
    folder = stopped(privacy=privacy)
    stream = change(toy_stream())
    with pytest.raises(RunError, match=r"differs in stream.experiences\[0\] \(given partition"):
        learner_of(folder=folder, privacy=privacy).fit(stream)


def test_a_checkpoint_folder_refuses_another_scenario(learner_of, toy_stream, stopped):
    folder = stopped()
    with pytest.raises(RunError, match=r"stream.scenario \(given task, stored class\)"):
        learner_of(folder=folder).fit(toy_stream("task"))


def test_the_digest_of_private_records_depends_on_the_key(learner_of, toy_stream, tmp_path):
    seen = []
    for privacy in (None, SIMULATED, replace(SIMULATED, seed=1)):
        learner = learner_of(privacy=privacy, folder=tmp_path / str(len(seen)))
        learner.prepare(toy_stream())
        seen.append(learner.fingerprint["stream.experiences"][0])
    assert len(set(seen)) == 3


def test_a_run_can_continue_with_more_experiences(learner_of, toy_data, tmp_path):
    four = split(toy_data, scenario="class", experiences=4)
    two = replace(four, experiences=four.experiences[:2])
    learner_of(folder=tmp_path, callbacks=[lambda point, learner: None]).fit(two)
    matrix = learner_of(folder=tmp_path).fit(four)
    assert matrix.shape == (4, 4)
    with pytest.raises(RunError, match=r"stream.experiences \(number\) \(given 2, stored 4\)"):
        learner_of(folder=tmp_path).fit(two)


def test_a_finished_run_refuses_other_settings(learner_of, toy_stream, tmp_path):
    learner_of(Replay(memory_size=12), folder=tmp_path).fit(toy_stream())
    with pytest.raises(RunError, match=r"strategy.memory_size \(given 20, stored 12\)"):
        learner_of(Replay(memory_size=20), folder=tmp_path).fit(toy_stream())


@pytest.mark.parametrize("late", [0.1, 0.2])
def test_a_checkpoint_folder_refuses_other_scheduled_rates(learner_of, toy_stream, tmp_path, late):
    """Two schedule functions have the same name, but give other learning rates."""

    def scheduler(rate):
        factor = {"late": rate}  # a closure over a mapping

        def late_change(optimizer, steps):
            return LambdaLR(optimizer, lambda s: factor["late"] if s > 99 else 1.0)

        return late_change

    for rate in (0.1, late):
        learner = learner_of(folder=tmp_path, scheduler=scheduler(rate))
        if rate == 0.1:
            learner.fit(toy_stream())
        else:
            with pytest.raises(RunError, match=r"scheduler.learning rates"):
                learner.fit(toy_stream())


def test_a_checkpoint_of_another_perdure_version_is_refused(learner_of, toy_stream, tmp_path):
    learner = learner_of(folder=tmp_path)
    learner.fit(toy_stream())
    path = sorted((tmp_path / "checkpoint").glob("0*.json"))[-1]
    facts = json.loads(path.read_text().replace('"version": 1', '"version": 0'))
    change_facts(path, **facts)
    with pytest.raises(RunError, match="another version of perdure"):
        learner_of(folder=tmp_path).fit(toy_stream())


def test_a_run_accepts_a_strategy_field_without_description(learner_of, toy_stream, tmp_path):
    odd = EWC(strength=1.0)
    object.__setattr__(odd, "strength", torch.nn.Identity())
    learner = learner_of(LwF(), folder=tmp_path)
    learner.driven_by = {"odd": odd}
    learner.prepare(toy_stream())
    assert learner.fingerprint["odd.strength"] == "a Identity"


def test_setting_differences_name_the_given_and_stored_values():
    given = {"a": 1, "b": 2, "stream.experiences": ["x", "y"]}
    assert differences(given, {"a": 1, "b": 2, "stream.experiences": ["x"]}) == {}
    assert differences(given, {"a": 1, "c": 3, "stream.experiences": ["z"]}) == {
        "b": (2, "nothing"),
        "c": ("nothing", 3),
        "stream.experiences[0]": ("x", "z"),
    }
    assert differences({"strategy": "LwF", "strategy.t": 2.0}, {"strategy": "EWC"}) == {
        "strategy": ("LwF", "EWC")
    }


def test_a_folder_accepts_a_schedule_of_fixed_length(learner_of, toy_stream, tmp_path):
    """The description of a run asks for 256 learning rates, and the schedule has 20."""

    def once(optimizer, steps):
        return OneCycleLR(optimizer, 0.5, total_steps=20)

    settings = {"iterations": 6, "scheduler": once}
    stream = toy_stream()
    plain = learner_of(Naive(), **settings).fit(stream)
    in_folder = learner_of(Naive(), folder=tmp_path / "run", **settings)
    assert torch.equal(in_folder.fit(stream), plain)
    short = learner_of(Naive(), folder=tmp_path / "short", **settings | {"iterations": 22})
    with pytest.raises(ConfigError, match=r"OneCycleLR fails after a step: .* number of steps of"):
        short.fit(stream)
