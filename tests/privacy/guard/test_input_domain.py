"""Models that mix records only for some inputs, and the domain that the guard tests."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import nn

from perdure.contract.strategy import Strategy
from perdure.data import InputDomain
from perdure.data.datasets.base import Dataset
from perdure.data.experience import Experience, Stream
from perdure.data.records import Records
from perdure.errors import ConfigError, DataError, GuardError
from perdure.learner.learner import Learner
from perdure.models.classifiers import mlp
from perdure.privacy.settings import Privacy
from perdure.strategies import Naive

TOKENS = InputDomain(shape=(12,), dtype=torch.int64, vocabulary=20, padding=0, sequence_axes=(0,))


class Mixing(nn.Module):
    """A linear model of inputs changed by `mix`."""

    def __init__(self, mix):
        super().__init__()
        self.mix = mix
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.mix(x))


def centred_below_zero(x):
    return x - x.clamp(max=0).mean(0)


def scaled_by_the_largest(x):
    return x / x.abs().max().clamp(min=1.0)


def centred_in_large_batches(x):
    return x - x.mean(0) if len(x) > 8 else x


def centred_in_huge_batches(x):
    return x - x.mean(0) if len(x) > 40 else x


def chosen_by_the_sum(x):
    return x if x.sum() > 0 else -x


def gated_by_a_neighbour(x):
    return torch.where(x.roll(1, 0).amax(1, keepdim=True) > 100, 0.0, x)


def joined_where_alone(x):
    return x + 1 if len(x) == 1 else x


class Reading(nn.Module):
    """A mean of token embeddings up to the longest sequence of the batch."""

    def __init__(self, whole=False):
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.head = nn.Linear(6, 4)
        self.whole = whole

    def forward(self, x):
        longest = x.shape[1] if self.whole else int((x != 0).sum(1).max().clamp(min=1))
        return self.head(self.embed(x[:, :longest]).mean(1))


class Cast(nn.Module):
    def forward(self, x):
        return x.long()


def stream_of(domain=None, dtype=torch.float32, shape=(5,), n=48, inputs=None):
    rng = torch.Generator().manual_seed(0)
    if inputs is None:
        inputs = (20 * torch.rand(n, *shape, generator=rng)).to(dtype)
        inputs = inputs / 20 if dtype.is_floating_point else inputs
    records = Records(inputs=inputs, labels=torch.arange(len(inputs)) % 4, domain=domain)
    experience = Experience(index=0, train=records, test=records, classes=(0, 1, 2, 3))
    return Stream(
        name="one",
        scenario="class",
        experiences=(experience,),
        num_classes=4,
        input_shape=shape,
        assigned_by_record=True,
    )


def private(model, stream, strategy=None, batch_size=4, micro_batch_size=None, **privacy):
    learner = Learner(
        model=model,
        strategy=strategy or Naive(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        iterations=2,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        privacy=Privacy(noise_multiplier=1.0, seed=0, **privacy),
    )
    learner.prepare(stream)
    return learner


@pytest.mark.parametrize(
    "mix",
    [
        centred_below_zero,
        scaled_by_the_largest,
        centred_in_large_batches,
        chosen_by_the_sum,
        gated_by_a_neighbour,
        joined_where_alone,
    ],
)
def test_the_guard_refuses_a_model_that_mixes_some_inputs(mix):
    with pytest.raises(GuardError, match="couples records"):
        private(Mixing(mix), stream_of())


def test_the_guard_refuses_a_model_that_cuts_to_the_longest_text():
    stream = stream_of(TOKENS, torch.int64, (12,))
    with pytest.raises(GuardError, match="couples records"):
        private(Reading(), stream)
    assert private(Reading(whole=True), stream).private_sum is not None


def test_the_guard_tests_batches_of_the_declared_size():
    stream = stream_of(n=200)
    assert private(Mixing(centred_in_huge_batches), stream).private_sum is not None
    with pytest.raises(GuardError, match="in a batch of 64"):
        private(Mixing(centred_in_huge_batches), stream, batch_size=64)


def declared(size):
    stream = stream_of()
    experience = stream[0]
    train = replace(experience.train, declared_size=size)
    return replace(stream, experiences=(replace(experience, train=train),))


@pytest.mark.parametrize("above", [1030, 1500])
def test_the_guard_tests_batches_up_to_the_largest_drawn_size(above):
    """A step draws 1,400 records on average and up to 1,550."""
    mix = lambda x: x - 0.5 * x.mean(0) if len(x) > above else x  # noqa: E731
    with pytest.raises(GuardError, match=r"couples records: changing .* in a batch of 1550"):
        private(Mixing(mix), declared(5_000), batch_size=1_400)
    assert private(Mixing(mix), declared(5_000), batch_size=1_400, micro_batch_size=1_000)


def test_the_guard_refuses_batches_larger_than_it_can_test():
    with pytest.raises(GuardError, match="set micro_batch_size to 26843545 or less"):
        private(Mixing(lambda x: x), declared(10**9), batch_size=3 * 10**7, delta=1e-12)
    own = mlp(input_shape=(5,), num_classes=4, seed=0)
    learner = private(own, declared(10**9), batch_size=3 * 10**7, delta=1e-12)
    assert learner.private_sum.independence == "by construction"


def test_the_guard_tests_a_model_only_on_its_declared_domain():
    """The declared range [0, 1] has no value below 0."""
    mix = lambda x: x - torch.where(x < 0, x, 0.0).mean(0)  # noqa: E731
    stream = stream_of(InputDomain(shape=(5,), range=(0.0, 1.0)))
    assert private(Mixing(mix), stream).private_sum is not None
    wide = stream_of(InputDomain(shape=(5,), range=(-1.0, 3.0)))
    with pytest.raises(GuardError, match="couples records"):
        private(Mixing(mix), wide)


@pytest.mark.parametrize("kind", ["not a number", "infinite"])
def test_the_guard_refuses_a_model_that_spreads_a_nan(kind):
    def spread(x):
        bad = ~x.isfinite() if kind == "infinite" else x.isnan()
        return x + torch.where(bad, x, 0.0).sum(0)

    stream = stream_of(InputDomain(shape=(5,), range=(0.0, 1.0)))
    with pytest.raises(
        GuardError, match=rf"couples records: changing the other rows \(({kind}|not a n)"
    ):
        private(Mixing(spread), stream)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_the_guard_refuses_integer_inputs_without_a_domain(dtype):
    with pytest.raises(
        GuardError, match=f"inputs are {dtype} without a declared domain.*InputDomain"
    ):
        private(nn.Sequential(Cast(), Reading(whole=True)), stream_of(None, dtype, (12,)))


def test_the_guard_refuses_a_model_that_fails_on_its_domain():
    wide = InputDomain(shape=(12,), dtype=torch.int64, vocabulary=50, padding=0)
    with pytest.raises(GuardError, match=r"fails on synthetic records .*every record of the decl"):
        private(Reading(whole=True), stream_of(wide, torch.int64, (12,)))


def test_records_outside_the_domain_are_refused_before_training():
    inputs = torch.rand(48, 5)
    inputs[7, 2] = 1.5
    domain = InputDomain(shape=(5,), range=(0.0, 1.0))
    with pytest.raises(DataError, match="experience 0 has records outside the declared"):
        private(nn.Linear(5, 4), stream_of(domain, inputs=inputs))
    inputs[7, 2] = float("nan")  # counts as zero
    assert private(nn.Linear(5, 4), stream_of(domain, inputs=inputs)).private_sum is not None


# --------------------------------------------------------------------------- strategies


@dataclass(frozen=True, kw_only=True)
class Ranked(Strategy):
    """A loss that depends on an extreme input in the batch."""

    def losses(self, forward, batch, context, state):
        losses = super().losses(forward, batch, context, state)
        return losses * (2.0 if bool((batch.inputs > 50).any()) else 1.0)


def test_the_guard_refuses_losses_that_depend_on_extreme_records():
    with pytest.raises(
        GuardError, match=r"Ranked.losses\(\) couples records: changing the other rows"
    ):
        private(nn.Linear(5, 4), stream_of(), Ranked())


class Backwards(torch.autograd.Function):
    """The identity, whose gradient is divided by the share of rows above 50."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x)
        return y.clone()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return None, gradient / (1 + (x > 50).any(1).float().mean())


class Straight(Mixing):
    def forward(self, x):
        return self.head(Backwards.apply(x, torch.tanh(self.inner(x))))


def test_the_guard_refuses_gradients_coupled_by_extreme_records():
    model = Straight(None)
    model.inner = nn.Linear(5, 5)
    with pytest.raises(GuardError, match=r"layer inner in .*Naive.losses\(\) couples.*gradient"):
        private(model, stream_of())


class Featured(nn.Module):
    """A model whose features mix records, but whose outputs do not use them."""

    feature_size = 5

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 4)

    def features(self, x):
        return x - x.clamp(max=0).mean(0)

    def forward(self, x):
        return self.head(x)


def test_the_guard_tests_features_as_it_tests_losses():
    with pytest.raises(GuardError, match=r"features\(\) of the model couples records"):
        private(Featured(), stream_of())


# --------------------------------------------------------------------------- the domain itself


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"range": (1.0, 1.0)}, "domain.range"),
        ({"range": (0.0, float("inf"))}, "domain.range"),
        ({"vocabulary": 5}, "domain.vocabulary"),
        ({"dtype": torch.int64}, "domain.vocabulary"),
        ({"dtype": torch.int64, "vocabulary": 5, "padding": 5}, "domain.padding"),
        ({"dtype": torch.int64, "vocabulary": 5, "range": (0.0, 1.0)}, "domain.range"),
        ({"dtype": torch.complex64}, "domain.dtype"),
        ({"sequence_axes": (1,)}, "domain.sequence_axes"),
    ],
)
def test_an_input_domain_refuses_invalid_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        InputDomain(shape=(5,), **fields)


def test_a_domain_stays_with_its_records_and_must_fit_them():
    domain = InputDomain(shape=(5,), range=(0.0, 1.0))
    records = stream_of(domain)[0].train
    assert records.take(torch.arange(3)).to("cpu").domain == domain
    with pytest.raises(DataError, match=r"the declared domain has shape \(5,\)"):
        Records(inputs=torch.rand(3, 4), labels=torch.zeros(3).long(), domain=domain)
    with pytest.raises(DataError, match=r"float64; the declared domain"):
        Records(inputs=torch.rand(3, 5).double(), labels=torch.zeros(3).long(), domain=domain)


def test_a_domain_finds_records_with_values_outside():
    floats = InputDomain(shape=(2,), range=(-1.0, 1.0))
    rows = torch.tensor([[0.0, 1.0], [0.0, 1.1], [float("nan"), 0.0], [float("inf"), 0.0]])
    assert floats.outside(rows).tolist() == [False, True, False, False]
    tokens = torch.tensor([[0] * 12, [20] + [0] * 11, [-1] + [0] * 11])
    assert TOKENS.outside(tokens).tolist() == [False, True, True]
    assert not InputDomain(shape=(2,)).outside(1e9 * rows).any()


def test_every_data_set_declares_a_domain_with_all_its_records(data_root):
    from perdure.data import adult, breast_cancer, cifar10, digits, mnist, rotated, split

    for data in (
        digits(),
        breast_cancer(),
        mnist(data_root),
        cifar10(data_root),
        adult(data_root),
    ):
        assert isinstance(data, Dataset)
        for records in (data.train, data.test):
            assert not records.domain.outside(records.inputs).any()
    stream = split(digits(), scenario="class", experiences=5)
    assert all(e.train.domain == digits().train.domain for e in stream)
    turned = rotated(digits(), angles=(0.0, 30.0))
    assert not any(e.train.domain.outside(e.train.inputs).any() for e in turned)


def test_synthetic_records_are_drawn_from_the_domain():
    learner = private(Reading(whole=True), stream_of(TOKENS, torch.int64, (12,)))
    learner.begin(0)
    drawn = learner.curator.synthetic(64).inputs
    assert drawn.dtype == torch.int64 and int(drawn.min()) == 0 and int(drawn.max()) == 19
