from dataclasses import replace

import pytest
import torch

from helpers.learners import distinct_rows
from helpers.parties import opened_party, private_sum_of
from perdure.contract.context import Spec, contexts
from perdure.contract.forward import Forward
from perdure.contract.state import State
from perdure.curator.local_curator import LocalCurator
from perdure.data.experience import Experience, Stream
from perdure.data.records import Batch, Records
from perdure.errors import ConfigError
from perdure.models.classifiers import mlp
from perdure.privacy.settings import Privacy
from perdure.strategies import EWC
from perdure.strategies.ewc import anchor, drawn
from perdure.testing import check_strategy
from perdure.utils.hashing import uniforms
from perdure.utils.seeding import derive, generator


class Past:
    """Three consolidations at unrelated points, with every Fisher matrix kept beside the state."""

    def __init__(self, strategy, stream):
        self.strategy = strategy
        self.stream = stream
        self.models = [
            mlp(input_shape=(5,), num_classes=4, hidden=(6,), seed=s, activation="tanh")
            for s in range(3)
        ]
        self.points = [
            {n: v.detach().clone() for n, v in m.named_parameters()} for m in self.models
        ]
        spec = Spec(
            params=self.points[0],
            num_classes=4,
            num_experiences=3,
            feature_size=6,
            scenario="class",
        )
        self.empty = self.state = strategy.init(spec)
        self.fishers = []
        for index, (model, point) in enumerate(zip(self.models, self.points, strict=True)):
            _, curator = opened_party(stream, model.eval(), experience=min(index, 1))
            # an EWC with no past: this Fisher matrix
            alone = strategy.after_experience(curator, point, self.empty)
            self.fishers.append(alone.group("fisher"))
            self.state = strategy.derive(strategy.after_experience(curator, point, self.state))

    def gradient(self, penalty, at):
        leaves = {name: value.clone().requires_grad_() for name, value in at.items()}
        return dict(
            zip(at, torch.autograd.grad(penalty(leaves), list(leaves.values())), strict=True)
        )


def somewhere():
    model = mlp(input_shape=(5,), num_classes=4, hidden=(6,), seed=9)
    return {name: value.detach() for name, value in model.named_parameters()}


def quadratic(strength, fisher, anchor):
    return lambda params: (
        0.5 * strength * sum((fisher[n] * (params[n] - anchor[n]) ** 2).sum() for n in params)
    )


def same(mine, theirs):
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.reference
def test_the_ewc_penalty_equals_the_sum_over_past_experiences(toy_stream):
    past = Past(EWC(strength=7.0), toy_stream())
    separate = [
        quadratic(7.0, fisher, point)
        for fisher, point in zip(past.fishers, past.points, strict=True)
    ]
    points = [somewhere(), past.points[2]]
    for point in points:
        mine = past.gradient(lambda p: past.strategy.penalty(p, past.state), point)
        theirs = past.gradient(lambda p: sum(penalty(p) for penalty in separate), point)
        assert max(float(value.abs().max()) for value in theirs.values()) > 1e-3
        same(mine, theirs)
    gap = [
        past.strategy.penalty(p, past.state) - sum(penalty(p) for penalty in separate)
        for p in points
    ]
    torch.testing.assert_close(gap[0], gap[1], rtol=1e-3, atol=1e-5)


@pytest.mark.reference
def test_online_ewc_decays_fisher_around_the_latest_parameters(toy_stream):
    past = Past(
        EWC(strength=7.0, mode="online", decay=0.5),
        toy_stream(),
    )
    first, second, third = past.fishers
    decayed = {name: 0.25 * first[name] + 0.5 * second[name] + third[name] for name in first}
    same(past.state.group("fisher"), decayed)
    for name, point in past.points[2].items():
        held = decayed[name] > 1e-12
        torch.testing.assert_close(anchor(past.state, name)[held], point[held])
    expected = quadratic(7.0, decayed, past.points[2])(somewhere())
    torch.testing.assert_close(past.strategy.penalty(somewhere(), past.state), expected)


def test_ewc_has_no_penalty_in_the_first_experience(toy_stream):
    past = Past(EWC(strength=7.0), toy_stream())
    assert float(past.strategy.penalty(somewhere(), past.empty)) == 0
    assert set(past.state.rules.values()) == {"mean", "local"} and len(past.state) == 3 * len(
        past.points[0]
    )


def test_private_ewc_makes_one_clipped_fisher_release(
    toy_stream,
):
    """The share of zeros is over 16 models, because that of one model, 64 numbers, varies with the
    noise.
    """
    stream = toy_stream()
    values = []
    privacy = Privacy(noise_multiplier=1.0, clip_norm=0.2, seed=0)
    for seed in range(16):
        model = mlp(input_shape=(5,), num_classes=4, hidden=(6,), seed=seed).eval()
        params = {name: value.detach().clone() for name, value in model.named_parameters()}
        spec = Spec(
            params=params, num_classes=4, num_experiences=2, feature_size=6, scenario="class"
        )
        strategy = EWC(strength=1.0)
        private_sum = private_sum_of(stream, privacy)
        ledger = private_sum.ledger
        _, curator = opened_party(stream, model, private_sum=private_sum)
        state = strategy.after_experience(curator, params, strategy.init(spec))
        (entry,) = ledger.entries
        assert entry.purpose == "release:fisher" and entry.clip_norm == pytest.approx(0.04)
        assert (
            entry.noise_multiplier == 4.0 and len(ledger.entries) == strategy.privacy_cost.releases
        )
        values += [value.flatten() for value in state.group("fisher").values()]
    values = torch.cat(values)
    # noise, cut at 0
    assert float(values.min()) == 0.0 and 0.3 < float((values == 0).float().mean()) < 0.7


class Listening(LocalCurator):
    """A curator that keeps the last query."""

    def release(self, query, **options):
        self.query = query
        return super().release(query, **options)


def query_of(strategy, stream, model, experience=0):
    """Return the query that the strategy asks at the end of an experience."""
    params = {name: value.detach().clone() for name, value in model.named_parameters()}
    spec = Spec(
        params=params,
        num_classes=stream.num_classes,
        num_experiences=2,
        feature_size=6,
        scenario=stream.scenario,
    )
    held, _ = opened_party(stream, model, experience=experience)
    curator = Listening(held)
    strategy.after_experience(curator, params, strategy.init(spec))
    return curator.query


def test_a_fisher_row_is_at_most_the_squared_clip_norm(toy_stream):
    """|g * g| <= |g|^2 and the weights add up to 1, so no record is clipped whose gradients lie
    within C.
    """
    stream = toy_stream()
    strategy = EWC(strength=1.0)
    model = mlp(input_shape=(5,), num_classes=4, hidden=(6,), seed=0)
    query = query_of(strategy, stream, model)
    batch = Batch.current(stream[0].train, 0)
    rows = query(Forward(model), batch)
    lengths = torch.cat([row.flatten(1) for row in rows.values()], dim=1).norm(dim=1)
    for i, length in enumerate(lengths):
        terms, _ = query.terms(Forward(model), batch.take(slice(i, i + 1)))
        norms = [
            sum(
                g.square().sum()
                for g in torch.autograd.grad(t, list(model.parameters()), retain_graph=True)
            )
            for t in terms[0]
        ]
        assert 0 < float(length.detach()) <= float(max(norms)) * (1 + 1e-5)


def rows_of(fisher, stream, experience, batch):
    """Return squared gradients of a batch's rows, as the strategy asks for them."""
    model = mlp(input_shape=(5,), num_classes=stream.num_classes, hidden=(6,), seed=0).eval()
    query = query_of(EWC(strength=1.0, fisher=fisher), stream, model, experience)
    rows = query(Forward(model), batch)
    return torch.cat([row.detach().flatten(1) for row in rows.values()], dim=1)


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("scenario", "experience"), [("class", 0), ("class", 1), ("task", 1), ("domain", 1)]
)
def test_sampled_fisher_averaged_over_ids_is_close_to_exact(toy_stream, scenario, experience):
    """Four standard errors of each of at most 64 numbers, by a fixed hash: the test passes always,
    or the draw is wrong.
    """
    stream = toy_stream(scenario)
    n = 4000
    one = Batch.current(stream[experience].train, experience).take(slice(3, 4))
    many = replace(one.take(torch.zeros(n, dtype=torch.int64)), ids=10_000 + torch.arange(n))
    [exact] = rows_of("exact", stream, experience, one)
    sampled = rows_of("sampled", stream, experience, many)
    errors = sampled.double().std(0) / n**0.5
    assert ((sampled.double().mean(0) - exact).abs() <= 4 * errors + 1e-7).all()
    assert distinct_rows(sampled) == int(contexts(stream, "cpu")(experience).allowed.sum())
    [empirical] = rows_of("empirical", stream, experience, one)
    assert ((empirical - exact).abs() > 8 * errors).any(), "a test that could not tell them apart"


def test_sampled_fisher_labels_differ_by_record_and_experience(toy_stream):
    stream = toy_stream()
    batch = Batch.current(stream[1].train, 1)
    rows = rows_of("sampled", stream, 1, batch)
    torch.testing.assert_close(
        rows_of("sampled", stream, 1, batch.take(slice(0, None, 3))), rows[::3]
    )
    assert torch.equal(rows, rows_of("sampled", stream, 1, batch))
    ids = torch.arange(1000)
    p = torch.full((1000, 4), 0.25)
    labels = [drawn(p, uniforms(ids, derive("fisher", experience))) for experience in (0, 1)]
    assert 150 < int((labels[0] == labels[1]).sum()) < 350


def test_fisher_labels_are_drawn_by_class_probability():
    p = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    ends = torch.tensor([2.0**-24, 0.2499, 0.2501, 1 - 2.0**-24])
    assert drawn(p.expand(4, 5), ends).tolist() == [1, 1, 3, 3]
    for total in (0.9999, 1.0, 1.0001):  # a sum of probabilities is 1 up to rounding
        assert drawn((total * p).expand(4, 5), ends).tolist()[::3] == [1, 3]


def wide_stream(classes):
    """Return one experience of a few records in a domain with many classes."""
    labels = torch.arange(6) * (classes // 6)
    records = Records(inputs=torch.rand(6, 5, generator=generator(0, "wide")), labels=labels)
    experience = Experience(index=0, train=records, test=records, classes=tuple(range(classes)))
    return Stream(
        name="wide",
        scenario="domain",
        experiences=(experience,),
        num_classes=classes,
        input_shape=(5,),
        assigned_by_record=True,
    )


def terms_of(strategy, classes):
    """Return the number of terms in a record's row, with one backward pass each."""
    model = mlp(input_shape=(5,), num_classes=classes, hidden=(6,), seed=0).eval()
    stream = wide_stream(classes)
    losses, _ = query_of(strategy, stream, model).terms(
        Forward(model), Batch.current(stream[0].train, 0)
    )
    return losses.shape[1]


@pytest.mark.parametrize(
    ("fisher", "classes", "terms"),
    [
        ("auto", 100, 100),
        ("auto", 101, 1),
        ("auto", 1000, 1),
        ("exact", 101, 101),
        ("sampled", 10, 1),
        ("empirical", 10, 1),
    ],
)
def test_fisher_auto_means_sampled_above_100_classes(fisher, classes, terms, caplog):
    caplog.set_level("INFO", logger="perdure.strategies.ewc")
    assert terms_of(EWC(strength=1.0, fisher=fisher), classes) == terms
    told = [record.getMessage() for record in caplog.records]
    said = fisher == "auto" and classes > 100
    assert len(told) == said and all("one sampled label per record" in line for line in told)


def test_fisher_auto_means_exact_for_few_classes(toy_stream):
    stream = toy_stream()
    batch = Batch.current(stream[1].train, 1)
    assert torch.equal(rows_of("auto", stream, 1, batch), rows_of("exact", stream, 1, batch))


def test_ewc_with_sampled_fisher_passes_check_strategy():
    assert "vmap" in check_strategy(EWC(strength=50.0, fisher="sampled")).passed


def test_the_ewc_anchor_is_the_fisher_weighted_mean():
    state = State().declare("fisher/w", torch.tensor([4.0, 0.0]), "mean")
    state = state.declare("pull/w", torch.tensor([1.0 * 2.0 + 3.0 * 6.0, 0.0]), "mean")
    assert anchor(state, "w").tolist() == [5.0, 0.0]


def test_averaged_ewc_clients_equal_one_client_with_all_records():
    """Two experiences and two clients of sizes 1 and 3: the combined penalty is the sum of the
    global penalties.
    """
    fishers = torch.tensor([[[2.0], [1.0]], [[6.0], [5.0]]])  # client, experience
    points = torch.tensor([[1.0], [-2.0]])
    weights = torch.tensor([0.25, 0.75])
    held = (weights[:, None, None] * fishers).sum(0)
    states = [
        State()
        .declare("fisher/w", own.sum(0), "mean")
        .declare("pull/w", (own * points).sum(0), "mean")
        .declare("anchor/w", torch.zeros(1), "local")
        for own in fishers
    ]
    combined = states[0].replace({n: 0.25 * states[0][n] + 0.75 * states[1][n] for n in states[0]})
    combined = EWC(strength=2.0).derive(combined)
    at = torch.tensor([0.3], requires_grad=True)
    mine = torch.autograd.grad(EWC(strength=2.0).penalty({"w": at}, combined), at)[0]
    theirs = torch.autograd.grad((held * (at - points).square()).sum(), at)[0]
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1.0}, "ewc.strength = -1.0"),
        ({"strength": float("inf")}, "ewc.strength = inf"),
        ({"strength": float("nan")}, "ewc.strength = nan"),
        ({"strength": 1.0, "decay": 1.5}, "ewc.decay = 1.5"),
        ({"strength": 1.0, "mode": "both"}, "ewc.mode = 'both'.*separate, online"),
        (
            {"strength": 1.0, "fisher": "batch"},
            "ewc.fisher = 'batch'.*auto, exact, sampled, empirical",
        ),
    ],
)
def test_ewc_refuses_invalid_options(options, message):
    with pytest.raises(ConfigError, match=message):
        EWC(**options)
