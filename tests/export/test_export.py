"""Artifacts answer as the strategy's predictor does, and their cards say what they are."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from perdure import Learner, Privacy, strategies
from perdure.errors import ConfigError, ExportError, PrivacyError
from perdure.export import Distillation, export_learner, predictor_of, read_predictor
from perdure.export.pruning import prune
from perdure.models import mlp
from perdure.testing.fixtures import small_stream

EIGHT = ("icarl", "ncm", "slda", "ranpac", "cwr_star", "bic", "packnet", "ewc")
"""Strategies of the deep test: solved heads, class means, corrections, networks of tasks."""


def small_model(stream, hidden=8):
    return mlp(
        input_shape=stream.input_shape,
        num_classes=stream.num_classes,
        hidden=(hidden,),
        seed=0,
        activation="tanh",
    )


def fitted(name, scenario="class", model=None, **options):
    """A learner with a strategy's example, after three experiences."""
    stream = small_stream(scenario)
    strategy = strategies.find(name).example()
    learner = Learner(
        model=model or small_model(stream),
        strategy=strategy,
        optimizer=partial(torch.optim.SGD, lr=0.5),
        iterations=5,
        batch_size=6,
        **options,
    )
    learner.fit(stream)
    return learner


@pytest.fixture(scope="module")
def icarl():
    return fitted("icarl")


@pytest.fixture(scope="module")
def by_task():
    return fitted("naive", "task")


@pytest.fixture(scope="module")
def private():
    return fitted("ewc", privacy=Privacy(noise_multiplier=1.0, clip_norm=1.0, seed=0))


def asked(learner):
    """Test inputs of all experiences, their tasks, and the predictor's outputs."""
    stream = learner.stream
    inputs = torch.cat([each.test.inputs for each in stream])
    tasks = torch.cat([torch.full((len(each.test),), each.index) for each in stream])
    with torch.no_grad():
        outputs = [learner.predictor(e.index, after=len(stream) - 1)(e.test.inputs) for e in stream]
    return inputs, tasks, torch.cat(outputs)


def run_onnx(path, *given):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    named = zip(("inputs", "task"), given, strict=False)
    (outputs,) = session.run(["outputs"], {name: value.numpy() for name, value in named})
    return torch.from_numpy(outputs)


def run_program(path, *given):
    return torch.export.load(path).module()(*given)


def assert_same(found, expected):
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def assert_holds_no_record(content, stream):
    """No row of the stream, and no path of this machine."""
    assert b"perdure/export" not in content and b"sample_inputs/model.pt" in content
    for each in stream:
        for row in torch.cat([each.train.inputs, each.test.inputs]):
            assert row.numpy().tobytes() not in content


def test_an_onnx_graph_gives_the_predictions_of_icarl(icarl, tmp_path):
    done = export_learner(icarl, tmp_path, to="onnx")
    inputs, _, expected = asked(icarl)
    assert_same(run_onnx(done.files[0], inputs), expected)
    assert_same(run_onnx(done.files[0], inputs[:1]), expected[:1])
    with torch.no_grad():
        assert not torch.allclose(icarl.model(inputs), expected, atol=1e-3)
    assert done.card.check["largest_difference"] <= 1e-5


def test_a_torch_export_program_takes_the_task_of_every_record(by_task, tmp_path):
    done = export_learner(by_task, tmp_path, to="torch-export")
    inputs, tasks, expected = asked(by_task)
    assert_same(run_program(done.files[0], inputs, tasks), expected)
    turned = run_program(done.files[0], inputs, (tasks + 1) % 3)
    assert not (turned.argmax(1) == expected.argmax(1)).any()
    assert_holds_no_record(done.files[0].read_bytes(), by_task.stream)


def test_exported_weights_load_into_the_module_without_a_learner(icarl, tmp_path):
    done = export_learner(icarl, tmp_path, to="safetensors")
    fresh = small_model(icarl.stream)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    inputs, _, expected = asked(icarl)
    with torch.no_grad():
        assert torch.equal(fresh(inputs), icarl.model(inputs))
        again = read_predictor(tmp_path, model=fresh, strategy=icarl.strategy)
        assert_same(again(inputs), expected)
    metrics = done.card.metrics
    assert metrics["artifact_by_experience"] == tuple(icarl.evaluate(icarl.stream))
    assert metrics["bare_module_by_experience"] != metrics["artifact_by_experience"]


def test_loading_exported_weights_refuses_another_module(icarl, tmp_path):
    export_learner(icarl, tmp_path, to="safetensors")
    other = small_model(icarl.stream, hidden=3)
    with pytest.raises(
        ConfigError, match=r"the class and sizes of the exported model .*size mismatch"
    ):
        read_predictor(tmp_path, model=other, strategy=icarl.strategy)
    with pytest.raises(ExportError, match="cannot be read"):
        read_predictor(tmp_path / "none", model=other, strategy=icarl.strategy)


def test_the_model_card_of_a_private_model_has_its_statement(private, tmp_path):
    statement = private.private_sum.ledger.statement(private.privacy.delta)
    export_learner(private, tmp_path, to="safetensors")
    card = json.loads((tmp_path / "model_card.json").read_text())
    stated = card["privacy"]
    assert stated["text"] == str(statement) and stated["epsilon"] == statement.epsilon
    assert (stated["delta"], stated["unit"], stated["relation"]) == (1e-5, "record", "add-remove")
    assert str(statement)[1:] in (tmp_path / "model_card.md").read_text()


def test_the_model_card_of_a_plain_model_states_no_privacy(icarl, tmp_path):
    export_learner(icarl, tmp_path, to="safetensors")
    card = json.loads((tmp_path / "model_card.json").read_text())
    assert card["privacy"]["text"].startswith("no privacy") and not card["privacy"]["private"]
    assert card["strategy"]["settings"]["memory_size"] == icarl.strategy.memory_size
    assert card["data"]["declared_sizes"] == [12, 12, 12] and card["command"]
    assert "No privacy: trained without" in (tmp_path / "model_card.md").read_text()


def test_export_refuses_a_private_model_without_its_ledger(private, tmp_path):
    other = Learner(
        model=private.model,
        strategy=private.strategy,
        optimizer=private.optimizer,
        iterations=1,
        warm_start=True,
    )
    other.prepare(small_stream("class"))
    with pytest.raises(PrivacyError, match="does not hold its ledger; give its statement"):
        export_learner(other, tmp_path, to="safetensors")
    assert not list(tmp_path.iterdir())


def test_a_student_of_a_private_model_needs_public_inputs(private, tmp_path):
    settings = Distillation(student=small_model(private.stream, hidden=4), steps=3)
    with pytest.raises(PrivacyError, match="give public inputs"):
        export_learner(private, tmp_path, to="safetensors", distillation=settings)
    public = replace(settings, inputs=torch.rand(20, 4))
    done = export_learner(private, tmp_path, to="safetensors", distillation=public)
    assert [each.name for each in done.card.variants] == ["as trained", "distilled"]


def test_an_exported_student_imitates_its_model_and_is_pruned(icarl, tmp_path):
    student = small_model(icarl.stream, hidden=4)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    settings = Distillation(student=student, steps=100, learning_rate=0.1, temperature=0.1)
    done = export_learner(
        icarl, tmp_path, to="safetensors", distillation=settings, prune=0.25, title="Small one"
    )
    first, second, third = done.card.variants
    assert (second.name, third.name) == ("distilled", "pruned 25 %")
    assert second.size_bytes < first.size_bytes and second.score > 60
    assert second.zero_share == 0 and third.zero_share == 10 / 50
    assert all(torch.equal(student.state_dict()[name], value) for name, value in before.items())
    assert "| pruned 25 % |" in (tmp_path / "model_card.md").read_text()
    assert done.card.title == "Small one"


def test_pruning_removes_the_smallest_weights():
    model = nn.Linear(4, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.1, -3.0, 0.2, 1.0]]))
        model.bias.fill_(0.01)
    prune(model, 0.5)
    assert model.weight.tolist() == [[0.0, -3.0, 0.0, 1.0]] and model.bias.item() > 0
    with pytest.raises(ConfigError, match="prune = 1"):
        prune(model, 1.0)


class AlwaysDropout(nn.Module):
    """A model that never answers the same."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, x):
        return F.dropout(self.linear(x), 0.5, training=True)


class Branch(AlwaysDropout):
    """A model with a Python branch on a value."""

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else self.linear(-x)


def test_export_keeps_no_file_whose_outputs_differ(tmp_path):
    learner = fitted("naive", model=AlwaysDropout())
    with pytest.raises(
        ExportError, match=r"differ from the predictor's by [\d.]+; allowed: at most 1e-05"
    ):
        export_learner(learner, tmp_path, to="safetensors")
    assert not list(tmp_path.iterdir())


def test_export_refuses_a_model_that_cannot_be_traced(tmp_path):
    learner = fitted("naive", model=Branch())
    with pytest.raises(
        ExportError, match=r"cannot be written as torch-export .*; allowed: "
    ) as told:
        export_learner(learner, tmp_path, to="torch-export")
    assert "\n" not in str(told.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"to": "pickle"},
            "to = 'pickle' is not allowed; allowed: safetensors, torch-export, onnx",
        ),
        ({"to": "safetensors", "int8": True}, "int8 = True .* with to='torch-export' or to='onnx'"),
        ({"to": "safetensors", "prune": 1.5}, "prune = 1.5"),
    ],
)
def test_export_refuses_invalid_options(icarl, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        export_learner(icarl, tmp_path, **options)


def test_export_does_not_change_the_learner(icarl, tmp_path):
    before = {name: value.clone() for name, value in icarl.model.state_dict().items()}
    icarl.model.train()
    export_learner(icarl, tmp_path, to="safetensors", prune=0.5)
    assert all(torch.equal(icarl.model.state_dict()[name], value) for name, value in before.items())
    assert icarl.model.training and not predictor_of(icarl).model.training


def served(names, scenario):
    kinds = {"bic": ("class",), "icarl": ("class", "task"), "packnet": ("class", "task")}
    return [name for name in names if scenario in kinds.get(name, ("class", "task", "domain"))]


@pytest.mark.deep(reason="full replay: every scenario and format of eight strategies")
@pytest.mark.parametrize(
    ("name", "scenario"),
    [(name, kind) for kind in ("class", "task", "domain") for name in served(EIGHT, kind)],
)
def test_exports_of_eight_strategies_give_equal_predictions(name, scenario, tmp_path):
    learner = fitted(name, scenario)
    inputs, tasks, expected = asked(learner)
    given = (inputs, tasks) if scenario == "task" else (inputs,)
    program = export_learner(learner, tmp_path / "a", to="torch-export")
    assert_same(run_program(program.files[0], *given), expected)
    graph = export_learner(learner, tmp_path / "b", to="onnx")
    assert_same(run_onnx(graph.files[0], *given), expected)


@pytest.mark.deep(reason="full replay: int8 in both formats, with student and pruning")
@pytest.mark.parametrize("to", ["torch-export", "onnx"])
def test_int8_files_have_the_outputs_of_the_int8_model(icarl, tmp_path, to):
    stream = small_stream("class")
    learner = fitted("icarl", model=small_model(stream, hidden=600))
    student = small_model(stream, hidden=500)
    done = export_learner(
        learner,
        tmp_path,
        to=to,
        distillation=Distillation(student=student, steps=100),
        prune=0.2,
        int8=True,
    )
    _, distilled, pruned, int8 = done.card.variants
    assert [each.name for each in (distilled, pruned, int8)] == ["distilled", "pruned 20 %", "int8"]
    assert int8.zero_share is None and int8.largest_difference <= 1e-5
    assert pruned.compressed_bytes < distilled.compressed_bytes
