from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import perdure.federated  # noqa: F401  # first: it lets the warnings of Flower's dependencies pass
from perdure.contract.context import Spec, contexts
from perdure.contract.forward import Forward
from perdure.data.client_splits import iid
from perdure.data.datasets.digits import digits
from perdure.data.records import Batch
from perdure.data.scenarios import split
from perdure.errors import ConfigError, StrategyError
from perdure.federated import Federation, run_federation
from perdure.learner.learner import Learner
from perdure.metrics import average_accuracy
from perdure.models.classifiers import mlp
from perdure.privacy.settings import Privacy
from perdure.strategies import BiC
from perdure.strategies.bic import ONE_IN, PRIOR, ROUNDS, Curvature, corrected, held_out, newton


@dataclass(frozen=True, kw_only=True)
class Uncorrected(BiC):
    """BiC without its second stage."""

    def after_experience(self, curator, params, state):
        new = super().after_experience(curator, params, state)
        return new.replace(
            {"alpha": torch.ones_like(new["alpha"]), "beta": torch.zeros_like(new["beta"])}
        )


def learner_of(strategy, stream, seed=0, **changes):
    model = mlp(
        input_shape=stream.input_shape, num_classes=stream.num_classes, hidden=(50,), seed=seed
    )
    options = {
        "optimizer": partial(torch.optim.Adam, lr=3e-3),
        "iterations": 100,
        "batch_size": 64,
        "seed": seed,
    }
    return Learner(model=model, strategy=strategy, **options | changes)


@pytest.fixture
def problem(toy_stream, toy_model):
    stream = toy_stream()
    model = toy_model(stream).eval()
    teacher = {name: value.detach() + 0.3 for name, value in model.named_parameters()}
    spec = Spec(params=teacher, num_classes=4, num_experiences=2, feature_size=6, scenario="class")
    state = BiC(memory_size=8).init(spec)
    state = state.replace(
        {"alpha": torch.tensor([0.7, 0.7, 1.0, 1.0]), "beta": torch.tensor([-0.4, -0.4, 0.0, 0.0])}
    )
    return stream, model, teacher, state


@pytest.mark.reference
def test_the_bic_loss_equals_its_formula(problem):
    stream, model, teacher, state = problem
    strategy = BiC(memory_size=8, temperature=3.0)
    batch = Batch.current(stream[1].train, 1)
    at = contexts(stream, "cpu")(1)
    mine = strategy.losses(Forward(model), batch, at, state)
    with torch.no_grad():
        now = model(batch.inputs)
        then = torch.func.functional_call(model, teacher, batch.inputs)
    silent = 0
    for i, y in enumerate(batch.labels.tolist()):
        z, t = (o[i] * state["alpha"] + state["beta"] for o in (now, then))
        q = torch.softmax(t[:2] / 3, 0)
        p = torch.softmax(z[:2] / 3, 0)
        expected = 0.5 * -torch.log_softmax(z, 0)[y] + 0.5 * -(q * p.log()).sum()
        out = bool(held_out(batch.ids[i]))
        silent += out
        assert mine[i].item() == pytest.approx(0.0 if out else expected.item() * 10 / 9, rel=1e-4)
    assert 0 < silent < 6
    first = BiC(memory_size=8).losses(
        Forward(model), Batch.current(stream[0].train, 0), contexts(stream, "cpu")(0), state
    )
    assert float(first.detach().max()) > 0  # no old classes, no teacher: finite and plain
    z = corrected(model(stream[0].train.inputs), state)[:, :2]
    plain = F.cross_entropy(z, stream[0].train.labels, reduction="none") * ONE_IN / (ONE_IN - 1)
    torch.testing.assert_close(first, torch.where(held_out(stream[0].train.ids), 0.0, plain))


@pytest.mark.reference
def test_bic_query_rows_are_derivatives_of_each_record(problem):
    stream, model, _, state = problem
    batch = Batch.current(stream[1].train, 1)
    at = contexts(stream, "cpu")(1)
    fit = torch.tensor([0.8, -0.3])
    new = torch.tensor([False, False, True, True])
    rows = Curvature(state, at, new, fit)(Forward(model), batch).detach()
    raw = model(batch.inputs).detach()
    for i, y in enumerate(batch.labels.tolist()):

        def loss(f, i=i, y=y):
            z = torch.where(new, f[0] * raw[i] + f[1], state["alpha"] * raw[i] + state["beta"])
            return -torch.log_softmax(z, 0)[y]

        slope = torch.autograd.functional.jacobian(loss, fit)
        second = torch.autograd.functional.hessian(loss, fit)
        expected = torch.stack([*slope, second[0, 0], second[0, 1], second[1, 1]]) * bool(
            held_out(batch.ids[i])
        )
        torch.testing.assert_close(rows[i], expected, rtol=1e-4, atol=1e-6)
    assert rows.abs().sum() > 0


@pytest.mark.reference
def test_the_bic_correction_minimises_the_held_out_loss():
    stream = split(digits(), scenario="class", experiences=2)
    learner = learner_of(BiC(memory_size=200), stream)
    learner.fit(stream)
    rows = learner.session.held.memory.rows
    rows = rows.take(held_out(rows.ids))
    with torch.no_grad():
        raw = learner.model.eval()(rows.inputs).double()
    fit = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [fit], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10
    )

    def objective():
        search.zero_grad()
        z = torch.cat([raw[:, :5], fit[0] * raw[:, 5:] + fit[1]], dim=1)
        value = F.cross_entropy(z, rows.labels, reduction="sum")
        value = value + PRIOR / 2 * ((fit[0] - 1).square() + fit[1].square())
        value.backward()
        return value

    search.step(objective)
    mine = torch.stack([learner.state["alpha"][5], learner.state["beta"][5]])
    torch.testing.assert_close(mine, fit.detach().float(), rtol=0.01, atol=0.01)
    assert float((mine - torch.tensor([1.0, 0.0])).norm()) > 0.2 and 10 < len(rows) < 40
    assert (learner.state["alpha"][:5] == 1).all() and (learner.state["beta"][:5] == 0).all()


def test_bic_learns_repeated_classes_from_their_labels(problem):
    stream, model, teacher, state = problem
    state = state.replace_group("teacher", teacher)
    batch = Batch.current(stream[1].train, 1)
    everywhere = torch.ones(2, 4, dtype=torch.bool)
    at = replace(contexts(stream, "cpu")(1), task_classes=everywhere, seen=everywhere[0])
    plain = torch.nn.functional.cross_entropy(
        corrected(model(batch.inputs), state), batch.labels, reduction="none"
    )
    expected = torch.where(held_out(batch.ids), 0.0, plain * ONE_IN / (ONE_IN - 1))
    torch.testing.assert_close(
        BiC(memory_size=8).losses(Forward(model), batch, at, state), expected
    )


def test_bic_holds_out_one_in_ten_records_from_training():
    ids = torch.arange(20_000)
    assert float(held_out(ids).double().mean()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(held_out(ids.flip(0)), held_out(ids).flip(0))
    stream = split(digits(), scenario="class", experiences=2)
    train = stream[0].train
    spoilt = torch.where(held_out(train.ids).view(-1, 1, 1, 1), 1 - train.inputs, train.inputs)
    parts = (replace(stream[0], train=replace(train, inputs=spoilt)), stream[1])
    assert not torch.equal(spoilt, train.inputs)
    ends = []
    for given in (stream, replace(stream, experiences=parts)):
        learner = learner_of(BiC(memory_size=100), given, iterations=20)
        learner.fit(given)
        ends.append(learner)
    for name, value in ends[0].model.state_dict().items():
        torch.testing.assert_close(ends[1].model.state_dict()[name], value)
    assert not torch.equal(ends[0].state["alpha"], ends[1].state["alpha"])


def score(strategy, seed):
    stream = split(digits(), scenario="class", experiences=2, seed=seed)
    return float(average_accuracy(learner_of(strategy, stream, seed).fit(stream)))


def test_the_bic_correction_improves_accuracy_on_old_classes():
    for seed in range(3):
        assert score(BiC(memory_size=100), seed) > score(Uncorrected(memory_size=100), seed) + 2


def test_the_bic_correction_is_finite_for_any_noisy_sums():
    place = torch.Generator().manual_seed(0)
    for _ in range(200):
        sums = 100 * torch.randn(5, generator=place)
        fit = torch.randn(2, generator=place)
        step = newton(sums, fit)
        slope = sums[:2] + PRIOR * (fit - torch.tensor([1.0, 0.0]))
        assert step.isfinite().all() and float(step.norm()) <= 1 + 1e-6 and float(step @ slope) < 0
    none = newton(torch.zeros(5), torch.tensor([1.0, 0.0]))
    assert none.tolist() == [0.0, 0.0]


def test_bic_charges_each_fit_round_and_averages_client_fits():
    stream = split(digits(), scenario="class", experiences=2)
    strategy = BiC(memory_size=100)
    learner = learner_of(
        strategy, stream, iterations=5, privacy=Privacy(noise_multiplier=1.0, seed=0)
    )
    assert learner.fit(stream).isfinite().all()
    asked = [
        entry.purpose
        for entry in learner.private_sum.ledger.entries
        if "bias correction" in entry.purpose
    ]
    assert len(asked) == 2 * ROUNDS == 2 * strategy.privacy_cost.memory_releases
    state = run_federation(
        lambda _: learner_of(strategy, stream, blocks=2),
        iid(stream, clients=2),
        Federation(clients=2, rounds=2),
    ).learner.state
    assert (state["alpha"][:5] == 1).all() and (state["alpha"][5:] < 1).all()


def test_bic_refuses_other_scenarios_and_invalid_options(problem):
    *_, params, _ = problem
    for scenario in ("task", "domain"):
        with pytest.raises(StrategyError, match="use Replay for this stream"):
            BiC(memory_size=8).init(
                Spec(
                    params=params,
                    num_classes=4,
                    num_experiences=2,
                    feature_size=6,
                    scenario=scenario,
                )
            )
    with pytest.raises(ConfigError, match=r"bic.temperature = 0\.0"):
        BiC(memory_size=8, temperature=0.0)
