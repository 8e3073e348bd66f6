"""Strategies of perdure as plugins of Avalanche: equal training, and refusals."""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from helpers.avalanche_harness import SameBatches, accuracies, adam, assert_close, learnt
from helpers.strategy_examples import example, model_of
from perdure import strategies
from perdure.avalanche.benchmarks import from_avalanche
from perdure.avalanche.plugin import as_plugin
from perdure.contract.plan import MemoryPlan, Plan, PrivacyCost
from perdure.contract.strategy import Strategy
from perdure.errors import ConfigError, PrivacyError
from perdure.learner.learner import Learner
from perdure.strategies.ewc import EWC
from perdure.strategies.gdumb import GDumb
from perdure.strategies.joint import Joint
from perdure.strategies.lwf import LwF
from perdure.strategies.naive import Naive
from perdure.strategies.replay import Replay
from perdure.tasks import SingleLabel

pytestmark = [pytest.mark.reference, pytest.mark.slow]


def shown(results):
    """Return the accuracy in percent per experience."""
    return [
        100 * value for name, value in sorted(results.items()) if name.startswith("Top1_Acc_Exp")
    ]


def taught(plugin, benchmark, toy_model, template, **options):
    """Train with Avalanche on the same new rows."""
    stream = from_avalanche(benchmark)
    model = toy_model(stream)
    teacher = template(
        model, SameBatches(stream, toy_model(stream)), plugin, evaluator=accuracies(), **options
    )
    rows = []
    for experience in benchmark.train_stream:
        teacher.train(experience)
        rows.append(shown(teacher.eval(benchmark.test_stream)))
    return model, rows


# ---------------------------------------------------------------- strategies as plugins


def pools(strategy):
    """True if the strategy draws batches from more than the current experience."""
    facts = {"index": 0, "task": SingleLabel(), "classes": (0, 1)}
    plan = strategy.plan(SimpleNamespace(test=SimpleNamespace(inputs=torch.zeros(0, 5)), **facts))
    return plan.pool != "experience" or (plan.memory is not None and plan.memory.use == "pooled")


def comparable():
    """List pairs of a strategy and a scenario in which the missing class mask of Avalanche's
    criterion changes nothing.
    """
    # what it makes up goes by the record, which Avalanche does not name
    by_id = ["generative_replay"]
    names = [name for name in strategies.names() if not pools(example(name)) and name not in by_id]
    # it needs tasks, or classes of their own
    everywhere = [name for name in names if name != "packnet"]
    return [(name, "domain") for name in everywhere] + [
        (name, "class") for name in names if example(name).uses("losses")
    ]


@pytest.mark.parametrize(("name", "scenario"), comparable())
def test_a_plugin_trains_the_same_parameters_as_the_learner(
    name, scenario, benchmark, toy_model, template
):
    strategy = example(name)
    made = benchmark(scenario)
    make = partial(model_of, name, otherwise=toy_model)
    learner, matrix = learnt(strategy, made, make)
    plugin = as_plugin(strategy)
    model, rows = taught(plugin, made, make, template)
    assert_close(
        dict(model.named_parameters()), dict(learner.model.named_parameters()), atol=2e-5, rtol=1e-4
    )
    assert_close(dict(plugin.state), dict(learner.state), atol=2e-4, rtol=2e-3)
    assert rows == [pytest.approx(row, abs=1e-4) for row in matrix.tolist()]


def test_the_rows_of_a_plugin_step_have_distinct_ids(benchmark, toy_model, template):
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Listening(Strategy):
        def losses(self, forward, batch, context, state):
            seen.append(batch.ids.tolist())
            return super().losses(forward, batch, context, state)

    taught(as_plugin(Listening()), benchmark("domain"), toy_model, template)
    assert seen and all(len(set(ids)) == len(ids) > 1 for ids in seen)


@dataclass(frozen=True, kw_only=True)
class Referred(Strategy):
    """A strategy that adds a reference gradient over the latest rows and trains only the head."""

    privacy_cost = PrivacyCost(references=1, reuses_past_records=True)

    def plan(self, experience):
        memory = MemoryPlan(
            capacity=7, selection="reservoir", update="step", use="reference", batch_size=5
        )
        return Plan(memory=memory, trainable=("head",))

    def references(self, curator, params, state):
        losses = partial(self.losses, context=curator.context, state=state)
        return (curator.reference(losses, params),) if curator.context.experience else ()

    def project(self, gradient, references, state):
        return {n: g + sum(reference[n] for reference in references) for n, g in gradient.items()}


def test_a_plugin_supports_reference_gradients_and_step_memory(benchmark, toy_model, template):
    made = benchmark("domain")
    learner, matrix = learnt(Referred(), made, toy_model)
    model, rows = taught(as_plugin(Referred()), made, toy_model, template)
    assert_close(
        dict(model.named_parameters()), dict(learner.model.named_parameters()), atol=1e-5, rtol=1e-4
    )
    fresh = dict(toy_model(from_avalanche(made)).named_parameters())
    moved = {
        name for name, value in model.named_parameters() if not torch.equal(value, fresh[name])
    }
    assert moved == {"head.weight", "head.bias"}
    assert rows == [pytest.approx(row) for row in matrix.tolist()]


@pytest.mark.parametrize("name", [name for name in strategies.names() if pools(example(name))])
def test_a_plugin_replaces_the_experience_data_by_the_pool(name, benchmark, toy_model, template):
    """Every batch contains all rows, so their order does not matter."""
    strategy = example(name)
    made = benchmark("class" if strategy.uses("losses") else "domain")
    stream = from_avalanche(made)
    seen = []
    learner = Learner(
        model=model_of(name, stream, toy_model),
        strategy=strategy,
        optimizer=adam,
        iterations=3,
        batch_size=100,
        callbacks=[
            lambda point, learner: (
                seen.append(rows_in(learner)) if point == "step.gradient" else None
            )
        ],
    )
    matrix = learner.fit(stream)
    model = model_of(name, stream, toy_model)
    plugin = as_plugin(strategy)
    given = []
    whole = {"train_mb_size": 100, "train_epochs": 3, "evaluator": accuracies()}
    teacher = template(
        model, plugin, Watch(after_forward=lambda t: given.append(len(t.mb_y))), **whole
    )
    rows = []
    for experience in made.train_stream:
        teacher.train(experience)
        rows.append(shown(teacher.eval(made.test_stream)))
    assert given == seen and given[-1] != 24
    assert_close(
        dict(model.named_parameters()), dict(learner.model.named_parameters()), atol=2e-5, rtol=1e-4
    )
    assert_close(dict(plugin.state), dict(learner.state), atol=2e-4, rtol=2e-3)
    assert rows == [pytest.approx(row, abs=1e-4) for row in matrix.tolist()]


def rows_in(learner):
    return learner.curator.diagnostics.rows


class Watch:
    """A plugin made of functions of the Avalanche strategy."""

    def __init__(self, **hooks):
        for name, hook in hooks.items():
            setattr(self, name, lambda template, hook=hook, **_: hook(template))


def test_pooled_rows_keep_their_task_label_in_task_streams(benchmark, toy_model, template):
    made = benchmark("task")
    plugin = as_plugin(Joint())
    met = Counter()
    teacher = template(toy_model(from_avalanche(made)), plugin)
    teacher.plugins.append(
        Watch(
            after_forward=lambda t: met.update(
                (int(y) // 2, int(k)) for y, k in zip(t.mb_y, t.mb_task_id, strict=True)
            )
        )
    )
    teacher.plugins.append(
        Watch(
            after_backward=lambda t: met.update(
                set((plugin.batch.tasks == plugin.batch.labels // 2).tolist())
            )
        )
    )
    teacher.train(made.train_stream)
    assert set(met) == {(0, 0), (1, 1), True}


@dataclass(frozen=True, kw_only=True)
class Counted(Strategy):
    """A strategy that only counts records, and predicts the class with that number."""

    privacy_cost = PrivacyCost(releases=1)

    def init(self, spec):
        return super().init(spec).declare("met", torch.zeros(()), "sum")

    def plan(self, experience):
        return Plan(train=False)

    def after_experience(self, curator, params, state):
        count = curator.release(
            lambda forward, batch: torch.ones(len(batch)), clip_norm=1.0, purpose="count"
        )
        return state.replace({"met": state["met"] + count["value"]})

    def predict(self, forward, x, context, state):
        return (
            torch.nn.functional.one_hot((state["met"] // 24).long() - 1, 4)
            .expand(len(x), 4)
            .float()
        )


def test_a_plugin_without_gradients_only_releases_and_predicts(benchmark, toy_model, template):
    made = benchmark("class")
    plugin = as_plugin(Counted())
    model = toy_model(from_avalanche(made))
    before = {name: value.clone() for name, value in model.named_parameters()}
    teacher = template(model, plugin, evaluator=accuracies())
    assert len(shown(teacher.eval(made.test_stream))) == 2, (
        "Avalanche may evaluate before the first experience"
    )
    teacher.train(made.train_stream)
    assert plugin.state["met"] == 48
    assert_close(dict(model.named_parameters()), before, atol=0, rtol=0)
    assert shown(teacher.eval(made.test_stream)) == [50.0, 0.0], (
        "class 1 is half of the first experience"
    )


def test_a_plugin_refuses_predictions_that_are_not_finite(benchmark, toy_model, template):
    made = benchmark("class")
    model = toy_model(from_avalanche(made))
    teacher = template(model, as_plugin(Naive()))
    teacher.train(made.train_stream[0])
    with torch.no_grad():
        list(model.parameters())[-1].fill_(float("nan"))
    with pytest.raises(ConfigError, match="NaN or infinite"):
        teacher.eval(made.test_stream)


def test_a_plugin_predicts_only_classes_of_the_given_task(benchmark, toy_model, template):
    made = benchmark("task")
    outputs = []
    teacher = template(
        toy_model(from_avalanche(made)),
        as_plugin(Naive()),
        Watch(after_eval_iteration=lambda t: outputs.append(t.mb_output)),
    )
    teacher.train(made.train_stream[0])
    teacher.eval(made.test_stream)
    assert [((rows > -1e8).any(0)).tolist() for rows in outputs] == [
        [True] * 2 + [False] * 2,
        [False] * 2 + [True] * 2,
    ]


def test_a_plugin_keeps_the_criterion_and_adds_the_penalty(benchmark, toy_model, template):
    made = benchmark("class")
    losses = []
    strategy = EWC(strength=50.0)
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    plugin = as_plugin(strategy)
    teacher = template(toy_model(from_avalanche(made)), plugin, criterion=smooth)
    teacher.plugins.append(
        Watch(
            before_backward=lambda t: losses.append(
                [
                    v.item()
                    for v in (
                        t.loss,
                        t.criterion(),
                        strategy.penalty(plugin.session.params, plugin.state),
                    )
                ]
            )
        )
    )
    teacher.train(made.train_stream)
    assert all(total == pytest.approx(loss + penalty) for total, loss, penalty in losses)
    assert any(penalty > 0 for *_, penalty in losses)


def test_a_plugin_adds_stored_rows_to_the_batch(
    avalanche, benchmark, toy_data, toy_model, template
):
    from avalanche.benchmarks.scenarios.supervised import class_incremental_benchmark
    from avalanche.benchmarks.utils import as_classification_dataset

    parts = {}
    for name, records in (("train", toy_data.train), ("test", toy_data.test)):
        parts[name] = TensorDataset(records.inputs, records.labels)
        parts[name].targets = records.labels.tolist()
        parts[name] = as_classification_dataset(parts[name])
    newer = class_incremental_benchmark(parts, num_experiences=2, class_order=[0, 1, 2, 3])
    for made in (benchmark("class"), newer):
        sizes = []
        plugin = as_plugin(Replay(memory_size=6, batch_size=4), benchmark=made)
        teacher = template(toy_model(from_avalanche(made)), plugin)
        teacher.plugins.append(
            Watch(
                after_forward=lambda t, sizes=sizes: sizes.append(
                    (len(t.mb_y), len(t.mb_output), len(t.mbatch))
                )
            )
        )
        teacher.train(made.streams["train"])
        entries = sizes[0][2]
        assert sizes == [(10, 10, entries)] * 2 + [(4, 4, entries)] + [
            (14, 14, entries),
            (12, 12, entries),
            (8, 8, entries),
        ]
        assert plugin.session.curator.stored == 6


def test_a_plugin_keeps_the_model_in_training_mode(benchmark, toy_model, template):
    modes = []
    teacher = template(
        toy_model(from_avalanche(benchmark("class"))),
        as_plugin(LwF()),
        Watch(before_forward=lambda t: modes.append(t.model.training)),
    )
    teacher.train(benchmark("class").train_stream)
    assert set(modes) == {True}


# ---------------------------------------------------------------- what a plugin refuses


@pytest.mark.parametrize(
    ("strategy", "criterion", "allowed"),
    [
        (LwF(), nn.CrossEntropyLoss(), True),
        (LwF(), nn.CrossEntropyLoss(label_smoothing=0.1), False),
        (LwF(), nn.CrossEntropyLoss(weight=torch.ones(4)), False),
        (LwF(), nn.CrossEntropyLoss(reduction="sum"), False),
        (LwF(), nn.MultiMarginLoss(), False),
        (Naive(), nn.MultiMarginLoss(), True),
    ],
)
def test_a_plugin_refuses_a_criterion_that_it_would_ignore(
    strategy, criterion, allowed, benchmark, toy_model, template
):
    made = benchmark("class")
    teacher = template(toy_model(from_avalanche(made)), as_plugin(strategy), criterion=criterion)
    if allowed:
        teacher.train(made.train_stream[0])
        return
    with pytest.raises(ConfigError, match="LwF has its own loss"):
        teacher.train(made.train_stream[0])


def test_a_plugin_trains_each_experience_once_and_in_order(benchmark, toy_model, template):
    made = benchmark("class")
    teacher = template(toy_model(from_avalanche(made)), as_plugin(Naive()))
    with pytest.raises(ConfigError, match="experience = 1 is not allowed; allowed: 0"):
        teacher.train(made.train_stream[1])
    with pytest.raises(ConfigError, match="not trained on any experience yet"):
        _ = as_plugin(Naive()).state


def test_a_plugin_refuses_models_with_a_growing_or_narrow_head(avalanche, benchmark, template):
    from avalanche.models import DynamicModule, IncrementalClassifier

    class Growing(DynamicModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 4)

        def adaptation(self, experience):
            self.more = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return self.layer(x)

    made = benchmark("class")
    with pytest.raises(ConfigError, match="outputs of the model = 2"):
        template(nn.Linear(5, 2), as_plugin(Naive())).train(made.train_stream[0])
    narrow = nn.Sequential(nn.Linear(5, 3), IncrementalClassifier(3, initial_out_features=1))
    with pytest.raises(ConfigError, match="outputs of the model = 1"):
        template(narrow, as_plugin(Naive())).train(made.train_stream[0])
    with pytest.raises(ConfigError, match="no growing head"):
        template(Growing(), as_plugin(Naive())).train(made.train_stream[0])


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_a_plugin_refuses_a_model_that_needs_task_labels(avalanche, benchmark, template, scenario):
    from avalanche.models import MTSimpleMLP, MultiHeadClassifier

    made = benchmark(scenario)
    inside = nn.Sequential(nn.Linear(5, 3), MultiHeadClassifier(3, 4))
    for model, name in ((MTSimpleMLP(input_size=5), "MTSimpleMLP"), (inside, "MultiHead")):
        with pytest.raises(ConfigError, match=f"model = 'one with {name}.*one head"):
            template(model, as_plugin(Naive())).train(made.train_stream[0])


@pytest.mark.parametrize("strategy", [Joint(), GDumb(memory_size=8)], ids=repr)
def test_a_plugin_with_a_pool_refuses_a_second_memory_plugin(
    avalanche, benchmark, toy_model, template, strategy
):
    from avalanche.training.plugins import ReplayPlugin

    made = benchmark("class")
    for other, name in (
        (ReplayPlugin(mem_size=8), "ReplayPlugin"),
        (as_plugin(Replay(memory_size=8)), "Replay"),
    ):
        teacher = template(toy_model(from_avalanche(made)), as_plugin(strategy), other)
        with pytest.raises(
            ConfigError, match=f"{strategy.name} together with {name}.*remove one of them"
        ):
            teacher.train(made.train_stream[0])


def test_a_plugin_refuses_class_labels_that_start_at_0_per_task(
    avalanche, toy_data, toy_model, template
):
    from avalanche.benchmarks import nc_benchmark

    dataset = TensorDataset(toy_data.train.inputs, toy_data.train.labels)
    dataset.targets = toy_data.train.labels.tolist()
    made = nc_benchmark(dataset, dataset, 2, task_labels=True, class_ids_from_zero_in_each_exp=True)
    with pytest.raises(ConfigError, match="of each task start at 0"):
        template(nn.Linear(5, 4), as_plugin(Naive())).train(made.train_stream[0])


def test_a_plugin_refuses_a_model_wrapped_by_opacus(benchmark, toy_model, template):
    from opacus import GradSampleModule

    made = benchmark("class")
    teacher = template(GradSampleModule(toy_model(from_avalanche(made))), as_plugin(Naive()))
    with pytest.raises(PrivacyError, match="no differential privacy"):
        teacher.train(made.train_stream[0])
