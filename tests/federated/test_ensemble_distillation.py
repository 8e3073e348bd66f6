"""Distillation on public inputs at the server (FedDF)."""

from functools import partial

import pytest
import torch

from perdure.data import iid
from perdure.errors import ConfigError, FederationError
from perdure.federated import EnsembleDistillation, Federation, run_federation
from perdure.federated.averaging import ready
from perdure.federated.messages import load_record, to_record
from perdure.learner.learner import Learner
from perdure.privacy.settings import Privacy
from perdure.strategies import Naive


@pytest.fixture
def run(toy_stream, toy_model):
    stream = toy_stream()

    def make(number, **changes):
        options = {"optimizer": partial(torch.optim.SGD, lr=0.5), "iterations": 4, "batch_size": 8}
        return Learner(model=toy_model(stream), strategy=Naive(), **options | changes)

    def start(aggregator, folder=None, callbacks=(), **changes):
        return run_federation(
            lambda number: make(number, **changes),
            iid(stream, clients=2, exact=False),
            Federation(clients=2, rounds=2, aggregator=aggregator),
            folder=folder,
            callbacks=callbacks,
        )

    start.model = toy_model(stream)
    start.public = torch.rand(40, 5, generator=torch.Generator().manual_seed(4))
    return start


def test_distillation_approaches_the_mean_answers(run):
    models = [{n: v + 0.5 * i for n, v in run.model.state_dict().items()} for i in range(2)]
    aggregator = ready(EnsembleDistillation(run.model, public=run.public, learning_rate=0.01))

    def answers(tensors):
        load_record(aggregator.model, to_record(tensors))
        with torch.no_grad():
            return aggregator.model(run.public)

    mean = (answers(models[0]) + answers(models[1])) / 2
    records = [to_record(tensors) for tensors in models]
    torch.testing.assert_close(aggregator.mean_logits(records), mean)

    def distance():
        with torch.no_grad():
            logits = torch.log_softmax(aggregator.model(run.public), dim=1)
        return float((mean.softmax(1) * (mean.log_softmax(1) - logits)).sum(1).mean())

    huge = to_record({n: torch.full_like(v, 3e38) for n, v in models[0].items()})
    torch.testing.assert_close(aggregator.mean_logits([*records, huge]), mean)
    with pytest.raises(FederationError, match="NaN or infinite logits"):
        aggregator.mean_logits([huge])
    answers({n: (models[0][n] + models[1][n]) / 2 for n in models[0]})
    before = distance()
    aggregator.distil(mean, 1)
    assert 0 <= distance() < 0.3 * before


def test_a_stopped_run_with_distillation_resumes_exactly(run, tmp_path):
    whole = run(EnsembleDistillation(run.model, public=run.public, steps=3))

    def stop(point, server):
        if point == "checkpoint.end" and server.experience == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(EnsembleDistillation(run.model, public=run.public, steps=3), tmp_path, [stop])
    again = run(EnsembleDistillation(run.model, public=run.public, steps=3), tmp_path)
    ends = [server.learner.model.state_dict() for server in (whole, again)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    plain = run(Federation(clients=2, rounds=2).aggregator)
    assert any(not torch.equal(v, ends[0][n]) for n, v in plain.learner.model.state_dict().items())


def test_distillation_works_with_private_clients(run):
    aggregator = EnsembleDistillation(run.model, public=run.public, steps=2)
    server = run(aggregator, privacy=Privacy(noise_multiplier=1.0, seed=0))
    assert torch.tensor(server.learner.matrix[-1]).isfinite().all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("temperature", float("nan")),
        ("public", torch.zeros(0, 5)),
        ("public", torch.full((2, 5), torch.nan)),
    ],
)
def test_distillation_refuses_invalid_arguments(run, field, value):
    arguments = {"public": run.public} | {field: value}
    with pytest.raises(ConfigError, match=f"EnsembleDistillation.{field}"):
        EnsembleDistillation(run.model, **arguments)
