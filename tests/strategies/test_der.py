from functools import partial

import pytest
import torch
import torch.nn.functional as F

from perdure.contract.context import contexts
from perdure.contract.forward import Forward
from perdure.contract.plan import MemoryPlan
from perdure.contract.state import State
from perdure.data.records import Batch
from perdure.errors import ConfigError
from perdure.learner.learner import Learner
from perdure.privacy.settings import Privacy
from perdure.strategies import DER

PRIVATE = Privacy(noise_multiplier=1.0, seed=0)


def learner_of(model, strategy, **changes):
    options = {"optimizer": partial(torch.optim.SGD, lr=0.5), "iterations": 6, "batch_size": 8}
    return Learner(model=model, strategy=strategy, **options | changes)


class Watch:
    """Record the logits of each record in the steps that drew it as new, and the batches."""

    def __init__(self):
        self.logits = {}
        self.batches = []

    def __call__(self, point, learner):
        if point == "experience.begin" and not hasattr(learner, "watched"):
            held = learner.session.held
            learner.watched = held.sample
            held.sample = lambda step: self._kept(learner, learner.watched(step))

    def _kept(self, learner, batch):
        self.batches.append((batch, learner.curator.context))
        with torch.no_grad():
            logits = learner.model(batch.inputs)
        for i, row in enumerate(batch.ids.tolist()):
            if not batch.from_memory[i]:
                self.logits.setdefault(row, []).append(logits[i].clone())
        return batch


def by_hand(logits, batch, allowed, alpha, beta):
    """Return equation 6 with one batch of stored rows, in plain loops."""
    new = []
    apart = []
    entropy = []
    for i in range(len(batch)):
        own = F.cross_entropy(
            logits[i][allowed][None], allowed.nonzero().flatten().eq(batch.labels[i]).nonzero()[0]
        )
        if batch.from_memory[i]:
            apart.append(((batch.stored["logits"][i] - logits[i]) ** 2).mean())
            entropy.append(own)
        else:
            new.append(own)
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return mean(new) + alpha * mean(apart) + beta * mean(entropy)


@pytest.mark.reference
@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("stored", [None, 3])
def test_the_der_loss_equals_its_formula(toy_stream, toy_model, beta, stored):
    stream = toy_stream()
    watch = Watch()
    model = toy_model(stream)
    learner = learner_of(
        model, DER(memory_size=12, alpha=0.3, beta=beta, batch_size=stored), callbacks=[watch]
    )
    learner.fit(stream)
    for batch, at in (watch.batches[3], watch.batches[8]):
        assert (
            int(batch.from_memory.sum()) == (stored or 8) and int((~batch.from_memory).sum()) == 8
        )
        mine = learner.strategy.losses(learner.session.forward, batch, at, State()).mean()
        torch.testing.assert_close(mine, by_hand(model(batch.inputs), batch, at.seen, 0.3, beta))


def test_the_der_loss_without_stored_rows_is_cross_entropy(toy_stream, toy_model):
    stream = toy_stream()
    watch = Watch()
    model = toy_model(stream)
    learner = learner_of(model, DER(memory_size=12), callbacks=[watch])
    learner.fit(stream)
    batch, at = watch.batches[0]
    assert "logits" not in batch.stored and at.memory_share == 0
    losses = learner.strategy.losses(learner.session.forward, batch, at, State())
    torch.testing.assert_close(
        losses, F.cross_entropy(model(batch.inputs)[:, :2], batch.labels, reduction="none")
    )


@pytest.mark.parametrize("selected", [1, 2])
def test_der_stores_the_logits_of_a_step_that_used_the_record(toy_stream, toy_model, selected):
    """With one epoch it is that epoch's step; with two epochs, one of two steps."""
    stream = toy_stream()
    watch = Watch()
    model = toy_model(stream)
    learner = learner_of(
        model,
        DER(memory_size=20),
        iterations=None,
        epochs=selected,
        batch_size=4,
        callbacks=[watch],
    )
    learner.fit(stream)
    rows = learner.session.held.memory.rows
    assert len(rows) == 20 and set(rows.tasks.tolist()) == {0, 1}
    for row, stored in zip(rows.ids.tolist(), rows.stored["logits"], strict=True):
        moments = watch.logits[row]
        assert len(moments) == selected and any(
            torch.allclose(stored, moment) for moment in moments
        )
    end = Forward(model)(rows.inputs).detach()
    # not those of the end
    assert float((end - rows.stored["logits"]).abs().max(1).values.min()) > 1e-3


@pytest.mark.parametrize("private", [False, True])
def test_a_resumed_experience_keeps_the_logits_stored_by_der(
    toy_stream, toy_model, tmp_path, private
):
    stream = toy_stream()
    watch = Watch()
    options = {
        "iterations": None,
        "epochs": 1,
        "batch_size": 4,
        "privacy": PRIVATE if private else None,
    }
    whole = learner_of(toy_model(stream), DER(memory_size=20), callbacks=[watch], **options)
    whole.fit(stream)
    expected = whole.session.held.memory.rows

    class Stopped(BaseException):
        pass

    def look(point, learner):
        if point == "block.end" and learner.position.experience == 1 and learner.position.step == 4:
            learner.save()
            raise Stopped

    cut = learner_of(
        toy_model(stream),
        DER(memory_size=20),
        callbacks=[look],
        folder=tmp_path,
        blocks=3,
        **options,
    )
    with pytest.raises(Stopped):
        cut.fit(stream)
    again = learner_of(toy_model(stream), DER(memory_size=20), folder=tmp_path, blocks=3, **options)
    again.fit(stream)
    rows = again.session.held.memory.rows
    if not private:  # under privacy blocks are entries, with coins of their own
        assert torch.equal(rows.ids, expected.ids) and torch.equal(
            rows.stored["logits"], expected.stored["logits"]
        )
        moments = [watch.logits[row][0] for row in rows.ids.tolist()]
        torch.testing.assert_close(rows.stored["logits"], torch.stack(moments))
    early = rows.stored["logits"] - Forward(again.model)(rows.inputs).detach()
    assert float(early.abs().max()) > 1e-2


def test_private_der_stores_the_logits_of_a_records_last_step(toy_stream, toy_model):
    stream = toy_stream()
    watch = Watch()
    model = toy_model(stream)
    learner = learner_of(
        model, DER(memory_size=30, alpha=0.3, beta=0.7), privacy=PRIVATE, callbacks=[watch]
    )
    learner.prepare(stream)
    learner.begin(0)
    learner.train(range(6))
    learner.finish()
    rows = learner.session.held.memory.rows
    end = model(learner.session.held.memory.rows.inputs).detach()
    moments = [watch.logits.get(row, [end[i]])[-1] for i, row in enumerate(rows.ids.tolist())]
    assert len(rows) == 24 and len(watch.logits) > 12
    torch.testing.assert_close(rows.stored["logits"], torch.stack(moments), rtol=1e-4, atol=1e-5)
    learner.begin(1)
    learner.train(range(6))
    batch, at = next(
        pair for pair in watch.batches[7:] if 0 < int(pair[0].from_memory.sum()) < len(pair[0])
    )
    assert at.memory_share == 0
    losses = learner.strategy.losses(learner.session.forward, batch, at, State())
    logits = model(batch.inputs)
    entropy = F.cross_entropy(logits, batch.labels, reduction="none")
    stored = 0.3 * (logits - batch.stored["logits"]).square().mean(1) + 0.7 * entropy
    torch.testing.assert_close(losses, torch.where(batch.from_memory, stored, entropy))


def test_the_der_logit_distance_covers_all_classes(toy_stream, toy_model):
    """A stored row changes the logits of unseen classes too, because the paper's heads have all
    classes.
    """
    stream = toy_stream()
    model = toy_model(stream)
    rows = Batch.current(stream[0].train, 0)
    stored = {"logits": model(rows.inputs).detach() - torch.tensor([0.0, 0.0, 0.0, 2.0])}
    batch = Batch.from_tensors(
        rows.tensors() | {"from_memory": torch.ones(24).bool(), "stored.logits": stored["logits"]}
    )
    losses = DER(memory_size=4, alpha=1.0).losses(
        Forward(model), batch, contexts(stream, "cpu")(0), State()
    )
    torch.testing.assert_close(losses, torch.ones(24))  # 2 ** 2 / 4


def test_der_plans_a_reservoir_updated_in_every_step(toy_stream):
    memory = DER(memory_size=9, batch_size=3).plan(toy_stream()[0]).memory
    assert memory == MemoryPlan(capacity=9, selection="reservoir", batch_size=3, update="step")
    assert DER(memory_size="0.4 kB").plan(toy_stream()[0]).memory.capacity == 400 // (5 * 4 + 8 + 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "der.alpha = -0.1"),
        ({"beta": -1.0}, "der.beta = -1.0"),
        ({"alpha": float("nan")}, "der.alpha = nan"),
    ],
)
def test_der_refuses_invalid_options(options, message):
    with pytest.raises(ConfigError, match=message):
        DER(memory_size=5, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_size": 0}, "memory_size = 0"),
        ({"memory_size": "2MB"}, "memory_size = '2MB' is not allowed.*'2 MB'"),
        ({"memory_size": 5, "batch_size": 0}, "memory batch_size = 0"),
    ],
)
def test_der_refuses_an_invalid_memory_size(toy_stream, options, message):
    with pytest.raises(ConfigError, match=message):
        DER(**options).plan(toy_stream()[0])
