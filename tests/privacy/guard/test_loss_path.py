"""The loss path of a row: roles, experiences, stored values, attacks and views."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module

from helpers.learners import SIMULATED
from perdure.adversarial import FGSM, PGD
from perdure.adversarial.base import Attack, input_gradient
from perdure.contract import Plan, State, Strategy
from perdure.data import Views, shift_and_flip, split
from perdure.errors import GuardError
from perdure.learner.loss_path import LossPath
from perdure.privacy.clipping.rules.registry import clipping_rules
from perdure.privacy.guard.independence import unlisted
from perdure.privacy.settings import Privacy
from perdure.strategies import AGEM, DER, Naive, Replay

ALONE = Privacy(noise_multiplier=1.0, seed=0, custom_forward="record-by-record")


def word(learner, stream):
    learner.prepare(stream)
    return learner.private_sum.independence


def refused(learner, stream, folder, message):
    """Assert that the learner is refused before anything is charged."""
    learner = replace(learner, folder=folder)
    with pytest.raises(GuardError, match=message):
        learner.prepare(stream)
    assert not (folder / "ledger.jsonl").exists()


# --------------------------------------------------------------------------- roles


def entropy(logits, batch):
    return F.cross_entropy(logits, batch.labels, reduction="none")


@dataclass(frozen=True, kw_only=True)
class NewToStored(Replay):
    """A loss that keeps predictions of new rows close to the mean of stored rows in the batch."""

    def losses(self, forward, batch, context, state):
        z = forward(batch.inputs)
        each = entropy(z, batch)
        if not batch.from_memory.any():
            return each
        apart = (z - z[batch.from_memory].mean(0)).square().sum(1)
        return each + torch.where(batch.from_memory, 0.0, apart)


@dataclass(frozen=True, kw_only=True)
class StoredToNew(Replay):
    """A loss that keeps stored rows close to the new rows."""

    def losses(self, forward, batch, context, state):
        z = forward(batch.inputs)
        each = entropy(z, batch)
        if batch.from_memory.all() or not batch.from_memory.any():
            return each
        apart = (z - z[~batch.from_memory].mean(0)).square().sum(1)
        return each + torch.where(batch.from_memory, apart, 0.0)


@dataclass(frozen=True, kw_only=True)
class Balanced(Replay):
    """A loss that weighs new and stored rows equally, for any number of each."""

    def losses(self, forward, batch, context, state):
        back = batch.from_memory.sum().clamp(min=1)
        new = (~batch.from_memory).sum().clamp(min=1)
        share = len(batch) / 2 / torch.where(batch.from_memory, back, new)
        return entropy(forward(batch.inputs), batch) * share


@dataclass(frozen=True, kw_only=True)
class AmongStored(Replay):
    """A loss that centres stored rows if all rows of a batch are stored."""

    def losses(self, forward, batch, context, state):
        z = forward(batch.inputs)
        return entropy(z - z.mean(0) if batch.from_memory.all() else z, batch)


@dataclass(frozen=True, kw_only=True)
class ByExperience(Strategy):
    """A loss that gives each experience in the batch equal weight."""

    def plan(self, experience):
        return Plan(pool="all")

    def losses(self, forward, batch, context, state):
        rows = (batch.tasks[:, None] == batch.tasks).sum(1)
        return entropy(forward(batch.inputs), batch) / torch.where(rows < len(rows), rows, 1)


@dataclass(frozen=True, kw_only=True)
class Scaled(DER):
    """A loss that divides distances to stored logits by the largest of the batch."""

    def losses(self, forward, batch, context, state):
        z = forward(batch.inputs)
        if "logits" not in batch.stored:
            return entropy(z, batch)
        largest = batch.stored["logits"].abs().max().clamp(min=1e-3)
        apart = (z - batch.stored["logits"]).square().sum(1) / largest
        return torch.where(batch.from_memory, apart, entropy(z, batch))


COUPLED = {
    "new rows follow stored ones": NewToStored(memory_size=8),
    "stored rows follow new ones": StoredToNew(memory_size=8),
    "roles are balanced": Balanced(memory_size=8),
    "stored rows alone are centred": AmongStored(memory_size=8),
    "experiences are balanced": ByExperience(),
    "stored values are scaled": Scaled(memory_size=8),
}


@pytest.mark.parametrize("kind", COUPLED)
def test_the_guard_refuses_losses_coupling_new_and_stored_rows(
    learner_of, toy_stream, tmp_path, kind
):
    strategy = COUPLED[kind]
    learner = learner_of(strategy, privacy=SIMULATED)
    refused(learner, toy_stream(), tmp_path, rf"{strategy.name}\.losses\(\).* couples rec")


@dataclass(frozen=True, kw_only=True)
class Noting(DER):
    """A user's strategy that records the batches it gets."""

    def losses(self, forward, batch, context, state):
        SHOWN.append((context.experience, batch))
        return super().losses(forward, batch, context, state)


SHOWN = []


def test_guard_batches_mix_new_and_stored_rows_as_in_training(learner_of, toy_stream):
    SHOWN.clear()
    assert word(learner_of(Noting(memory_size=8), privacy=SIMULATED), toy_stream()) == "tested"
    first = [batch for index, batch in SHOWN if index == 0]
    later = [batch for index, batch in SHOWN if index == 1]
    assert not any(batch.from_memory.any() or batch.stored for batch in first)
    shares = {float(batch.from_memory.float().mean()) for batch in later}
    assert {0.0, 1.0} < shares
    mixed = next(batch for batch in later if 0 < batch.from_memory.sum() < len(batch))
    assert mixed.tasks.tolist() == (~mixed.from_memory).long().tolist()
    beside = mixed.stored["logits"]
    assert bool((beside.any(1) == mixed.from_memory).all())
    # gradients are compared in mixed roles too: the loop has each of the three records alone
    assert {batch.from_memory.tolist()[0] for batch in later if len(batch) == 1} == {False, True}


@dataclass(frozen=True, kw_only=True)
class Taught(Strategy):
    """A strategy that centres its predictions once it has a teacher."""

    def init(self, spec):
        return State().declare("ready", torch.zeros(()), "local")

    def losses(self, forward, batch, context, state):
        z = forward(batch.inputs)
        return entropy(z - z.mean(0) if state["ready"] > 0 else z, batch)

    def after_experience(self, curator, params, state):
        return state.replace({"ready": torch.ones(())})


def test_the_guard_refuses_losses_coupled_by_a_later_state(learner_of, toy_stream, tmp_path):
    learner = learner_of(Taught(), privacy=SIMULATED, folder=tmp_path)
    learner.prepare(toy_stream())
    learner.begin(0)
    for block in learner.training.remaining_blocks(0, 0):
        learner.train(block)
    learner.finish()
    charged = len(learner.private_sum.ledger.entries)
    with pytest.raises(GuardError, match=r"Taught\.losses\(\) couples records"):
        learner.begin(1)
    assert len(learner.private_sum.ledger.entries) == charged


@dataclass(frozen=True, kw_only=True)
class Referring(AGEM):
    """A reference loss that weighs stored rows less, the more there are of an experience."""

    def references(self, curator, params, state):
        def losses(forward, batch):
            rows = (batch.tasks[:, None] == batch.tasks).sum(1)
            each = entropy(forward(batch.inputs), batch)
            return each / torch.where(rows < len(rows), rows, 1)

        return (curator.reference(losses, params),)


def test_the_guard_refuses_references_that_couple_experiences(learner_of, toy_data):
    stream = split(toy_data, scenario="class", experiences=4)
    learner = learner_of(Referring(memory_size=8), stream=stream, privacy=SIMULATED)
    with pytest.raises(GuardError, match="the losses of 'reference' couples records"):
        learner.fit(stream)


# --------------------------------------------------------------------------- attacks and views


@dataclass(frozen=True, kw_only=True)
class Universal(Attack):
    """An attack with one change for the whole batch (Shafahi et al. 2020)."""

    def perturb(self, losses, inputs, *, generator=None):
        shift = input_gradient(losses, inputs).mean(0, keepdim=True).sign()
        return (inputs + self.epsilon * shift).clamp(*self.bounds)


@dataclass(frozen=True, kw_only=True)
class OverLargest(Attack):
    """An attack that divides each row's step by the largest one."""

    def perturb(self, losses, inputs, *, generator=None):
        gradient = input_gradient(losses, inputs)
        return inputs + self.epsilon * gradient / gradient.abs().max().clamp(min=1e-3)


@dataclass(frozen=True, kw_only=True)
class OverNumber(Attack):
    """An attack whose step is shorter in larger batches."""

    def perturb(self, losses, inputs, *, generator=None):
        return inputs + 10 * self.epsilon * input_gradient(losses, inputs).sign() / len(inputs)


@dataclass(frozen=True, kw_only=True)
class Honest(Attack):
    """An attack with a separate step for each row, from a random start."""

    def perturb(self, losses, inputs, *, generator=None):
        start = inputs + self.epsilon * torch.rand(inputs.shape, generator=generator)
        return start + self.epsilon * input_gradient(losses, start).sign()


class Batchwise(Views):
    """Views that centre a row over the other rows."""

    def attach(self, batch, seed):
        batch = super().attach(batch, seed)
        moved = {n: v - v.mean(0) if "view" in n else v for n, v in batch.tensors().items()}
        return type(batch).from_tensors(moved)


def shifted(row):
    return row + 0.1 * torch.rand(row.shape)


@pytest.mark.parametrize(
    "changes",
    [
        {"adversary": Universal(epsilon=0.3)},
        {"adversary": OverLargest(epsilon=0.3, bounds=None)},
        {"adversary": OverNumber(epsilon=0.3, bounds=None)},
        {"views": Batchwise(count=2, change=shifted)},
    ],
)
def test_the_guard_refuses_attacks_and_views_that_couple_rows(
    learner_of, toy_stream, tmp_path, changes
):
    learner = learner_of(privacy=SIMULATED, **changes)
    message = r"Naive\.losses\(\) under the (attack|views) \w+ couples records"
    refused(learner, toy_stream(), tmp_path, message)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"adversary": FGSM(epsilon=0.1)}, "by construction"),
        ({"adversary": PGD(epsilon=0.1, steps=2)}, "by construction"),
        ({"adversary": Honest(epsilon=0.1)}, "tested"),
        ({"views": Views(count=2, change=shifted)}, "tested"),
    ],
)
def test_the_guard_verdict_depends_on_the_attack_and_the_views(
    learner_of, toy_stream, changes, expected
):
    assert word(learner_of(privacy=SIMULATED, **changes), toy_stream()) == expected


def test_built_in_views_keep_records_independent():
    own = Views(count=2, change=shift_and_flip(pixels=1))
    assert LossPath(strategy=Naive(), views=own).foreign_parts() == ()
    theirs = Views(count=2, change=shifted)
    assert LossPath(strategy=Naive(), views=theirs).foreign_parts() == ("the views",)


def test_record_by_record_mode_refuses_views_of_whole_batches(learner_of, toy_stream):
    learner = learner_of(privacy=ALONE, views=Batchwise(count=2, change=shifted))
    with pytest.raises(GuardError, match="Batchwise may use whole batches"):
        learner.prepare(toy_stream())


# --------------------------------------------------------------------------- replaced code


def replaced_losses(self, forward, batch, context, state):
    return Strategy.losses(self, forward, batch, context, state)


def in_the_object(strategy, model, patch):
    object.__setattr__(strategy, "losses", lambda *args: replaced_losses(strategy, *args))


def in_the_class(strategy, model, patch):
    patch.setattr(Naive, "losses", replaced_losses)


def in_a_class_of_torch(strategy, model, patch):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)

    patch.setattr(nn.Linear, "forward", forward)


def in_every_module(strategy, model, patch):
    patch.setitem(torch_module._global_forward_hooks, -1, lambda *args: None)


def on_a_parameter(strategy, model, patch):
    next(model.parameters()).register_hook(lambda gradient: gradient)


def in_a_clipping_rule(strategy, model, patch):
    class Rule(type(clipping_rules()[nn.Linear])):
        pass

    patch.setitem(clipping_rules(), nn.Linear, Rule())


@pytest.mark.parametrize(
    "change",
    [
        in_the_object,
        in_the_class,
        in_a_class_of_torch,
        in_every_module,
        on_a_parameter,
        in_a_clipping_rule,
    ],
)
def test_replaced_library_code_has_only_tested_independence(
    toy_stream, toy_model, monkeypatch, change
):
    strategy = Naive()
    model = toy_model(toy_stream())
    before = (*LossPath(strategy=strategy).foreign_parts(), *unlisted(model))
    change(strategy, model, monkeypatch)
    after = (*LossPath(strategy=strategy).foreign_parts(), *unlisted(model))
    assert not before and after


def test_the_statement_shows_that_losses_were_replaced(learner_of, toy_stream, monkeypatch):
    monkeypatch.setattr(Naive, "losses", replaced_losses)
    assert word(learner_of(Naive(), privacy=SIMULATED), toy_stream()) == "tested"


def test_code_replaced_during_a_run_is_refused_before_charges(learner_of, toy_stream):
    charged = []

    def hook(point, learner):
        if point == "block.begin":
            charged.append(len(learner.private_sum.ledger.entries))
            learner.model.register_forward_hook(lambda _, inputs, z: z - z.mean(0))

    learner = learner_of(privacy=SIMULATED, callbacks=[hook])
    with pytest.raises(GuardError, match="the losses now run model: Classifier"):
        learner.fit(toy_stream())
    assert charged == [len(learner.private_sum.ledger.entries)]
