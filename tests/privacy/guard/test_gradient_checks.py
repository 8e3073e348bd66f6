"""Gradient checks before a private run: clipped gradients against a loop of autograd."""

import copy
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from opacus.layers import DPGRU
from torch import nn

from helpers.record_loops import TOLERANCE, batch_of, cross_entropies, gap, gap_to_loop
from perdure.contract.forward import Forward
from perdure.data import InputDomain
from perdure.data.datasets.base import Dataset
from perdure.data.records import Records
from perdure.data.scenarios import split
from perdure.errors import GuardError
from perdure.learner.learner import Learner
from perdure.privacy.clipping import Clip, ClippingRule, PrecomputedRows, register_rule
from perdure.privacy.clipping.rules.base import LayerCall
from perdure.privacy.clipping.rules.registry import clipping_rules
from perdure.privacy.guard import GradientCase, check_bound, check_gradients
from perdure.privacy.settings import Privacy
from perdure.queries.batch_gradients import clipped_gradient
from perdure.strategies import Naive

LABELS = torch.tensor([0, 1, 2])


def case_of(model, x):
    params = dict(model.named_parameters())

    def losses(inputs, labels):
        return F.cross_entropy(model(inputs), labels, reduction="none")

    def clipped(inputs, labels, clip):
        forward = Forward(model)
        return clipped_gradient(
            forward, cross_entropies, params, batch_of(inputs), clip, None, by_loop=False
        )

    return GradientCase(losses=losses, clipped=clipped, params=params, inputs=x, labels=LABELS)


def checked(model, x, per_layer=False):
    """Run the check on a model alone, with three records."""
    check_gradients(case_of(model, x), "mine", per_layer=per_layer)


def rows(*shape):
    return torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------- what computes something else


def doubled(layer):
    """Replace the method on the object."""

    def forward(self, x):
        return 2 * F.linear(x, self.weight, self.bias)

    layer.forward = types.MethodType(forward, layer)
    return layer


def hooked(layer, prepend=False):
    layer.register_forward_hook(lambda part, args, y: y * y, prepend=prepend)
    return layer


def pre_hooked(layer):
    layer.register_forward_pre_hook(lambda part, args: (args[0] + torch.tanh(args[0]),))
    return layer


CHANGED = {
    "a replaced forward": doubled,
    "a hook that changes the output": hooked,
    "a hook before others": lambda layer: hooked(layer, prepend=True),
    "a hook that changes the input": pre_hooked,
}


@pytest.mark.parametrize("grouped", [False, True], ids=["by rules", "by samplers"])
@pytest.mark.parametrize("change", CHANGED)
def test_clipped_sums_of_changed_layers_equal_a_record_loop(change, grouped):
    torch.manual_seed(0)
    layer = CHANGED[change](nn.Linear(8, 8))
    between = nn.Conv1d(2, 2, 3, padding="same" if grouped else 1)
    model = nn.Sequential(nn.Linear(8, 8), between, layer, nn.Flatten(), nn.Linear(16, 3))
    assert gap_to_loop(model, rows(2, 8)) < TOLERANCE
    checked(model, rows(2, 8))


@pytest.mark.parametrize("kind", ["forward hook", "pre-hook"])
def test_clipped_sums_with_global_hooks_equal_a_record_loop(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 3))
    if kind == "pre-hook":
        handle = nn.modules.module.register_module_forward_pre_hook(
            lambda part, args: (torch.tanh(args[0]),)
        )
    else:
        handle = nn.modules.module.register_module_forward_hook(lambda part, args, y: torch.tanh(y))
    with handle:
        assert gap_to_loop(model, rows(8)) < TOLERANCE


@pytest.mark.parametrize("grouped", [False, True], ids=["by rules", "by samplers"])
def test_clipped_sums_of_layers_with_two_weights_equal_a_loop(grouped):
    """The second weights are a copy without gradients, on inputs with gradients."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    norm = nn.RMSNorm(8) if grouped else nn.LayerNorm(8)
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "layer": layer, "norm": norm})
    held = {name: value.detach().clone() for name, value in layer.named_parameters()}

    def losses(forward, batch):
        module, params = forward.module, forward.params or dict(forward.module.named_parameters())

        def call(name, x):
            own = {n.removeprefix(f"{name}."): p for n, p in params.items() if n.startswith(name)}
            return torch.func.functional_call(module[name], own, (x,))

        h = call("first", batch.inputs)
        taught = torch.func.functional_call(module["layer"], held, (h,))
        y = call("norm", call("layer", h))
        return (y - 3 * taught.square()).square().sum(1)

    assert gap_to_loop(model, rows(8), losses) < TOLERANCE


@pytest.mark.parametrize("way", ["by itself", "by forward"])
def test_clipped_sums_of_weights_used_twice_equal_a_loop(way):
    """The other layer is clipped by a sampler."""

    class Reusing(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(8, 8)
            self.norm = nn.RMSNorm(8)

        def forward(self, x):
            h = self.norm(torch.tanh(self.layer(x)))
            again = F.linear(h, self.layer.weight) if way == "by itself" else self.layer.forward(h)
            return (h + again)[:, :3]

    assert gap_to_loop(Reusing(), rows(8)) < TOLERANCE


# ------------------------------------------------------------------------------- what is refused


class Gain(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gain


class ForgetfulRule(ClippingRule):
    """A rule that forgets to multiply the gain's gradient by the input."""

    layers = (Gain,)
    parameters = frozenset({"gain"})

    def gradients(self, layer, calls):
        return PrecomputedRows({"gain": sum(back for _, back in map(LayerCall.flowed, calls))})


@pytest.fixture
def forgetful(monkeypatch):
    monkeypatch.setitem(clipping_rules(), Gain, None)
    monkeypatch.delitem(clipping_rules(), Gain)
    register_rule(Gain, ForgetfulRule())


def test_the_guard_refuses_a_method_replaced_in_a_layer_class(monkeypatch):
    """Book-keeping does not see the change, because the layer's type and object are unchanged."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda layer, x: plain(layer, torch.sin(3 * x)))
    with pytest.raises(GuardError, match=r"gradient of mine differs .* most in parameter [02]\."):
        checked(model, rows(8))


@pytest.mark.parametrize("per_layer", [False, True], ids=["flat", "per layer"])
@pytest.mark.usefixtures("forgetful")
def test_the_guard_refuses_a_wrong_rule_and_names_the_parameter(per_layer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Gain(8), nn.Linear(8, 3))
    with pytest.raises(GuardError, match=r"gradient of mine differs .* most in parameter 1\.gain"):
        checked(model, rows(8), per_layer)


def test_the_gradient_check_accepts_gradients_of_single_records():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(3))
    model(rows(1, 6, 6))
    checked(model, rows(1, 6, 6))
    checked(model, rows(1, 6, 6), per_layer=True)


class Magnifying(nn.Module):
    """A model that amplifies rounding, as ReLUs do in a deep network."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 400)
        self.head = nn.Linear(400, 3)

    def forward(self, x):
        return self.head(torch.sin(1e6 * self.first(x)).relu())


def test_the_float64_gradient_check_accepts_rounding_differences():
    model = Magnifying()
    assert gap_to_loop(model, rows(8)) > 1e-2
    with pytest.raises(GuardError, match="differs from the gradients of single records"):
        checked(model, rows(8))
    twin = copy.deepcopy(model).double()
    check_gradients(
        case_of(model, rows(8)), "mine", in_double=lambda: case_of(twin, rows(8).double())
    )


@pytest.mark.usefixtures("forgetful")
def test_the_float64_gradient_check_refuses_a_wrong_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Gain(8), nn.Linear(8, 3))
    twin = copy.deepcopy(model).double()
    with pytest.raises(GuardError, match=r"most in parameter 1\.gain"):
        check_gradients(
            case_of(model, rows(8)), "mine", in_double=lambda: case_of(twin, rows(8).double())
        )
    with pytest.raises(GuardError, match=r"most in parameter 1\.gain"):
        check_gradients(case_of(model, rows(8)), "mine", in_double=lambda: case_of(twin, rows(8)))


def test_losses_without_parameters_pass_the_gradient_check():
    class Deaf(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    checked(Deaf(8, 3), rows(8))


class Measuring(nn.Module):
    """A model that computes the lengths of sequences and packs them."""

    def __init__(self):
        super().__init__()
        self.read = DPGRU(1, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        lengths = (x != 0).sum(1).clamp(min=1)
        packed = nn.utils.rnn.pack_padded_sequence(
            x[:, :, None], lengths, batch_first=True, enforce_sorted=False
        )
        read, _ = nn.utils.rnn.pad_packed_sequence(
            self.read(packed)[0], batch_first=True, total_length=x.shape[1]
        )
        return self.head(read.sum(1))


class Bagging(nn.Module):
    """A model that leaves padding out and computes the offsets of bags of words."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(10, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        words = (9 * x.abs()).long().clamp(max=9)
        there = x != 0
        lengths = there.sum(1)
        return self.head(self.bag(words[there], lengths.cumsum(0) - lengths))


class Branching(nn.Module):
    """A model that branches on values without layers that book-keeping sees."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 3))

    def forward(self, x):
        return x @ self.weight if x.sum() > 0 else -x @ self.weight


LENGTHS = {"packed sequences": Measuring, "offsets": Bagging, "branches": Branching}


@pytest.fixture
def rows_in_three_classes():
    """Return a stream of one experience with 60 rows of eight numbers."""
    inputs = torch.rand(60, 8, generator=torch.Generator().manual_seed(0))
    records = Records(inputs=inputs, labels=torch.arange(60) % 3)
    data = Dataset(name="rows", train=records, test=records, num_classes=3, input_shape=(8,))
    return split(data, scenario="class", experiences=1)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", LENGTHS)
def test_the_guard_refuses_a_forward_that_reads_lengths(name, tmp_path, rows_in_three_classes):
    torch.manual_seed(0)
    learner = Learner(
        model=LENGTHS[name](),
        strategy=Naive(),
        optimizer=torch.optim.SGD,
        iterations=2,
        privacy=Privacy(epsilon=8.0, seed=0),
        folder=tmp_path,
    )
    refused = "cannot be computed|fails on synthetic records|couples records|calls different layers"
    with pytest.raises(GuardError, match=refused):
        learner.fit(rows_in_three_classes)
    assert not list(tmp_path.glob("**/ledger*"))


@pytest.mark.usefixtures("forgetful")
def test_the_guard_refuses_a_wrong_gradient_before_any_charge(tmp_path, rows_in_three_classes):
    torch.manual_seed(0)
    learner = Learner(
        model=nn.Sequential(nn.Linear(8, 8), Gain(8), nn.Linear(8, 3)),
        strategy=Naive(),
        optimizer=torch.optim.SGD,
        iterations=2,
        privacy=Privacy(epsilon=8.0, seed=0),
        folder=tmp_path,
    )
    with pytest.raises(GuardError, match=r"most in parameter 1\.gain"):
        learner.fit(rows_in_three_classes)
    assert not list(tmp_path.glob("**/ledger*"))


class Unmapped(nn.Module):
    """A model that reads a number out of a tensor, which vmap does not support."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 3)

    def forward(self, x):
        return self.layer(x) + 0.0 * x.nan_to_num().sum().item()


def test_a_nan_row_adds_nothing_to_the_sum_without_vmap():
    """An error after the charge would reveal that the row exists."""
    model = Unmapped()
    params = dict(model.named_parameters())
    x = rows(8)
    spoilt = torch.cat([x, torch.full((1, 8), torch.nan)])
    clip = Clip(norm=0.1)
    found, expected = (
        clipped_gradient(Forward(model), cross_entropies, params, batch_of(value), clip, None)
        for value in (spoilt, x)
    )
    assert gap(found, expected) < TOLERANCE


# --------------------------------------------------------------------------- very large inputs


class Outer(nn.Linear):
    """A linear layer with a rule of its own."""


class Hasty:
    """A rule that multiplies squares in float32, where one may be 0 and the other finite."""

    def __init__(self, call):
        self.entered, self.back = call.flowed()

    def squared_norms(self):
        a, d = self.entered.square().sum(1), self.back.square().sum(1)
        return a * d + d

    def weighted(self, factors):
        back = self.back * factors[:, None]
        return {"weight": back.mT @ self.entered, "bias": back.sum(0)}


class HastyRule(ClippingRule):
    def gradients(self, layer, calls):
        (call,) = calls
        return Hasty(call)


register_rule(Outer, HastyRule())


def before_a_normalisation(layer):
    torch.manual_seed(0)
    return nn.Sequential(layer, nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("per_layer", [False, True])
def test_the_guard_refuses_a_rule_whose_float32_norm_overflows(per_layer, one_thread):
    case = case_of(before_a_normalisation(Outer(8, 16)), rows(8))
    check_gradients(case, "mine", per_layer=per_layer)
    with pytest.raises(GuardError, match=r"1\.5e\+19 is .* times the clip norm.*squared_row"):
        check_bound(case, "mine", per_layer=per_layer)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: before_a_normalisation(nn.Linear(8, 16)), (8,)),
        (lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Flatten()), (1, 3, 3)),
        (lambda: nn.Sequential(nn.Linear(8, 3), Overflows()), (8,)),
    ],
)
def test_built_in_rules_clip_very_large_inputs(make, shape, per_layer, one_thread):
    check_bound(case_of(make(), rows(*shape)), "mine", per_layer=per_layer)


class Overflows(nn.Module):
    def forward(self, x):
        return x.square()


class Picky(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x):
        if float(x.detach().abs().max()) > 1e6:
            raise ValueError("too large")
        return self.layer(x)


def test_the_bound_check_skips_inputs_that_the_model_refuses():
    check_bound(case_of(Picky(), rows(8)), "mine")


def test_the_bound_check_continues_after_a_failing_record():
    """The first record raises an error; the second has a gradient that is too long."""
    honest = case_of(Picky(), rows(8))
    asked = []

    def clipped(inputs, labels, clip):
        asked.append(inputs)
        if len(asked) == 1:
            raise ValueError("too large")
        return {"layer.weight": torch.full((3, 8), clip.norm)}

    with pytest.raises(GuardError, match="computes a norm that is too small"):
        check_bound(replace(honest, clipped=clipped), "mine")
    assert len(asked) == 2


@pytest.mark.parametrize("declared", [False, True])
def test_the_bound_check_refuses_only_without_an_input_range(declared, one_thread):
    place = torch.Generator().manual_seed(0)
    inputs = torch.rand(16, 8, generator=place)
    domain = InputDomain(shape=(8,), range=(0.0, 1.0)) if declared else None
    train = Records(inputs=inputs, labels=torch.arange(16) % 3, partition="p", domain=domain)
    test = replace(train, inputs=inputs.clone())
    data = Dataset(name="rows", train=train, test=test, num_classes=3, input_shape=(8,))
    learner = Learner(
        model=before_a_normalisation(Outer(8, 16)),
        strategy=Naive(),
        optimizer=torch.optim.SGD,
        iterations=1,
        batch_size=8,
        privacy=Privacy(noise_multiplier=1.0, seed=0),
    )
    stream = split(data, scenario="domain", experiences=1)
    if declared:
        assert learner.fit(stream).isfinite().all()
    else:
        with pytest.raises(GuardError, match="times the clip norm"):
            learner.fit(stream)
