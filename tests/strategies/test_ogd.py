import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.contract.context import Spec, contexts
from perdure.contract.forward import Forward
from perdure.contract.plan import Plan
from perdure.curator.held_records import HeldRecords
from perdure.curator.local_curator import LocalCurator
from perdure.data.datasets.digits import digits
from perdure.data.records import Batch
from perdure.data.scenarios import permuted, split
from perdure.errors import ConfigError, StrategyError
from perdure.learner.learner import Learner
from perdure.metrics import average_accuracy
from perdure.models.classifiers import mlp
from perdure.privacy.settings import Privacy
from perdure.strategies import OGD, Naive
from perdure.strategies.ogd import group_of, inverse_of, scattered

SHAPES = {"a": (3, 2), "b": (4,)}


def flat(params):
    return torch.cat([value.flatten() for value in params.values()])


def gram_schmidt(rows):
    """Return the paper's algorithm 1: every row minus its part along the rows kept before."""
    kept = []
    for row in rows.double():
        for unit in kept:
            row = row - (row @ unit) * unit
        if float(row.norm()) > 1e-5 * float(rows.norm()):
            kept.append(row / row.norm())
    return kept


def state_of(rows, experiences=2):
    """Return the state of a strategy with these directions (K, 10), K a multiple of
    `experiences`.
    """
    strategy = OGD(directions=len(rows) // experiences)
    params = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    spec = Spec(
        params=params, num_classes=4, num_experiences=experiences, feature_size=6, scenario="class"
    )
    pieces = dict(zip(SHAPES, rows.split((6, 4), dim=1), strict=True))
    directions = {name: value.view(len(rows), *SHAPES[name]) for name, value in pieces.items()}
    return strategy, strategy.derive(strategy.init(spec).replace_group("directions", directions))


def gradient_of(vector):
    return {
        name: part.view(SHAPES[name])
        for name, part in zip(SHAPES, vector.split((6, 4)), strict=True)
    }


KINDS = {
    "independent": lambda rows: rows,
    "not yet there": lambda rows: torch.cat([rows[:2], torch.zeros_like(rows[2:])]),
    "twice": lambda rows: torch.cat([rows[:2], rows[:2]]),
    "a mean of other records": lambda rows: torch.cat([rows[:3], rows[:3].mean(0, keepdim=True)]),
    "of all lengths": lambda rows: rows * torch.tensor([1e-6, 1.0, 1e3, 1e-3])[:, None],
}


@pytest.mark.property
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_the_ogd_projection_equals_gram_schmidt_projection(kind, seed):
    place = torch.Generator().manual_seed(seed)
    rows = KINDS[kind](torch.randn(4, 10, generator=place))
    vector = torch.randn(10, generator=place)
    strategy, state = state_of(rows)
    expected = vector.double()
    for unit in gram_schmidt(rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-20)):
        expected = expected - (expected @ unit) * unit
    mine = flat(strategy.project(gradient_of(vector), (), state))
    torch.testing.assert_close(mine.double(), expected, rtol=1e-3, atol=1e-4)
    along = (rows @ mine) / rows.norm(dim=1).clamp(min=1e-20)
    assert float(along.abs().max()) < 1e-4 * float(vector.norm())
    again = flat(strategy.project(gradient_of(mine), (), state))
    torch.testing.assert_close(again, mine, rtol=1e-3, atol=1e-4)


def test_ogd_does_not_change_gradients_in_the_first_experience():
    strategy, state = state_of(torch.zeros(4, 10))
    gradient = gradient_of(torch.randn(10, generator=torch.Generator().manual_seed(0)))
    mine = strategy.project(gradient, (), state)
    assert all(torch.equal(mine[name], value) for name, value in gradient.items())


def test_ogd_projects_only_along_stored_directions():
    rows = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    rows[3] = 0
    strategy, state = state_of(torch.cat([rows, torch.zeros(6, 10)]))
    assert int(state["filled"]) == 6  # up to the last, a row of 0 among them
    inverse = state["inverse"]
    assert not inverse[6:].any() and not inverse[:, 6:].any() and not inverse[3].any()
    torch.testing.assert_close(inverse[:6, :6], inverse_of(rows.double() @ rows.double().T))
    gradient = gradient_of(torch.randn(10, generator=torch.Generator().manual_seed(1)))
    beyond = {name: value.clone() for name, value in state.group("directions").items()}
    for value in beyond.values():
        value[6:] = math.nan  # would show if it were read
    mine = strategy.project(gradient, (), state.replace_group("directions", beyond))
    assert flat(mine).isfinite().all() and not torch.equal(flat(mine), flat(gradient))


def test_ogd_reads_no_direction_in_the_first_experience():
    strategy, state = state_of(torch.zeros(4, 10))
    gradient = gradient_of(torch.ones(10))
    unread = state.replace({"inverse": torch.full_like(state["inverse"], math.nan)})
    assert int(state["filled"]) == 0 and strategy.project(gradient, (), unread) is gradient


# --------------------------------------------------------------------------- directions


def consolidated(strategy, stream, model, index, train=None):
    """Return the state after experience `index` at the model's parameters; `train` replaces its
    records.
    """
    params = {name: value.detach().clone() for name, value in model.named_parameters()}
    spec = Spec(
        params=params,
        num_classes=stream.num_classes,
        num_experiences=2,
        feature_size=6,
        scenario=stream.scenario,
    )
    experiences = list(stream.experiences[: index + 1])
    experiences[-1] = replace(experiences[-1], train=train or experiences[-1].train)
    at = contexts(stream, "cpu")(index, declared_size=experiences[-1].train.declared_size)
    held = HeldRecords(seed=0, batch_size=8)
    held.open(experiences, Plan(), at, Forward(model.eval()))
    curator = LocalCurator(held)
    return strategy.derive(strategy.after_experience(curator, params, strategy.init(spec))), at


@pytest.mark.reference
@pytest.mark.parametrize("logit", ["true", "mean"])
@pytest.mark.parametrize(
    ("scenario", "allowed"), [("class", [0, 1, 2, 3]), ("task", [2, 3]), ("domain", [0, 1])]
)
def test_an_ogd_direction_is_the_mean_logit_gradient_of_a_group(
    toy_stream, toy_model, scenario, allowed, logit
):
    stream = toy_stream(scenario)
    model = toy_model(stream)
    strategy = OGD(directions=6, logit=logit)
    state, at = consolidated(strategy, stream, model, 1)
    batch = Batch.current(stream[1].train, 1)
    groups = group_of(batch, at, 6)
    assert set(groups.tolist()) == set(range(6))
    for number in range(6):
        sums = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
        for x, y in zip(
            batch.inputs[groups == number], batch.labels[groups == number], strict=True
        ):
            answers = model(x[None])[0]
            chosen = answers[y] if logit == "true" else answers[allowed].mean()
            for name, gradient in zip(
                sums, torch.autograd.grad(chosen, list(model.parameters())), strict=True
            ):
                sums[name] += gradient / len(batch)
        for name, value in sums.items():
            torch.testing.assert_close(
                state[f"directions/{name}"][6 + number], value, rtol=1e-4, atol=1e-6
            )
            # of an experience that is not in this state
            assert not state[f"directions/{name}"][:6].any()


def test_ogd_groups_depend_only_on_class_and_record_id(toy_stream):
    stream = toy_stream()
    at = contexts(stream, "cpu")(1)
    batch = Batch.current(stream[1].train, 1)
    whole = group_of(batch, at, 8)
    assert torch.equal(group_of(batch.take(slice(3, 9)), at, 8), whole[3:9])
    other = replace(batch, inputs=1 - batch.inputs, tasks=batch.tasks * 0)
    assert torch.equal(group_of(other, at, 8), whole)
    assert set(whole[batch.labels == 2].tolist()) <= {0, 1, 2, 3}
    assert set(whole[batch.labels == 3].tolist()) <= {4, 5, 6, 7}
    assert set(group_of(batch, at, 1).tolist()) == {0}  # fewer groups than classes: they share
    assert torch.equal(group_of(batch, at, 3), batch.labels - 2)  # an odd one stays empty
    strange = replace(batch, labels=batch.labels * 0)  # a class that was not declared is no error
    assert set(group_of(strange, at, 8).tolist()) <= set(range(8))
    counts = scattered(torch.arange(20_000), 10).bincount(minlength=10).double() / 20_000
    assert float((counts - 0.1).abs().max()) < 0.01


def test_averaged_ogd_directions_equal_those_of_all_records(toy_stream, toy_model):
    stream = toy_stream()
    model = toy_model(stream)
    strategy = OGD(directions=4)
    train = stream[0].train
    whole, _ = consolidated(strategy, stream, model, 0)
    sizes = (9, len(train) - 9)
    parts = [
        consolidated(strategy, stream, model, 0, train.take(torch.arange(len(train)) < 9))[0],
        consolidated(strategy, stream, model, 0, train.take(torch.arange(len(train)) >= 9))[0],
    ]
    mean = {
        name: sum(
            size * part[f"directions/{name}"] for size, part in zip(sizes, parts, strict=True)
        )
        / sum(sizes)
        for name, _ in model.named_parameters()
    }
    assert {whole.rules[name] for name in whole if name.startswith("directions/")} == {"mean"}
    combined = strategy.derive(whole.replace_group("directions", mean))
    for name, value in whole.items():
        torch.testing.assert_close(combined[name], value, rtol=1e-3, atol=1e-6)


# --------------------------------------------------------------------------- what it is for


def moved(strategy, state, model, stream, rate):
    """Return the change of the groups' mean true logits of the first experience, by one step on the
    second.
    """
    params = {name: value.detach() for name, value in model.named_parameters()}
    new = Batch.current(stream[1].train, 1)
    old = Batch.current(stream[0].train, 0)
    at = contexts(stream, "cpu")
    loss = strategy.losses(Forward(model), new, at(1), state).mean()
    gradient = dict(zip(params, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    step = strategy.project(gradient, (), state)
    assert float(flat(step).norm()) > 0.05 * float(flat(gradient).norm())
    later = {name: value - rate * step[name] for name, value in params.items()}
    with torch.no_grad():
        before, after = (
            Forward(model, p)(old.inputs).gather(1, old.labels[:, None])[:, 0]
            for p in (params, later)
        )
    groups = group_of(old, at(0), 6)
    change = torch.zeros(6, dtype=torch.float64).index_add_(0, groups, (after - before).double())
    return float(change.norm())


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_an_ogd_step_changes_earlier_logits_in_second_order(toy_stream, toy_model, scenario):
    stream = toy_stream(scenario)
    model = toy_model(stream).double()
    stream = replace(
        stream,
        experiences=tuple(
            replace(
                e,
                train=replace(e.train, inputs=e.train.inputs.double()),
                test=replace(e.test, inputs=e.test.inputs.double()),
            )
            for e in stream
        ),
    )
    strategy = OGD(directions=6)
    state, _ = consolidated(strategy, stream, model, 0)
    naive = Naive()
    rate = 1e-2
    assert (
        moved(naive, state, model, stream, rate) / moved(naive, state, model, stream, rate / 4) < 6
    )
    assert (
        moved(strategy, state, model, stream, rate)
        / moved(strategy, state, model, stream, rate / 4)
        > 12
    )
    assert moved(strategy, state, model, stream, rate) < 0.1 * moved(
        naive, state, model, stream, rate
    )


def learner_of(strategy, stream, seed=0, **changes):
    model = mlp(
        input_shape=stream.input_shape, num_classes=stream.num_classes, hidden=(30,), seed=seed
    )
    options = {
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "iterations": 60,
        "batch_size": 20,
        "seed": seed,
    }
    return Learner(model=model, strategy=strategy, **options | changes)


def test_ogd_forgets_less_than_plain_training():
    for seed in range(3):
        stream = permuted(digits(seed=seed), experiences=2, seed=seed)
        plain, kept = (
            learner_of(s, stream, seed).fit(stream) for s in (Naive(), OGD(directions=60))
        )
        assert float(kept[1, 0]) > float(plain[1, 0]) + 3, (seed, plain, kept)
        assert float(average_accuracy(kept)) > float(average_accuracy(plain)), (seed, plain, kept)


def test_ogd_steps_are_orthogonal_to_all_earlier_directions():
    stream = split(digits(), scenario="class", experiences=5)
    learner = learner_of(OGD(directions=4), stream, iterations=12)
    k = 4
    largest = []
    learner.prepare(stream)
    before = {}

    def listen(point, learner):
        at = flat({n: p.detach() for n, p in learner.params.items()}).double()
        if point == "step.sampled":
            before["at"] = at
        if point == "step.done" and (past := learner.position.experience):
            rows = torch.cat([v.flatten(1) for v in learner.state.group("directions").values()], 1)[
                : past * k
            ].double()
            move = at - before["at"]
            cosines = rows @ move / (rows.norm(dim=1) * move.norm())
            largest.append(float(cosines.abs().max()))

    learner.callbacks = [listen]
    for index in range(3):
        learner.begin(index)
        learner.train(learner.training.block(learner.position.experience, 0, 1))
        kept = learner.state.group("directions")
        learner.finish()
        for name, value in learner.state.group("directions").items():
            assert torch.equal(value[: index * k], kept[name][: index * k])
            assert (
                value[index * k : (index + 1) * k].flatten(1).any(1).all()
                and not value[(index + 1) * k :].any()
            )
    assert len(largest) == 24 and max(largest) < 2e-3


def test_private_ogd_makes_one_release_per_experience():
    stream = split(digits(), scenario="class", experiences=2)
    learner = learner_of(
        OGD(directions=10), stream, iterations=4, privacy=Privacy(noise_multiplier=1.0, seed=0)
    )
    assert learner.fit(stream).isfinite().all()
    asked = [
        entry for entry in learner.private_sum.ledger.entries if "logit gradients" in entry.purpose
    ]
    assert [entry.scope for entry in asked] == [{"experience-0": 1.0}, {"experience-1": 1.0}]
    assert all(entry.clip_norm == learner.privacy.clip_norm for entry in asked)
    # noise everywhere
    assert all(bool(value.any(dim=0).all()) for value in learner.state.group("directions").values())


def test_ogd_refuses_a_gradient_of_only_some_parameters():
    strategy, state = state_of(torch.zeros(4, 10))
    with pytest.raises(StrategyError, match="trains only some"):
        strategy.project({"a": torch.zeros(3, 2)}, (), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"directions": 0}, "ogd.directions = 0"), ({"logit": "all"}, "ogd.logit = 'all'")],
)
def test_ogd_refuses_invalid_options(options, message):
    with pytest.raises(ConfigError, match=message):
        OGD(**options)
