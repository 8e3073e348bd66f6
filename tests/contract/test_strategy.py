from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from perdure.contract.combine import Combine
from perdure.contract.context import Context, Spec, contexts
from perdure.contract.forward import Forward
from perdure.contract.plan import MemoryPlan, Plan, PrivacyCost
from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.data.records import Batch
from perdure.errors import StrategyError
from perdure.strategies import EWC, GEM, NCM, LwF, Naive, Replay
from perdure.tasks import MASKED


def spec(model, scenario="class"):
    params = {name: value.detach().clone() for name, value in model.named_parameters()}
    return Spec(params=params, num_classes=4, num_experiences=2, feature_size=6, scenario=scenario)


# --------------------------------------------------------------------------- state


def test_a_state_declares_each_name_once_with_one_rule():
    state = State().declare("count", torch.zeros(3), "sum")
    assert state.rules == {"count": "sum"} and repr(state) == "State(count: (3,) sum)"
    with pytest.raises(StrategyError, match="'count' is declared twice"):
        state.declare("count", torch.zeros(3), "mean")
    with pytest.raises(StrategyError, match=r"only a tensor or only a rule: \['b'\]"):
        State({"a": torch.zeros(1)}, {"a": "sum", "b": "sum"})


def test_a_state_group_holds_one_tensor_per_parameter():
    params = {"head.weight": torch.ones(2, 3), "head.bias": torch.ones(2)}
    state = (
        State()
        .declare_group("fisher", params, "mean")
        .declare("fisher2/x", torch.zeros(1), "local")
    )
    assert list(state.group("fisher")) == ["head.weight", "head.bias"]
    doubled = state.replace_group("fisher", {name: 2 * value for name, value in params.items()})
    assert (
        float(doubled["fisher/head.bias"].sum()) == 4
        and float(state["fisher/head.bias"].sum()) == 2
    )
    assert doubled.rules == state.rules


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": torch.zeros(2)}, "'b' is undeclared, but the given tensor has shape"),
        ({"a": torch.zeros(3)}, r"'a' is \(2,\), but the given tensor has shape \(3,\)"),
    ],
)
def test_replace_keeps_the_declared_names_and_shapes_of_a_state(changes, message):
    with pytest.raises(StrategyError, match=message):
        State().declare("a", torch.zeros(2), "sum").replace(changes)


# --------------------------------------------------------------------------- context


def context(scenario, experience):
    table = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    seen = table[: experience + 1].any(0)
    return Context(scenario=scenario, experience=experience, task_classes=table, seen=seen)


def rows(tasks):
    n = len(tasks)
    return Batch(
        inputs=torch.zeros(n, 5),
        labels=torch.zeros(n, dtype=torch.int64),
        ids=torch.arange(n),
        tasks=torch.tensor(tasks),
        from_memory=torch.zeros(n, dtype=torch.bool),
        valid=torch.ones(n, dtype=torch.bool),
    )


def shown(mask):
    return [[int(c) for c in torch.nonzero(row).flatten()] for row in mask > MASKED]


@pytest.mark.parametrize(
    ("scenario", "experience", "rows_shown", "allowed"),
    [
        # every row by its own task, prediction by the task asked for
        ("task", 1, [[0, 1], [2, 3]], [2, 3]),
        ("class", 0, [[0, 1], [0, 1]], [0, 1]),
        ("class", 1, [[0, 1, 2, 3], [0, 1, 2, 3]], [0, 1, 2, 3]),
        ("domain", 0, [[0, 1, 2, 3], [0, 1, 2, 3]], [0, 1, 2, 3]),
    ],
)
def test_the_mask_hides_classes_that_are_not_allowed_for_a_row(
    scenario, experience, rows_shown, allowed
):
    at = context(scenario, experience)
    assert shown(at.mask(torch.zeros(2, 4), rows([0, 1]))) == rows_shown
    assert torch.nonzero(at.allowed).flatten().tolist() == allowed
    assert torch.nonzero(at.current).flatten().tolist() == [2 * experience, 2 * experience + 1]


def test_a_masked_class_has_probability_zero_and_no_gradient():
    logits = torch.zeros(1, 4, requires_grad=True)
    masked = context("class", 0).mask(logits, rows([0]))
    assert torch.softmax(masked, 1)[0, 2:].tolist() == [0.0, 0.0]
    torch.logsumexp(masked, 1).sum().backward()
    assert logits.grad[0, 2:].tolist() == [0.0, 0.0]


def test_the_context_of_an_experience_lists_declared_classes(toy_stream):
    at = contexts(toy_stream("class"), "cpu")
    assert at(0).seen.tolist() == [True, True, False, False]
    assert at(1).seen.tolist() == [True] * 4 and at(1).current.tolist() == [
        False,
        False,
        True,
        True,
    ]


# --------------------------------------------------------------------------- forward


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5))
        self.head = nn.Linear(6, 4)

    def features(self, x):
        return self.body(x)

    def both(self, x, y):
        return self.body(x + y), self.head(self.body(x))

    def forward(self, x):
        return self.head(self.features(x))


@pytest.fixture
def tower():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tower()


def zeros(module):
    return {name: torch.zeros_like(value) for name, value in module.named_parameters()}


def test_forward_runs_the_model_with_own_or_given_parameters(tower):
    tower.eval()
    x = torch.rand(3, 5)
    assert torch.equal(Forward(tower)(x), tower(x))
    assert torch.equal(Forward(tower).features(x), tower.features(x))
    shifted = zeros(tower) | {"head.bias": torch.arange(4.0)}
    assert Forward(tower, shifted)(x).tolist() == [[0.0, 1.0, 2.0, 3.0]] * 3
    assert Forward(tower, zeros(tower)).features(x).abs().sum() == 0


def test_forward_runs_any_method_with_own_or_given_parameters(tower):
    tower.eval()
    x = torch.rand(3, 5)
    y = torch.rand(3, 5)
    sums, logits = Forward(tower).method("both")(x, y)
    assert torch.equal(sums, tower.body(x + y)) and torch.equal(logits, tower(x))
    shifted = zeros(tower) | {"body.0.weight": torch.ones(6, 5), "head.bias": torch.arange(4.0)}
    sums, logits = Forward(tower, shifted).method("both")(x, y)
    torch.testing.assert_close(sums, (x + y).sum(1, keepdim=True).expand(3, 6))
    assert logits.tolist() == [[0.0, 1.0, 2.0, 3.0]] * 3
    with pytest.raises(AttributeError, match="neither"):
        Forward(tower, shifted).method("neither")(x)


def test_hooks_run_in_forward_method_and_teachers_get_no_grad(tower):
    calls = []
    tower.body[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    x = torch.rand(3, 5)
    for forward in (Forward(tower), Forward(tower, zeros(tower)), Forward(tower).at(zeros(tower))):
        forward.method("both")(x, x)
    assert calls == [True] * 4 + [False] * 2
    tower.train()
    sums, logits = Forward(tower).at(dict(tower.named_parameters())).method("both")(x, x)
    assert not sums.requires_grad and not logits.requires_grad
    assert torch.equal(sums, tower.eval().body(2 * x)), "a teacher has no dropout"


def test_only_a_teacher_runs_without_gradients_and_dropout(tower):
    x = torch.rand(64, 5)
    params = {name: value.detach().requires_grad_() for name, value in tower.named_parameters()}
    assert Forward(tower, params)(x).requires_grad
    teacher = Forward(tower).at(params)
    assert not teacher(x).requires_grad and not teacher.features(x).requires_grad
    assert torch.equal(teacher(x), teacher(x)) and torch.equal(teacher(x), tower.eval()(x))


def test_a_teacher_runs_forward_hooks_without_gradients(tower):
    calls = []
    Forward(tower).at(zeros(tower))(torch.rand(2, 5))
    tower.head.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    Forward(tower).at(zeros(tower))(torch.rand(2, 5))
    assert calls == [False]  # per-record hooks go by this: what has no gradient is not theirs


@pytest.mark.parametrize("what", ["__call__", "features"])
def test_a_teacher_keeps_every_module_in_its_mode(tower, what):
    tower.eval()
    getattr(Forward(tower).at(zeros(tower)), what)(torch.rand(2, 5))
    assert not any(module.training for module in tower.modules())
    tower.train()
    tower.body.eval()
    getattr(Forward(tower).at(zeros(tower)), what)(torch.rand(2, 5))
    assert (
        tower.training
        and tower.head.training
        and not tower.body.training
        and not tower.body[1].training
    )


def test_a_teacher_that_fails_restores_the_mode_of_the_model(tower):
    tower.train()
    with pytest.raises(RuntimeError):
        Forward(tower).at(zeros(tower))(torch.rand(2, 7))
    assert all(module.training for module in tower.modules())


# --------------------------------------------------------------------------- the contract


def test_the_base_strategy_trains_like_a_plain_loop(toy_stream, toy_model):
    stream = toy_stream()
    model = toy_model(stream)
    at = contexts(stream, "cpu")(0)
    batch = Batch.current(stream[0].train, 0)
    plain = Strategy()
    state = State()
    allowed = model(batch.inputs)[:, :2]
    expected = nn.functional.cross_entropy(allowed, batch.labels, reduction="none")
    torch.testing.assert_close(plain.losses(Forward(model), batch, at, state), expected)
    assert shown(plain.predict(Forward(model), batch.inputs[:1], at, state)) == [[0, 1]]
    assert plain.penalty({}, state) is None and plain.references(None, {}, state) == ()
    assert plain.plan(stream[0]) == Plan() and plain.after_step({}, {}, {}, state) is state
    assert not any(
        plain.uses(hook) for hook in ("losses", "penalty", "project", "references", "after_step")
    )


def test_uses_is_true_for_overridden_hooks():
    assert EWC(strength=1.0).uses("penalty") and not EWC(strength=1.0).uses("losses")
    assert LwF.overrides("losses") and not Naive.overrides("losses")


# --------------------------------------------------------------------------- several at once


@dataclass(frozen=True, kw_only=True)
class Predictor(Strategy):
    def predict(self, forward, x, context, state):
        return forward(x)


@dataclass(frozen=True, kw_only=True)
class Rememberer(Strategy):
    couples_records: ClassVar[bool] = True
    not_vmappable_because: ClassVar[str | None] = "it says so"

    def plan(self, experience):
        return Plan(memory=MemoryPlan(capacity=3), trainable=("head",))

    def remember(self, forward, batch, state):
        return {"logits": forward(batch.inputs)}


@dataclass(frozen=True, kw_only=True)
class Freezer(Strategy):
    def plan(self, experience):
        return Plan(pool="all", restart=True, trainable=("body",))


@dataclass(frozen=True, kw_only=True)
class Shifter(Strategy):
    """A strategy that doubles or adds, so that the order of projections shows, and counts steps in
    its state.
    """

    add: float = 0.0
    times: float = 1.0

    def init(self, spec):
        return State().declare("steps", torch.zeros(()), "sum")

    def project(self, gradient, references, state):
        return {name: self.times * value + self.add for name, value in gradient.items()}

    def after_step(self, before, after, gradient, state, noise_variance=0.0):
        return state.replace({"steps": state["steps"] + self.times})


@dataclass(frozen=True, kw_only=True)
class Referrer(Strategy):
    """A strategy that adds its references and refuses those that another part asked for."""

    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(references=1, memory_releases=2)

    def references(self, curator, params, state):
        return ({"w": torch.full((1,), 5.0)},)

    def project(self, gradient, references, state):
        return {name: value + references[0][name] for name, value in gradient.items()}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((Referrer(), Referrer()), r"Referrer and Referrer both override references\(\)"),
        ((LwF(), Naive(), Replay(memory_size=5)), r"LwF and Replay both override losses\(\)"),
        ((Predictor(), Predictor()), r"Predictor and Predictor both override predict\(\)"),
        (
            (Rememberer(), EWC(strength=1.0), Rememberer()),
            r"Rememberer and Rememberer both override remember\(\)",
        ),
        ((Combine(LwF()), Replay(memory_size=5)), r"LwF and Replay both override losses\(\)"),
    ],
)
def test_combine_refuses_two_parts_that_override_one_hook(parts, message):
    with pytest.raises(StrategyError, match=message):
        Combine(*parts)


def test_combine_refuses_two_memories_or_two_trained_parts(toy_stream):
    experience = toy_stream()[0]
    with pytest.raises(StrategyError, match="Replay and Rememberer both set memory"):
        Combine(Replay(memory_size=5), Rememberer()).plan(experience)
    with pytest.raises(StrategyError, match="Rememberer and Freezer both set trainable"):
        Combine(Rememberer(), Freezer()).plan(experience)


@pytest.mark.parametrize(
    "other", [Replay(memory_size=5), EWC(strength=1.0), LwF(), GEM(memory_size=5)]
)
def test_combine_refuses_parts_that_would_have_no_effect(toy_stream, other):
    message = f"NCM uses no gradient, so {other.name} would have no effect; remove one of them"
    with pytest.raises(StrategyError, match=message):
        Combine(NCM(), other).plan(toy_stream()[0])
    assert not Combine(NCM(), Naive()).plan(toy_stream()[0]).train


def test_combine_merges_the_plans_of_its_parts(toy_stream):
    plan = Combine(Freezer(), Replay(memory_size=5)).plan(toy_stream()[0])
    assert plan == Plan(
        pool="all", restart=True, trainable=("body",), memory=MemoryPlan(capacity=5)
    )


def part_of(state, position):
    """Return the state of one part of a combination with the part's own names."""
    prefix = f"{position}."
    names = [name for name in state if name.startswith(prefix)]
    return State(
        {name.removeprefix(prefix): state[name] for name in names},
        {name.removeprefix(prefix): state.rules[name] for name in names},
    )


def test_combine_uses_one_loss_and_adds_the_penalties(toy_stream, toy_model):
    stream = toy_stream()
    model = toy_model(stream)
    at = contexts(stream, "cpu")(0)
    batch = Batch.current(stream[0].train, 0)
    params = dict(model.named_parameters())
    parts = (EWC(strength=1.0), Naive(), EWC(strength=3.0))
    both = Combine(*parts)
    state = both.init(spec(model))
    state = state.replace({n: torch.full_like(t, 0.5 + float(n[0])) for n, t in state.items()})
    assert {name.split(".")[0] for name in state} == {"0", "2"}  # prefixed by position
    alone = [part.penalty(params, part_of(state, i)) for i, part in enumerate(parts)]
    torch.testing.assert_close(both.penalty(params, state), alone[0] + alone[2])
    plain = Naive().losses(Forward(model), batch, at, State())
    assert torch.equal(both.losses(Forward(model), batch, at, state), plain)
    assert Combine(Naive(), Naive()).penalty(params, State()) is None
    assert torch.equal(
        Combine(Predictor(), LwF()).predict(Forward(model), batch.inputs, at, State()),
        model(batch.inputs),
    )


def test_combine_runs_projections_in_order_and_updates_all_parts(toy_stream, toy_model):
    both = Combine(Shifter(add=1.0), Naive(), Shifter(times=2.0))
    state = both.init(spec(toy_model(toy_stream())))
    assert float(both.project({"w": torch.ones(1)}, (), state)["w"]) == 4.0  # (1 + 1) * 2
    asking = Combine(Shifter(add=1.0), Referrer(), Shifter(times=2.0))
    references = asking.references(None, {}, state)
    assert (
        float(
            asking.project(
                {"w": torch.ones(1)}, references, asking.init(spec(toy_model(toy_stream())))
            )["w"]
        )
        == 14.0
    )
    after = both.after_step({}, {}, {}, state)
    assert {name: float(value) for name, value in after.items()} == {"0.steps": 1.0, "2.steps": 2.0}
    assert after.rules == {"0.steps": "sum", "2.steps": "sum"}


def test_combine_declares_the_privacy_costs_of_all_parts():
    both = Combine(
        EWC(strength=1.0),
        Combine(EWC(strength=2.0), Replay(memory_size=5)),
        Rememberer(),
        Referrer(),
    )
    assert both.privacy_cost == PrivacyCost(
        releases=2, references=1, memory_releases=2, reuses_past_records=True
    )
    assert both.couples_records and both.not_vmappable_because == "it says so"
    assert both.name == "EWC+EWC+Replay+Rememberer+Referrer"
    assert repr(Combine(Naive(), Predictor())) == "Combine(Naive(), Predictor())"
    assert both.uses("project") and not Combine(Naive()).uses("penalty")
    assert Combine(EWC(strength=1.0)) == Combine(EWC(strength=1.0)) != Combine(EWC(strength=2.0))


def test_combine_keeps_the_states_of_11_parts_separate(toy_stream, toy_model):
    both = Combine(*[Shifter(times=float(i)) for i in range(11)])
    after = both.after_step({}, {}, {}, both.init(spec(toy_model(toy_stream()))))
    assert [float(after[f"{i}.steps"]) for i in range(11)] == [float(i) for i in range(11)]


# --------------------------------------------------------------------------- examples


@dataclass(frozen=True, kw_only=True)
class Weighted(Strategy):
    """A strategy with two hyper-parameters, one of them with a default."""

    strength: float
    decay: float = 0.5


def test_example_returns_a_strategy_with_default_values():
    assert Naive.example() == Naive()
    assert Strategy.example() == Strategy()


def test_example_refuses_a_strategy_field_without_default():
    with pytest.raises(
        StrategyError, match=r"Weighted.example\(\) has no value for strength; allowed: fields with"
    ):
        Weighted.example()


def test_example_of_a_subclass_returns_the_subclass():
    @dataclass(frozen=True, kw_only=True)
    class Milder(EWC):
        """EWC with one more field."""

        rate: float = 0.1

    assert Milder.example() == Milder(strength=50.0, rate=0.1)


def test_declare_group_copies_the_state_once_for_all_names(monkeypatch):
    """Building a new state for each name would take time quadratic in the number of names."""
    made = []
    build = State.__init__

    def counted(self, *args):
        made.append(self)
        build(self, *args)

    monkeypatch.setattr(State, "__init__", counted)
    values = {f"w{i}": torch.zeros(1) for i in range(50)}
    state = State().declare_group("path", values, "local")
    assert len(made) == 2 and list(state.group("path")) == list(values)
    with pytest.raises(StrategyError, match="'path/w3' is declared twice"):
        state.declare_group("path", {"w3": torch.zeros(1)}, "sum")
