from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from perdure.contract.context import Context, contexts
from perdure.contract.forward import Forward
from perdure.contract.plan import MemoryPlan
from perdure.contract.state import State
from perdure.data.records import Batch
from perdure.errors import ConfigError, PrivacyError, StrategyError
from perdure.learner.learner import Learner
from perdure.models.classifier import Classifier
from perdure.privacy.settings import Privacy
from perdure.strategies import MIR, Replay

NEW = 6
OLD = 9
SHARE = OLD / (NEW + OLD)


@pytest.fixture
def mixed(toy_stream):
    """Return a stream and a batch of new rows of the second experience and stored rows of the
    first.
    """

    def make(scenario="class"):
        stream = toy_stream(scenario)
        new = Batch.current(stream[1].train, 1).take(slice(NEW))
        old = Batch.current(stream[0].train, 0).take(slice(OLD))
        tensors = {
            name: torch.cat([value, old.tensors()[name]]) for name, value in new.tensors().items()
        }
        batch = Batch.from_tensors(tensors | {"from_memory": torch.arange(NEW + OLD) >= NEW})
        return batch, contexts(stream, "cpu")(1, memory_share=SHARE), stream

    return make


CLASSES = {
    "class": ((0, 1, 2, 3), (0, 1, 2, 3)),
    "task": ((2, 3), (0, 1)),
    "domain": ((0, 1), (0, 1)),
}


def entropies(model, params, batch, scenario):
    """Return the cross entropy of each row over its own classes, by hand."""
    found = []
    for x, y, stored in zip(
        batch.inputs, batch.labels.tolist(), batch.from_memory.tolist(), strict=True
    ):
        classes = list(CLASSES[scenario][stored])
        logits = torch.func.functional_call(model, params, (x[None],))[0, classes]
        found.append(-torch.log_softmax(logits, 0)[classes.index(y)])
    return torch.stack(found)


def by_hand(model, batch, scenario, rate, wanted):
    """Return the loss of the paper, and the chosen stored rows, best first."""
    params = dict(model.named_parameters())
    now = entropies(model, params, batch, scenario)
    slope = torch.autograd.grad(now[:NEW].mean(), list(params.values()), retain_graph=True)
    virtual = {
        name: value - rate * g for (name, value), g in zip(params.items(), slope, strict=True)
    }
    rise = (entropies(model, virtual, batch, scenario) - now)[NEW:].tolist()
    chosen = sorted(range(OLD), key=lambda i: -rise[i])[:wanted]
    return now[:NEW].mean() + now[NEW:][chosen].mean(), chosen


@pytest.mark.reference
@pytest.mark.parametrize("scenario", CLASSES)
@pytest.mark.parametrize(("batch_size", "wanted"), [(None, NEW), (2, 2), (OLD, OLD), (50, OLD)])
def test_mir_rehearses_stored_rows_whose_loss_rises_most(
    mixed, toy_model, scenario, batch_size, wanted
):
    batch, at, stream = mixed(scenario)
    model = toy_model(stream)
    strategy = MIR(memory_size=50, batch_size=batch_size, rate=0.7)
    expected, chosen = by_hand(model, batch, scenario, 0.7, wanted)
    mine = strategy.losses(Forward(model), batch, at, State())
    torch.testing.assert_close(mine.mean(), expected)
    assert torch.nonzero(mine[NEW:]).flatten().tolist() == sorted(chosen)
    ours, theirs = (
        torch.autograd.grad(loss, list(model.parameters())) for loss in (mine.mean(), expected)
    )
    for a, b in zip(ours, theirs, strict=True):  # nothing flows through the choice
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_mir_refuses_as_many_candidates_as_rehearsed_rows(mixed, toy_model):
    batch, at, stream = mixed()
    message = f"MIR would rehearse {NEW} of {NEW} candidates, so there is no choice"
    with pytest.raises(StrategyError, match=message):
        MIR(memory_size=50, candidates=NEW, batch_size=None).losses(
            Forward(toy_model(stream)), batch, at, State()
        )


def test_the_virtual_step_of_mir_starts_at_given_parameters(mixed, toy_model):
    batch, at, stream = mixed()
    model = toy_model(stream)
    strategy = MIR(memory_size=50, batch_size=3)
    other = {name: -3 * value.detach() for name, value in model.named_parameters()}
    given = strategy.losses(Forward(model, other), batch, at, State())
    assert not torch.equal(given > 0, strategy.losses(Forward(model), batch, at, State()) > 0)
    model.load_state_dict(other)
    torch.testing.assert_close(strategy.losses(Forward(model), batch, at, State()), given)
    with torch.no_grad():
        torch.testing.assert_close(strategy.losses(Forward(model), batch, at, State()), given)


def test_mir_rehearses_the_class_confused_with_the_new_one():
    """Classes 0 and 1 are stored; the new class 2 looks almost like 1."""
    inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 0.9]])
    labels = torch.tensor([2] * 4 + [0, 1] * 5)
    n = len(labels)
    batch = Batch(
        inputs=inputs[labels],
        labels=labels,
        ids=torch.arange(n),
        tasks=(labels == 2).long(),
        from_memory=torch.arange(n) >= 4,
        valid=torch.ones(n, dtype=torch.bool),
    )
    table = torch.tensor([[True, True, False], [False, False, True]])
    at = Context(
        scenario="class", experience=1, task_classes=table, seen=table.any(0), memory_share=10 / 14
    )
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, -4.0], [-4.0, 4.0], [0.0, 0.0]]))
        model.bias.zero_()
    mine = MIR(memory_size=50, batch_size=5).losses(Forward(model), batch, at, State())
    assert set(labels[4:][mine[4:] > 0].tolist()) == {1}


def test_dropout_does_not_change_the_rows_that_mir_chooses(mixed):
    batch, at, _ = mixed()
    model = Classifier(nn.Sequential(nn.Linear(5, 30), nn.Tanh(), nn.Dropout(0.5)), 30, 4).train()
    losses = [
        MIR(memory_size=50, batch_size=4).losses(Forward(model), batch, at, State())
        for _ in range(5)
    ]
    assert not torch.equal(losses[0], losses[1])  # it does drop out in the loss
    assert all(torch.equal(each > 0, losses[0] > 0) for each in losses)
    assert all(part.training for part in model.modules())


def test_mir_changes_running_statistics_only_in_the_loss_pass(mixed):
    batch, at, _ = mixed()
    model = Classifier(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)), 8, 4).train()
    MIR(memory_size=50).losses(Forward(model), batch, at, State())
    assert int(model.body[1].num_batches_tracked) == 1


def test_mir_ignores_padded_rows(mixed, toy_model):
    batch, at, stream = mixed()
    model = toy_model(stream)
    strategy = MIR(memory_size=50, batch_size=3)
    spoilt = Batch.from_tensors(
        {name: torch.cat([v[:1], v, v[-1:]]) for name, v in batch.tensors().items()}
    )
    spoilt.valid[0] = spoilt.valid[-1] = False
    spoilt.inputs[0] = spoilt.inputs[-1] = 100.0
    mine, clean = (strategy.losses(Forward(model), rows, at, State()) for rows in (spoilt, batch))
    torch.testing.assert_close(mine[1:-1], clean)
    assert not mine[0] and not mine[-1]


def test_mir_chooses_the_first_of_rows_with_equal_scores(mixed, toy_model):
    batch, at, stream = mixed()
    inputs = batch.inputs.clone()
    labels = batch.labels.clone()
    inputs[NEW:] = inputs[NEW]
    labels[NEW:] = labels[NEW]
    alike = Batch.from_tensors(batch.tensors() | {"inputs": inputs, "labels": labels})
    mine = MIR(memory_size=50, batch_size=3).losses(Forward(toy_model(stream)), alike, at, State())
    assert torch.nonzero(mine[NEW:]).flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("last", [2, NEW + 2])
def test_a_mir_step_passes_each_row_only_as_often_as_needed(mixed, toy_model, last):
    """The passes are new rows for the virtual step, candidates before and after it, and chosen
    rows; the last pass has new rows too, if training mode could give them other losses.
    """
    batch, at, stream = mixed()
    model = toy_model(stream)
    if last == NEW + 2:
        model.body.append(nn.Dropout(0.5))
    passes = []
    model.head.register_forward_hook(
        lambda _, entered, left: passes.append((len(entered[0]), left.requires_grad))
    )
    MIR(memory_size=50, batch_size=2).losses(Forward(model), batch, at, State())
    assert passes == [(NEW, True), (OLD, False), (OLD, False), (last, True)]


def test_mir_uses_the_gradient_of_its_virtual_step_again(mixed, toy_model):
    batch, at, stream = mixed()
    batch = replace(batch, valid=torch.arange(NEW + OLD) != 2)
    gradients = []
    for more in ([], [nn.Dropout(0.0)]):
        model = toy_model(stream)
        model.body.extend(more)
        losses = MIR(memory_size=50, batch_size=3).losses(Forward(model), batch, at, State())
        ((losses * batch.valid).sum() / batch.valid.sum()).backward()
        gradients.append([value.grad for value in model.parameters()])
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(once, twice)
        assert bool(once.any())


def learner_of(strategy, model, **changes):
    options = {
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "epochs": 1,
        "batch_size": 4,
    } | changes
    return Learner(model=model, strategy=strategy, **options)


def test_mir_equals_replay_when_every_candidate_is_chosen(toy_stream, toy_model):
    """Replay weighs all rows equally, half of the sum of both means, so it equals MIR at twice the
    rate.
    """
    ends = []
    stream = toy_stream()
    replay = Replay(
        memory_size=12, selection="reservoir", weighting="equal", update="step", batch_size=4
    )
    chosen = (MIR(memory_size=12, candidates=candidates, batch_size=4) for candidates in (4, 12))
    for strategy, factor in ((next(chosen), 1), (replay, 2), (next(chosen), 1)):
        rates = iter([0.1] + [0.1 * factor] * 11)  # in the first step memory is empty

        def faster(point, learner, rates=rates):
            if point == "step.sampled":
                learner.current_optimizer.param_groups[0]["lr"] = next(rates)

        learner = learner_of(strategy, toy_model(stream), callbacks=[faster])
        learner.fit(stream)
        ends.append(torch.cat([value.flatten() for value in learner.model.state_dict().values()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ends[0], ends[2], rtol=1e-4, atol=1e-6)


def test_mir_refuses_batches_cut_into_micro_batches(toy_stream, toy_model):
    stream = toy_stream()
    for size in (2, 4, 6):
        with pytest.raises(StrategyError, match="micro_batch_size=None"):
            learner_of(MIR(memory_size=12), toy_model(stream), micro_batch_size=size).fit(stream)
    assert (
        learner_of(MIR(memory_size=12), toy_model(stream), micro_batch_size=16)
        .fit(stream)
        .isfinite()
        .all()
    )


def test_mir_is_refused_under_privacy(toy_stream, toy_model):
    stream = toy_stream()
    with pytest.raises(PrivacyError, match="MIR couples the records of a batch"):
        learner_of(
            MIR(memory_size=12), toy_model(stream), privacy=Privacy(noise_multiplier=1.0, seed=0)
        ).fit(stream)


def test_mir_plans_candidates_from_a_reservoir(toy_stream):
    first = toy_stream()[0]
    assert MIR(memory_size=9, candidates=7, batch_size=3).plan(first).memory == MemoryPlan(
        capacity=9, selection="reservoir", batch_size=7, update="step"
    )
    assert (
        MIR(memory_size="0.36 kB").plan(first).memory.capacity == 10
        and MIR.privacy_cost.reuses_past_records
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_size": 5, "rate": 0.0}, r"mir.rate = 0\.0"),
        ({"memory_size": 5, "candidates": 0}, "mir.candidates = 0"),
        ({"memory_size": 5, "candidates": 3, "batch_size": 4}, "mir.candidates = 3"),
        ({"memory_size": 5, "batch_size": 0}, "mir.batch_size = 0"),
        ({"memory_size": 0}, "memory_size = 0"),
    ],
)
def test_mir_refuses_invalid_options(toy_stream, options, message):
    with pytest.raises(ConfigError, match=message):
        MIR(**options).plan(toy_stream()[0])
