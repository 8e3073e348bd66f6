"""Clipping rules for the user's own layers: their use, their sums, and refusals."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from helpers.noise_tapes import N, assert_equal, by_tape, distance, exactly, floats, lengths, size
from perdure.contract.forward import Forward, cross_entropy_of
from perdure.data.records import Batch
from perdure.errors import ConfigError, PrivacyError
from perdure.learner.learner import Learner
from perdure.models.classifier import Classifier
from perdure.privacy.clipping import (
    ClippingRule,
    FormedRows,
    LayerCall,
    PrecomputedRows,
    register_rule,
    sum_of,
)
from perdure.privacy.clipping.clip import Clip
from perdure.privacy.clipping.rules.registry import clipping_rules
from perdure.privacy.settings import Privacy
from perdure.queries.batch_gradients import clipped_gradient
from perdure.strategies import Replay


class Gain(nn.Module):
    """A scale and a power for every feature."""

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 2.0, width))
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x * self.gain + self.shift


class GainRule(ClippingRule):
    parameters = frozenset({"gain", "shift"})

    def gradients(self, layer, calls):
        flowed = [call.flowed() for call in calls]
        products = sum_of([x * back for x, back in flowed])
        backs = sum_of([back for _, back in flowed])
        over = tuple(range(1, products.dim() - 1))
        gain = products.sum(over) if over else products
        return PrecomputedRows({"gain": gain, "shift": backs.flatten(1).sum(1, keepdim=True)})


class PlainGain(Gain):
    """The same layer without a rule of its own."""


register_rule(Gain, GainRule())


class Net(nn.Module):
    def __init__(self, layer, width=6, times=1):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(width, width)
        self.layer = layer
        self.times = times
        self.head = nn.LazyLinear(3)

    def forward(self, x):
        y = torch.tanh(self.first(x))
        for _ in range(self.times):
            y = torch.tanh(self.layer(y))
        return self.head(y.flatten(1))


def net(layer, x, **options):
    model = Net(layer, **options)
    model(x)
    return model


# --------------------------------------------------------------------------- the path


@pytest.mark.reference
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("shape", [(6,), (4, 6)])
def test_sums_by_a_users_clipping_rule_equal_a_record_loop(shape, times):
    x = floats(*shape)
    assert_equal(net(Gain(6), x, times=times), x)


class ExpGain(Gain):
    """A layer whose gain is a function of the parameter, without a rule."""

    def forward(self, x):
        return x * self.gain.exp() + self.shift


def test_book_keeping_refuses_a_users_layer_without_a_rule():
    x = floats(6)
    assert by_tape(net(ExpGain(6), x), x, Clip(norm=1.0)) is None


@pytest.mark.parametrize("shape", [(6,), (4, 6)])
def test_a_users_broadcasting_layer_needs_no_rule(shape):
    x = floats(*shape)
    assert_equal(net(PlainGain(6), x, times=2), x)


def test_a_clipping_rule_holds_for_its_type_and_no_subclass():
    assert PlainGain.__mro__[1] is Gain and PlainGain not in clipping_rules()


def counted_calls(monkeypatch):
    """Count the calls that `GainRule` gets, layer by layer."""
    calls = []
    rule = GainRule.gradients

    def counted(self, layer, given):
        calls.append(len(given))
        return rule(self, layer, given)

    monkeypatch.setattr(GainRule, "gradients", counted)
    return calls


def classifier(layer):
    torch.manual_seed(0)
    return Classifier(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), layer), 6, 4)


def test_a_registered_rule_does_not_change_the_clipped_sum(toy_stream, monkeypatch):
    calls = counted_calls(monkeypatch)
    batch = Batch.current(toy_stream()[0].train, 0)
    sums = []
    for layer in (PlainGain(6), Gain(6)):
        assert not calls
        model = classifier(layer)
        params = dict(model.named_parameters())
        sums.append(
            clipped_gradient(
                Forward(model),
                lambda forward, rows: cross_entropy_of(forward(rows.inputs), rows.labels),
                params,
                batch,
                Clip(norm=0.3),
                None,
            )
        )
    assert calls == [1]
    assert distance(*sums) < 1e-5 * size(sums[0]) and size(sums[0]) > 1


def test_a_private_run_uses_the_registered_rule(toy_stream, monkeypatch):
    calls = counted_calls(monkeypatch)
    of_steps = []

    def listen(point, _):
        if point == "step.sampled":
            calls.clear()  # the guard's
        elif point == "step.done":
            of_steps.append(list(calls))

    learner = Learner(
        model=classifier(Gain(6)),
        strategy=Replay(memory_size=8),
        optimizer=torch.optim.Adam,
        iterations=3,
        batch_size=8,
        privacy=Privacy(noise_multiplier=1.0, seed=0),
        callbacks=[listen],
    )
    stream = toy_stream()
    assert learner.fit(stream)[1].isfinite().all()
    assert of_steps == [[1]] * (3 * len(stream))


class Pair(Gain):
    """A layer with two input tensors."""

    def forward(self, x, other):
        return x * self.gain + other + self.shift


class WithPart(Gain):
    """A layer that contains a layer with parameters."""

    def __init__(self, width):
        super().__init__(width)
        self.part = nn.Linear(width, width)

    def forward(self, x):
        return self.part(super().forward(x))


class Switched(nn.Module):
    """A model that passes all records as one row."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer(x[None])[0])


register_rule(Pair, GainRule())
register_rule(WithPart, GainRule())


class PairNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Pair(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer(x, x))


@pytest.mark.parametrize(
    "make", [PairNet, lambda: net(WithPart(6), floats(6)), lambda: Switched(Gain(6))]
)
def test_book_keeping_refuses_layer_calls_that_no_rule_covers(make):
    assert by_tape(make(), floats(6), Clip(norm=1.0)) is None


class GainRows(FormedRows):
    def __init__(self, call):
        self.call = call
        super().__init__(len(call.back), call.back[0].numel())

    def formed(self, piece):
        entered, back = self.call.of(piece).flowed()
        return {"gain": entered * back, "shift": back.sum(1, keepdim=True)}


class FormedGain(Gain):
    pass


class FormedGainRule(GainRule):
    def gradients(self, layer, calls):
        (call,) = calls
        return GainRows(call)


def test_a_clipping_rule_may_compute_rows_in_pieces():
    register_rule(FormedGain, FormedGainRule())
    x = floats(6)
    model = net(FormedGain(6), x)
    clip = Clip(norm=lengths(model, x)[N // 2])
    expected = exactly(model, x, clip)
    assert distance(by_tape(model, x, clip), expected) < 1e-5 * size(expected)


# --------------------------------------------------------------------------- what is refused


class ShortNorms(PrecomputedRows):
    def squared_norms(self):
        return super().squared_norms()[:1]


class Missing(PrecomputedRows):
    def weighted(self, factors):
        return {"gain": super().weighted(factors)["gain"]}


class Long(PrecomputedRows):
    def weighted(self, factors):
        return {name: value[None] for name, value in super().weighted(factors).items()}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (ShortNorms, r"rule of \w+ returns squared norms of shape \(1,\) for 9 records"),
        (Missing, r"rule of \w+ returns a sum of shape None for shift; return \(1,\)"),
        (Long, r"rule of \w+ returns a sum of shape \(1, 6\) for gain; return \(6,\)"),
    ],
)
def test_rule_results_of_the_wrong_shape_are_refused(kind, message):
    class Wrong(Gain):
        pass

    class WrongRule(GainRule):
        def gradients(self, layer, calls):
            return kind(super().gradients(layer, calls).rows)

    register_rule(Wrong, WrongRule())
    x = floats(6)
    with pytest.raises(PrivacyError, match=message):
        by_tape(net(Wrong(6), x), x, Clip(norm=1.0))


def test_a_second_rule_for_a_layer_type_is_refused():
    register_rule(Gain, GainRule())
    with pytest.raises(
        ConfigError, match=r"Linear already has the clipping rule .*LinearRule, and .*GainRule"
    ):
        register_rule(nn.Linear, GainRule())


@pytest.mark.parametrize(
    ("module_type", "rule", "message"),
    [
        (Gain(6), GainRule(), "module_type = Gain.* allowed: a subclass of torch.nn.Module"),
        (PlainGain, GainRule, "rule = .*GainRule.* allowed: an object of a subclass"),
        (PlainGain, lambda layer, calls: None, "rule = .*lambda.* allowed: an object"),
    ],
)
def test_register_rule_refuses_objects_of_the_wrong_type(module_type, rule, message):
    with pytest.raises(ConfigError, match=message):
        register_rule(module_type, rule)


# --------------------------------------------------------------------------- where they are found


def test_the_table_of_rules_has_every_rule_file():
    found = {kind.__name__ for kind, rule in clipping_rules().items() if "perdure" in repr(rule)}
    assert found >= {
        "Linear",
        "Conv1d",
        "Conv2d",
        "Embedding",
        "LayerNorm",
        "GroupNorm",
        "CosineHead",
    }


def test_rule_files_are_imported_only_when_first_used():
    code = (
        "import sys, perdure, perdure.privacy.clipping.bookkeeping\n"
        "assert 'perdure.privacy.clipping.rules.linear' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_layer_call_returns_input_and_gradient_in_float32():
    call = LayerCall(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bfloat16))
    assert [value.dtype for value in call.flowed()] == [torch.float32, torch.float32]
