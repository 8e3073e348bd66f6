"""Writes during private passes: embeddings, losses and modules that store record values."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from helpers.learners import SIMULATED
from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.errors import GuardError
from perdure.privacy.guard.model_checks import check_model
from perdure.privacy.guard.writes import WriteWatch

# --------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_norm": 1.0}, "with max_norm, which writes into"),
        ({"sparse": True}, "with sparse=True"),
        ({"scale_grad_by_freq": True}, "with scale_grad_by_freq"),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_guard_refuses_embeddings_that_write_or_count_words(kind, options, reason, frozen):
    model = nn.Sequential(kind(20, 4, **options).requires_grad_(not frozen), nn.Linear(4, 3))
    with pytest.raises(GuardError, match=f"0 is {kind.__name__} {reason}"):
        check_model(model)


class Renormalising(nn.Module):
    """A model that looks up a frozen table with max_norm by the function, which no module shows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", 3 * torch.ones(20, 4))
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        words = x.nan_to_num().abs().sum(1).clamp(max=19).long()
        return self.head(torch.nn.functional.embedding(words, self.table, max_norm=1.0))


def test_a_forward_that_renormalises_a_table_is_refused_by_name(learner_of, toy_stream):

    with pytest.raises(GuardError, match="buffer table of the model changes"):
        learner_of(model=Renormalising(), privacy=SIMULATED).prepare(toy_stream())


# --------------------------------------------------------------------------- losses


@dataclass(frozen=True, kw_only=True)
class Writing(Strategy):
    """A strategy that adds the sum of the batch to a stored tensor."""

    where: str
    through_data: bool = False

    def init(self, spec):
        return State().declare("seen", torch.zeros(5), "local")

    def losses(self, forward, batch, context, state):
        keepers = {
            "state seen": state["seen"],
            "buffer shift": getattr(forward.module, "shift", None),
            "parameter frozen": getattr(forward.module, "frozen", None),
        }
        kept = keepers[self.where]
        if self.writes(batch):
            (kept.data if self.through_data else kept.detach()).add_(batch.inputs.sum(0))
        return super().losses(forward, batch, context, state)

    def writes(self, batch):
        return True


class Keeper(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 4)
        self.register_buffer("shift", torch.zeros(5))
        self.frozen = nn.Parameter(torch.zeros(5), requires_grad=False)

    def forward(self, x):
        return self.head(x)


PLACES = ["state seen", "buffer shift", "parameter frozen"]


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("where", PLACES)
def test_the_guard_refuses_losses_that_store_batch_sums(
    learner_of, toy_stream, where, through_data
):

    learner = learner_of(
        Writing(where=where, through_data=through_data), model=Keeper(), privacy=SIMULATED
    )
    with pytest.raises(GuardError, match=rf"{where} is written to in .*Writing.losses\(\)"):
        learner.prepare(toy_stream())


@dataclass(frozen=True, kw_only=True)
class Late(Writing):
    """A strategy that writes only for real records, whose ids differ from synthetic ones."""

    def writes(self, batch):
        return bool(((batch.ids >= 5000) & (batch.ids < 6000)).any())


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("where", PLACES)
def test_writes_missed_by_the_guard_are_refused_in_the_step(
    learner_of, toy_stream, where, through_data
):

    stream = toy_stream()
    parts = [replace(e, train=replace(e.train, ids=e.train.ids + 5000)) for e in stream]
    stream = replace(stream, experiences=tuple(parts))
    steps = []
    learner = learner_of(
        Late(where=where, through_data=through_data),
        model=Keeper(),
        privacy=SIMULATED,
        callbacks=[lambda point, _: steps.append(point)],
    )
    with pytest.raises(GuardError, match=f"{where} is written to in a private pass"):
        learner.fit(stream)
    assert "step.gradient" not in steps


class Renewing(nn.Module):
    """A model that replaces its buffer for large batches."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        if len(x) > 22:
            self.mean = x.detach().mean(0)
        return self.head(x)


def test_the_guard_refuses_a_buffer_replaced_by_large_batches(learner_of, toy_stream):
    with pytest.raises(GuardError, match=r"buffer mean (is written to|of the model changes)"):
        learner_of(model=Renewing(), privacy=SIMULATED, batch_size=24).fit(toy_stream())


def test_a_query_that_writes_into_the_model_is_refused(learner_of, toy_stream):

    @dataclass(frozen=True, kw_only=True)
    class Asking(Strategy):
        def after_experience(self, curator, params, state):
            def query(forward, batch):
                forward.module.shift.data.add_(1.0)
                return batch.inputs

            curator.release(query, clip_norm=1.0, purpose="mean")
            return state

    learner = learner_of(Asking(), model=Keeper(), privacy=SIMULATED)
    with pytest.raises(GuardError, match="buffer shift is written to in a private pass"):
        learner.fit(toy_stream())


# --------------------------------------------------------------------------- the watch


def test_the_write_watch_restores_written_tensors():
    model = Keeper()
    with (
        pytest.raises(GuardError, match="buffer shift is written to in here"),
        WriteWatch(model).unwritten({}, "here", values=True),
    ):
        model.shift.data.add_(1.0)
    assert float(model.shift.sum()) == 0


def test_the_write_watch_accepts_code_that_only_reads():
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5))
    state = {"mean": torch.full((2,), float("nan"))}
    with WriteWatch(model).unwritten(state, "here", values=True):
        model(torch.rand(3, 5)).sum().backward()
    assert all(value.grad is not None for value in model.parameters())


def test_writes_are_allowed_in_steps_without_privacy(learner_of, toy_stream):
    learner = learner_of(Writing(where="state seen"), model=Keeper())
    assert learner.fit(toy_stream()).isfinite().all()
    assert isinstance(learner.session.state["seen"], torch.Tensor)
