"""Strategies against Avalanche's versions, equal where the mathematics is the same.

Both get the same new rows (`SameBatches`). Most runs are domain-incremental, where perdure masks no
class.
"""

import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers.avalanche_harness import BATCH, SameBatches, adam, assert_close, learnt
from perdure.avalanche.benchmarks import from_avalanche
from perdure.contract.context import Context
from perdure.contract.forward import Forward
from perdure.contract.state import State
from perdure.data.records import Batch
from perdure.learner.learner import Learner
from perdure.strategies.agem import AGEM
from perdure.strategies.er_ace import ERACE
from perdure.strategies.ewc import EWC
from perdure.strategies.gem import GEM
from perdure.strategies.lwf import LwF
from perdure.strategies.mas import MAS
from perdure.strategies.naive import Naive
from perdure.strategies.replay import Replay
from perdure.strategies.si import SI
from perdure.tasks import SingleLabel

pytestmark = [pytest.mark.reference, pytest.mark.slow]
WHOLE = 24  # records of an experience


@pytest.fixture
def trained(toy_model, template):
    """Train a strategy of Avalanche on the rows that a learner draws."""

    def make(made, *plugins, experiences=2, **options):
        stream = from_avalanche(made)
        model = toy_model(stream)
        teacher = template(model, SameBatches(stream, toy_model(stream)), *plugins, **options)
        for experience in made.train_stream[:experiences]:
            teacher.train(experience)
        return model, teacher

    return make


def assert_same_model(model, learner, far=None):
    """Assert equal parameters up to rounding, or parameters that differ by more than `far`."""
    ours = dict(learner.model.named_parameters())
    theirs = dict(model.named_parameters())
    if far is None:
        assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    else:
        assert (
            max(float((ours[name] - value).detach().abs().max()) for name, value in theirs.items())
            > far
        )


def flat(tensors):
    return torch.cat([value.detach().flatten() for value in tensors])


def as_context(experience, allowed=4, scenario="domain", memory_share=0.0):
    """Return the public facts of a stream with two experiences of two classes each."""
    table = torch.tensor([[True, True, False, False], [False, False, True, True]])[:, :allowed]
    return Context(
        scenario=scenario,
        experience=experience,
        task_classes=table,
        seen=table[: experience + 1].any(0),
        memory_share=memory_share,
    )


def as_batch(inputs, labels, from_memory=None):
    blank = torch.zeros_like(labels)
    role = blank.bool() if from_memory is None else from_memory
    return Batch(
        inputs=inputs,
        labels=labels,
        ids=blank,
        tasks=blank,
        from_memory=role,
        valid=torch.ones_like(role),
    )


def loss_of(strategy, logits, batch, context):
    """Return the mean loss of the given logits."""
    return strategy.losses(
        Forward(nn.Identity()),
        Batch.from_tensors(batch.tensors() | {"inputs": logits}),
        context,
        State(),
    ).mean()


# ---------------------------------------------------------------- Naive


def test_naive_trains_the_same_parameters_as_avalanche(avalanche, benchmark, toy_model, trained):
    made = benchmark("domain")
    learner, _ = learnt(Naive(), made, toy_model)
    model, _ = trained(made, kind=avalanche.training.Naive)
    ours = dict(learner.model.named_parameters())
    theirs = dict(model.named_parameters())
    assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_naive_differs_from_avalanche_only_by_the_class_mask(
    avalanche, benchmark, toy_model, trained
):
    """Avalanche's criterion lowers the logits of classes that did not occur yet; with a mask the
    results are equal.
    """
    made = benchmark("class")
    learner, _ = learnt(Naive(), made, toy_model)
    model, _ = trained(made, kind=avalanche.training.Naive)
    assert_same_model(model, learner, far=0.01)

    class Masked(nn.CrossEntropyLoss):
        """Cross entropy over the classes seen so far; the first experience has the classes 0
        and 1.
        """

        def forward(self, output, labels):
            self.seen = max(getattr(self, "seen", 2), 2 + 2 * int(labels.max() > 1))
            return super().forward(output[:, : self.seen], labels)

    model, _ = trained(made, kind=avalanche.training.Naive, criterion=Masked())
    assert_same_model(model, learner)


# ---------------------------------------------------------------- Replay


class Seen:
    """Keep every mini-batch and its loss."""

    def __init__(self):
        self.steps = []

    def before_backward(self, strategy, **_):
        self.steps.append(
            (
                strategy.mb_x,
                strategy.mb_y,
                strategy.mb_output.detach(),
                strategy.loss.detach().clone(),
            )
        )


def test_replay_has_the_loss_and_stored_counts_of_avalanche(
    avalanche, benchmark, toy_model, template
):
    made = benchmark("domain")
    seen = Seen()
    from avalanche.training.plugins import ReplayPlugin

    replay = ReplayPlugin(mem_size=9, batch_size_mem=5)
    # Avalanche's, about itself
    with pytest.warns(DeprecationWarning, match="deprecated function update"):
        template(toy_model(from_avalanche(made)), replay, seen).train(made.train_stream)
    ours = Replay(memory_size=9, batch_size=5, weighting="equal")
    first = from_avalanche(made)[0].train.inputs
    for inputs, labels, logits, theirs in seen.steps[3:]:
        role = (inputs[:, None] == first).all(2).any(1)
        assert 0 < role.sum() < len(role)
        batch = as_batch(inputs, labels, role)
        context = as_context(1, memory_share=float(role.float().mean()))
        assert loss_of(ours, logits, batch, context).item() == pytest.approx(
            theirs.item(), rel=1e-5
        )
        weighted = loss_of(Replay(memory_size=9), logits, batch, context)
        each = nn.functional.cross_entropy(logits, labels, reduction="none")
        by_hand = 0.5 * each[~role].mean() + 0.5 * each[role].mean()
        assert weighted.item() == pytest.approx(by_hand.item(), rel=1e-5), (
            "the default weighs experiences"
        )
    learner, _ = learnt(ours, made, toy_model)
    kept = learner.session.held.snapshot()[0]["memory.tasks"].bincount().tolist()
    theirs = [len(buffer.buffer) for buffer in replay.storage_policy.buffer_groups.values()]
    assert kept == pytest.approx(theirs, abs=1), (
        "what does not divide by two goes to the one or the other"
    )


def test_er_ace_loss_equals_avalanche_if_all_classes_occur(avalanche):
    """perdure masks by declared classes and Avalanche by classes that occur, so a missing class
    makes a difference.
    """
    from avalanche.training.regularization import ACECriterion

    place = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=place)
    stored = torch.randn(9, 4, generator=place)
    role = torch.arange(15) >= 6
    for labels, same in ((torch.tensor([2, 3] * 3), True), (torch.tensor([2] * 6), False)):
        old = torch.arange(9) % 4
        theirs = ACECriterion()(logits, labels, stored, old)
        batch = as_batch(torch.zeros(15, 4), torch.cat([labels, old]), role)
        context = as_context(1, scenario="class", memory_share=9 / 15)
        ours = loss_of(ERACE(memory_size=9), torch.cat([logits, stored]), batch, context) / 2
        assert (ours.item() == pytest.approx(theirs.item(), rel=1e-5)) is same


# ---------------------------------------------------------------- LwF


def test_lwf_trains_the_same_parameters_as_avalanche(avalanche, benchmark, toy_model, trained):
    """Avalanche uses the Kullback-Leibler divergence and perdure the cross entropy; both have the
    same gradient.
    """
    from avalanche.training.plugins import LwFPlugin

    # one head: Avalanche distils over the classes of the first task, and so do we
    made = benchmark("task")
    learner, _ = learnt(LwF(strength=3.0, temperature=1.5), made, toy_model)
    plugin = LwFPlugin(alpha=3.0, temperature=1.5)

    class ByTask(nn.CrossEntropyLoss):
        """Cross entropy over the classes of the task."""

        def forward(self, output, labels):
            first = 2 * int(labels.max() > 1)
            return super().forward(output[:, first : first + 2], labels - first)

    model, _ = trained(made, plugin, criterion=ByTask())
    assert_same_model(model, learner)
    weaker, _ = trained(made, LwFPlugin(alpha=1.0, temperature=1.5), criterion=ByTask())
    assert_same_model(weaker, learner, far=0.003)


def test_lwf_differs_from_avalanche_in_class_incremental_runs(avalanche):
    """perdure distils over all classes seen so far, Avalanche over the old classes."""
    from avalanche.training.regularization import LearningWithoutForgetting

    place = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=place)
    teacher = torch.randn(5, 4, generator=place)
    regularizer = LearningWithoutForgetting(alpha=1.0, temperature=2.0)
    regularizer.prev_model = lambda inputs: teacher
    regularizer.prev_classes_by_task = {0: {0, 1}}
    theirs = regularizer(torch.rand(5, 3), logits, None)
    known = torch.tensor([True, True, False, False])
    seen = torch.ones(4, dtype=torch.bool)
    q = torch.softmax(teacher[:, :2] / 2, dim=1)
    entropy = -(q * q.log()).sum(1)
    distilled = partial(
        SingleLabel().distillation,
        logits,
        teacher,
        torch.zeros(5, dtype=torch.int64),
        known=known,
        temperature=2.0,
    )
    over_old = distilled(allowed=known) - entropy
    over_seen = distilled(allowed=seen) - entropy
    assert over_old.mean().item() == pytest.approx(theirs.item(), rel=1e-4)
    assert over_seen.mean() > theirs + 0.1


# ---------------------------------------------------------------- EWC, MAS, SI


@pytest.mark.parametrize(("mode", "options"), [("separate", {}), ("online", {"decay_factor": 0.5})])
def test_ewc_equals_avalanche_when_fisher_is_per_record(
    mode, options, avalanche, benchmark, toy_model, trained
):
    """Avalanche squares the gradient of the batch mean, which is the Fisher information only for
    batches of one.
    """
    from avalanche.training.plugins import EWCPlugin

    made = benchmark("domain")
    ours = EWC(strength=50.0, mode=mode, fisher="empirical", decay=options.get("decay_factor", 1.0))
    learner, _ = learnt(ours, made, toy_model)
    ones, whole = (
        EWCPlugin(25.0, mode=mode, keep_importance_data=True, **options) for _ in range(2)
    )
    model, _ = trained(made, ones, train_mb_size=1)
    assert_same_model(model, learner)
    trained(made, whole, train_mb_size=WHOLE)
    first = learner.state.group("fisher")
    last = ones.importances[1]
    if mode == "separate":
        last = {name: value.data + last[name].data for name, value in ones.importances[0].items()}
    torch.testing.assert_close(
        flat(first.values()),
        flat(getattr(v, "data", v) for v in last.values()),
        atol=1e-6,
        rtol=1e-3,
    )
    theirs = flat(value.data for value in whole.importances[0].values())
    assert theirs.sum() < 0.5 * flat(value.data for value in ones.importances[0].values()).sum(), (
        "as they do it"
    )


def test_mas_importance_equals_avalanche_with_batches_of_one(
    avalanche, benchmark, toy_model, trained
):
    """Avalanche takes the absolute mean gradient of a batch and averages over experiences; perdure
    adds up.
    """
    from avalanche.training.plugins import MASPlugin

    made = benchmark("domain")
    learner, _ = learnt(MAS(strength=0.1), made, toy_model)
    plugin = MASPlugin(lambda_reg=0.1, alpha=0.5)
    model, _ = trained(made, plugin, experiences=1, train_mb_size=1)
    first = Learner(
        model=toy_model(from_avalanche(made)),
        strategy=MAS(strength=0.1),
        optimizer=adam,
        epochs=2,
        batch_size=BATCH,
    )
    first.prepare(from_avalanche(made))
    first.begin(0)
    first.train(range(first.training.steps(0)))
    first.finish()
    ours = flat(first.state.group("importance").values())
    torch.testing.assert_close(
        ours, flat(value.data for value in plugin.importance.values()), atol=1e-5, rtol=1e-3
    )
    model, _ = trained(made, MASPlugin(lambda_reg=0.1, alpha=0.5), train_mb_size=1)
    assert_same_model(model, learner)


def test_si_importance_equals_avalanche_after_one_experience(
    avalanche, benchmark, toy_model, trained, monkeypatch
):
    """Avalanche clamps importance at 0.001, halves its weight, and later counts the gradient of the
    penalty; perdure does not. On the CPU, Avalanche 0.6 keeps a view of the parameters instead
    of a copy, so they never seem to change.

    On the CPU Avalanche 0.6 keeps a view of the parameters in place of a copy, so that they never
    seem to move.
    """
    from avalanche.training.plugins import SynapticIntelligencePlugin

    made = benchmark("domain")
    still, plugin = (SynapticIntelligencePlugin(si_lambda=2.0, eps=0.1) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it hands tensors to numpy
        trained(made, still, experiences=1)
        assert not any(value.data.any() for value in still.syn_data["trajectory"].values())
        monkeypatch.setattr(
            SynapticIntelligencePlugin, "extract_weights", staticmethod(copies_of_weights)
        )
        trained(made, plugin, experiences=1)
    learner = Learner(
        model=toy_model(from_avalanche(made)),
        strategy=SI(strength=1.0),
        optimizer=adam,
        epochs=2,
        batch_size=BATCH,
    )
    learner.prepare(from_avalanche(made))
    learner.begin(0)
    learner.train(range(learner.training.steps(0)))
    path = flat(learner.state.group("path").values())
    torch.testing.assert_close(
        -path, flat(v.data for v in plugin.syn_data["trajectory"].values()), atol=1e-6, rtol=1e-3
    )
    learner.finish()
    ours = flat(learner.state.group("importance").values())
    uncut = flat(value.data for value in plugin.syn_data["cum_trajectory"].values())
    torch.testing.assert_close(ours, -uncut, atol=1e-5, rtol=1e-3)
    theirs = flat(value.data for value in plugin.ewc_data[1].values())
    torch.testing.assert_close(ours.clamp(max=0.001), theirs, atol=1e-5, rtol=1e-3)
    assert (ours > 0.001).any()


def copies_of_weights(model, target, excluded_parameters):
    for name, param in model.named_parameters():
        target[name].data = param.detach().clone().flatten()


# ---------------------------------------------------------------- A-GEM, GEM


def gradients(shape, seed, count):
    place = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=place) for _ in range(count)]


def projected(plugin, current):
    """Return the gradient after Avalanche's plugin projected it."""
    model = nn.Linear(3, 2, bias=False)
    model.weight.grad = current.clone()
    plugin.after_backward(
        SimpleNamespace(model=model, device="cpu", clock=SimpleNamespace(train_exp_counter=1))
    )
    return model.weight.grad


def test_agem_projects_gradients_as_avalanche_does(avalanche):
    from avalanche.training.plugins import AGEMPlugin

    changed = 0
    for seed in range(8):
        current, reference = gradients((2, 3), seed, 2)
        plugin = AGEMPlugin(1, 1)
        plugin.buffers = [None]
        plugin.reference_gradients = reference.flatten()
        ours = AGEM(memory_size=1).project({"weight": current}, ({"weight": reference},), State())[
            "weight"
        ]
        torch.testing.assert_close(ours, projected(plugin, current))
        changed += not torch.equal(ours, current)
    assert 0 < changed < 8


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_gem_projects_gradients_as_avalanche_does(avalanche, margin):
    changed = 0
    for seed in range(8):
        current, *references = gradients((2, 3), seed, 4)
        plugin = gem_on_unit_references(margin)
        plugin.G = torch.stack([reference.flatten() for reference in references])
        given = tuple({"weight": reference} for reference in references)
        ours = GEM(memory_size=1, margin=margin).project({"weight": current}, given, State())[
            "weight"
        ]
        torch.testing.assert_close(ours, projected(plugin, current), atol=1e-5, rtol=1e-4)
        changed += not torch.equal(ours, current)
    assert changed > 0


def gem_on_unit_references(margin):
    """Return Avalanche's plugin with its program for references of length 1. Its ridge is then as
    large, relative to the references, as that of perdure; the constraints are the same.

    Its ridge is then as large, relative to them, as ours; the constraints are the same.
    """
    from avalanche.training.plugins import GEMPlugin

    class OnUnitReferences(GEMPlugin):
        def solve_quadprog(self, g):
            references, strength = self.G, self.memory_strength
            lengths = references.norm(dim=1)
            self.G = references / lengths[:, None]
            self.memory_strength = strength * lengths.double().cpu().numpy()
            try:
                return super().solve_quadprog(g)
            finally:
                self.G, self.memory_strength = references, strength

    return OnUnitReferences(WHOLE, margin)


@pytest.mark.parametrize("kind", ["AGEM", "GEM"])
def test_agem_and_gem_runs_equal_avalanche_with_full_memory(
    kind, avalanche, benchmark, toy_model, trained
):
    """The reference gradient then does not depend on a choice of records."""
    from avalanche.training.plugins import AGEMPlugin

    made = benchmark("domain")
    ours = {"AGEM": AGEM, "GEM": GEM}[kind](memory_size=2 * WHOLE, batch_size=WHOLE)
    learner, _ = learnt(ours, made, toy_model)
    plugin = {"AGEM": AGEMPlugin(WHOLE, WHOLE), "GEM": gem_on_unit_references(0.5)}[kind]
    model, _ = trained(made, plugin)
    assert_same_model(model, learner)
    naive, _ = trained(made)
    assert_same_model(naive, learner, far=1e-4)
