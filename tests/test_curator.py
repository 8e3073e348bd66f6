from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.curator import Curator
from perdure.errors import PrivacyError
from perdure.facts import contexts, exposure
from perdure.identity import copies
from perdure.memory import MemoryPlan
from perdure.privacy.ledger import Ledger
from perdure.privacy.mechanism import Mechanism, Schedule
from perdure.privacy.noise import NoiseKey
from perdure.privacy.policy import Privacy
from perdure.records import Records
from perdure.strategy import Forward, Plan, cross_entropy
from perdure.streams import permuted, split

REPLAY = Plan(memory=MemoryPlan(capacity=1000))


def declared(stream, *sizes):
    parts = zip(stream, sizes, strict=True)
    experiences = tuple(replace(e, train=replace(e.train, declared_size=size)) for e, size in parts)
    return replace(stream, experiences=experiences)


class Bench:
    """A curator on a stream, with its model, contexts, ledger and the trace of what happened in which order."""

    def __init__(self, stream, model, *, privacy=None, batch_size=8, seed=0):
        self.stream, self.model, self.trace = stream, model, []
        self.params = dict(model.named_parameters())
        self.context = contexts(stream, "cpu")
        self.mechanism = self._mechanism(privacy) if privacy else None
        self.curator = Curator(seed=seed, batch_size=batch_size, mechanism=self.mechanism)

    def _mechanism(self, privacy):
        key = NoiseKey.from_seed(privacy.seed)
        self.ledger = Ledger.open(None, key=key, trace=self.trace.append)
        for e in self.stream:
            self.ledger.declare(e.train.partition, e.train.declared_size)
        self.trace.clear()
        schedule = Schedule(noise=(privacy.noise_multiplier,))
        return Mechanism(privacy=privacy, schedule=schedule, ledger=self.ledger, key=key)

    def open(self, index=0, plan=None, steps=range(0)):
        past = self.stream.experiences[: index + 1]
        self.curator.open(past, plan or Plan(), self.context(index), Forward(self.model))
        if len(steps):
            self.curator.reserve(steps, "start")
        return self.curator

    def whole(self, index=0, plan=None, remember=lambda forward, batch: {}, **options):
        """An experience from beginning to end."""
        self.open(index, plan, **options)
        self.finish(remember)

    def finish(self, remember=lambda forward, batch: {}):
        self.curator.store(remember)
        self.curator.close()

    def gradient(self, batch, step=0):
        losses = lambda forward, rows: cross_entropy(forward, rows, self.curator.context)  # noqa: E731
        return self.curator.gradient(losses, self.params, batch, step)


@pytest.fixture
def bench(toy_stream, toy_model):
    def make(privacy=None, stream=None, model=None, **options):
        stream = stream or toy_stream()
        return Bench(stream, model or toy_model(stream), privacy=privacy, **options)

    return make


def simulated(**changes):
    return Privacy(**{"noise_multiplier": 1.0, "seed": 0} | changes)


# --------------------------------------------------------------------------- who is exposed


def test_rates_come_from_declared_sizes_and_count_the_memory(toy_stream):
    """256/12,000 for the first experience and 256/13,000 once a memory of 1,000 is pooled with the new records."""
    experiences = declared(toy_stream(), 12_000, 12_000).experiences
    first = exposure(experiences[:1], REPLAY, batch_size=256, rate=None)
    assert first.scope == {"experience-0": 256 / 12_000} and first.pool_size == 12_000
    second = exposure(experiences, REPLAY, batch_size=256, rate=None)
    assert second.scope == {"experience-0": 256 / 13_000, "experience-1": 256 / 13_000}
    assert (second.rate, second.pool_size) == (256 / 13_000, 13_000)


def test_only_what_is_used_is_exposed(toy_stream):
    experiences = declared(toy_stream(), 100, 300).experiences
    alone = exposure(experiences, Plan(), batch_size=30, rate=None)
    assert alone.scope == {"experience-1": 0.1} and alone.pool_size == 300
    joint = exposure(experiences, Plan(pool="all"), batch_size=40, rate=None)
    assert joint.scope == {"experience-0": 0.1, "experience-1": 0.1} and joint.pool_size == 400
    small = exposure(experiences, REPLAY, batch_size=30, rate=None)
    assert small.pool_size == 400  # a memory of 1,000 cannot hold more than the 100 there were


def test_a_rate_is_at_most_one_and_may_be_given(toy_stream):
    experiences = toy_stream().experiences
    assert exposure(experiences[:1], Plan(), batch_size=10_000, rate=None).rate == 1.0
    given_rate = exposure(experiences, REPLAY, batch_size=8, rate=0.25)
    assert given_rate.rate == 0.25 and set(given_rate.scope.values()) == {0.25}


# --------------------------------------------------------------------------- sampling


def test_without_privacy_an_epoch_is_a_permutation(bench):
    curator = bench(batch_size=7).open()
    sizes = [len(curator.sample(step)) for step in range(4)]
    assert sizes == [7, 7, 7, 3]
    epochs = [torch.cat([curator.sample(step).ids for step in range(4 * e, 4 * e + 4)]) for e in range(2)]
    assert all(torch.equal(ids.sort().values, curator.raw("a test").ids.sort().values) for ids in epochs)
    assert not torch.equal(*epochs)


def test_a_batch_is_a_function_of_seed_and_step(bench):
    first, again, other = (bench(seed=seed).open() for seed in (0, 0, 1))
    forth = [first.sample(step).ids for step in range(6)]
    back = [again.sample(step).ids for step in reversed(range(6))]
    assert all(torch.equal(a, b) for a, b in zip(forth, reversed(back), strict=True))
    assert not torch.equal(forth[0], other.sample(0).ids)


def test_memory_has_rows_of_its_own_in_every_batch(bench):
    test = bench(batch_size=6)
    plan = Plan(memory=MemoryPlan(capacity=10, batch_size=4))
    test.whole(0, plan)
    curator = test.open(1, plan)
    batch = curator.sample(0)
    assert batch.from_memory.tolist() == [False] * 6 + [True] * 4
    assert set(batch.tasks[:6].tolist()) == {1} and set(batch.tasks[6:].tolist()) == {0}
    assert set(batch.labels[:6].tolist()) <= {2, 3} and set(batch.labels[6:].tolist()) <= {0, 1}


def test_joint_pools_all_records_of_all_experiences(bench):
    curator = bench().open(1, Plan(pool="all"))
    assert torch.bincount(curator.raw("a test").tasks).tolist() == [24, 24]
    assert curator._held.pool.current.tasks.unique().tolist() == [1]


@pytest.mark.statistical
def test_poisson_inclusion_has_the_declared_rate(bench, toy_stream):
    """2,000 steps over 24 records at rate 1/4: the count's standard score stays within 4 (probability 6e-5), both
    per record (within 5, 24 x 6e-7) and in all; a rate 5 % off would score 6."""
    test = bench(simulated(), declared(toy_stream(), 32, 32))
    steps = range(2000)
    curator = test.open(0, steps=steps)
    counts, sizes = torch.zeros(2000), []
    for step in steps:
        ids = curator.sample(step).ids
        counts[ids] += 1
        sizes.append(float(len(ids)))

    def score(total, trials, rate):
        return float((total - trials * rate) / (trials * rate * (1 - rate)) ** 0.5)

    members = counts[curator._pool.ids]
    assert curator.exposure.rate == 8 / 32 and len(members) == 24  # declared 32, there are 24
    assert abs(score(members.sum(), 48_000, 0.25)) < 4
    assert max(abs(score(count, 2000, 0.25)) for count in members) < 5
    assert abs(score(members.sum(), 48_000, 0.25 * 1.05)) > 4 < abs(score(members.sum(), 48_000, 0.25 * 0.95))
    spread = torch.tensor(sizes).var() / (24 * 0.25 * 0.75)  # of a binomial; a fixed size would have none
    assert 0.85 < spread < 1.15


@pytest.mark.property
@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=25), st.floats(0.01, 1.0), st.integers(0, 99))
def test_a_record_enters_a_step_at_most_once_by_its_one_coin(ids, rate, seed):
    rows = torch.tensor(ids)
    grouped = copies(rows, torch.zeros_like(rows))
    assert sorted(grouped.order.tolist()) == list(range(len(ids)))
    coins = torch.rand(len(grouped.counts), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    drawn = rows[grouped.rows(coins < rate, coins[coins < rate] / rate)]
    assert drawn.tolist() == rows.unique()[coins < rate].tolist()


def test_the_largest_coin_below_the_rate_picks_the_last_row():
    coin = torch.tensor([torch.nextafter(torch.tensor(1.0).double(), torch.tensor(0.0).double())])
    assert copies(torch.tensor([5, 5, 5]), torch.zeros(3)).rows(coin < 1.0, coin).tolist() == [2]


@pytest.mark.statistical
@pytest.mark.parametrize("plan", [Plan(memory=MemoryPlan(capacity=100)), Plan(pool="all")])
def test_copies_of_one_image_are_one_record(bench, toy_data, plan):
    """Permuted copies, new, stored or pooled: one at most in a step, at the charged rate, each copy as often.

    400 steps over 48 records at rate 1/8: scores within 4 (6e-5 each).
    """
    test = bench(simulated(sampling_rate=0.125), permuted(toy_data, experiences=2))
    test.whole(0, plan)
    curator = test.open(1, plan, steps=range(400))
    assert len(curator._pool) == 96 and len(curator._pool.ids.unique()) == 48
    tasks = []
    for step in range(400):
        batch = curator.sample(step)
        assert len(batch.ids.unique()) == len(batch)
        tasks += batch.tasks.tolist()
    n = 400 * 48
    assert abs(len(tasks) - n / 8) < 4 * (n / 8 * 7 / 8) ** 0.5
    assert abs(sum(tasks) - len(tasks) / 2) < 4 * (len(tasks) / 4) ** 0.5


def test_one_id_for_two_records_of_an_experience_is_refused(bench, toy_stream):
    stream = toy_stream()
    train = stream[0].train
    doubled = replace(train, ids=torch.where(train.ids == train.ids[1], train.ids[0], train.ids))
    stream = replace(stream, experiences=(replace(stream[0], train=doubled), stream[1]))
    bench(stream=stream).open()
    with pytest.raises(PrivacyError, match=r"'experience-0' share an id.*its own id"):
        bench(simulated(), stream).open()


# --------------------------------------------------------------------------- gradients


def test_without_privacy_the_gradient_is_that_of_the_mean(bench):
    test = bench()
    batch = test.open().sample(0)
    loss = cross_entropy(Forward(test.model), batch, test.curator.context).mean()
    expected = torch.autograd.grad(loss, list(test.params.values()))
    for mine, theirs in zip(test.gradient(batch).values(), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_padding_does_not_count(bench):
    test = bench()
    batch = test.open().sample(0)
    padded = replace(batch, valid=torch.arange(len(batch)) < 3)
    for mine, theirs in zip(test.gradient(padded).values(), test.gradient(batch.take(slice(3))).values(), strict=True):
        torch.testing.assert_close(mine, theirs)


def flat(params):
    return torch.cat([value.detach().flatten() for value in params.values()])


def test_the_normaliser_is_the_declared_expectation(bench, toy_stream):
    """The same batch, noise nearly off, declared once as 24 and once as 48 records: half the step, whatever came."""
    tiny = simulated(noise_multiplier=1e-3, sampling_rate=0.5, clip_norm=0.5)
    steps = []
    for size in (24, 48):
        test = bench(tiny, declared(toy_stream(), size, size))
        curator = test.open(0, steps=range(1))
        steps.append(flat(test.gradient(curator._pool.take(slice(5)))))
        assert float(steps[-1].norm()) > 0.02
    noise = {"rtol": 1e-4, "atol": 3e-4}  # seven standard deviations of 1e-3 * 0.5 / 12
    torch.testing.assert_close(steps[1], steps[0] / 2, **noise)
    rows = bench()
    batch = rows.open().raw("a test").take(slice(5))
    by_hand = torch.zeros_like(steps[0])
    for i in range(5):
        one = flat(rows.gradient(batch.take(slice(i, i + 1))))
        by_hand += one * min(1.0, 0.5 / float(one.norm()))
    torch.testing.assert_close(steps[0], by_hand / 12, **noise)  # 0.5 * 24


def big_model(stream):
    from perdure.models import mlp

    return mlp(input_shape=stream.input_shape, num_classes=4, hidden=(1000,), seed=0)


def has_scale(noise, scale):
    """Whether the standard deviation of 10,000 normals is `scale` within 4 % (5.7 standard errors: 1e-8)."""
    return abs(float(noise.std()) / scale - 1) < 0.04


@pytest.mark.statistical
def test_an_empty_batch_still_adds_noise_of_the_stated_scale(bench, toy_stream):
    stream = toy_stream()
    test = bench(simulated(noise_multiplier=1.5, clip_norm=0.2), stream, big_model(stream))
    curator = test.open(0, steps=range(2))
    empty = curator._pool.take(slice(0))
    noise = flat(test.gradient(empty, 0)) * curator.exposure.rate * curator.exposure.pool_size
    assert len(noise) > 10_000 and has_scale(noise, 1.5 * 0.2) and abs(float(noise.mean())) < 0.02
    assert not has_scale(noise, 1.5 * 0.2 * 2 / 3) and not has_scale(noise, 1.5 * 0.2 * 3 / 2)
    other = flat(test.gradient(empty, 1)) * 8
    assert abs(float(torch.corrcoef(torch.stack([noise, other]))[0, 1])) < 0.05  # each step its own


@pytest.mark.statistical
def test_a_release_has_the_stated_noise_around_the_clipped_sum(bench, toy_stream):
    """Rows of norm 5, clipped to 0.3, all in one direction; noise 2 x 3 x 0.3 on each of 10,000 coordinates."""
    stream = toy_stream()
    test = bench(simulated(noise_multiplier=2.0, release_noise=3.0), stream)
    curator = test.open()

    def query(forward, batch):
        return torch.zeros(len(batch), 10_000).index_fill(1, torch.tensor([0]), 5.0)

    released = curator.release(query, clip_norm=0.3, purpose="test")["value"]
    noise = released - torch.zeros(10_000).index_fill(0, torch.tensor([0]), 24 * 0.3)
    assert has_scale(noise, 1.8) and abs(float(noise[0])) < 5 * 1.8
    assert not has_scale(noise, 1.8 * 2 / 3) and not has_scale(noise, 1.8 * 3 / 2)
    entry = test.ledger.entries[-1]
    assert entry.noise_multiplier == 6.0 and entry.clip_norm == 0.3 and entry.scope == {"experience-0": 1.0}
    assert (entry.purpose, entry.sampling, entry.steps) == ("release:test", "none", 1)


# --------------------------------------------------------------------------- charge first, or nothing


def test_a_step_is_charged_before_its_noise_is_drawn(bench):
    test = bench(simulated())
    curator = test.open(0, steps=range(3))
    assert test.trace == ["ledger.before-append", "ledger.appended", "ledger.head-written"]
    test.gradient(curator.sample(0), 0)
    assert test.trace[3:] == ["noise.drawn"]
    (entry,) = test.ledger.entries
    assert (entry.first_step, entry.steps, entry.scope) == (0, 3, {"experience-0": 8 / 24}) and entry.simulated


def test_a_release_is_charged_before_its_noise_is_drawn(bench):
    test = bench(simulated())
    test.open().release(lambda forward, batch: batch.inputs, clip_norm=1.0, purpose="mean")
    assert test.trace == ["ledger.before-append", "ledger.appended", "ledger.head-written", "noise.drawn"]


def test_a_step_that_was_not_charged_is_refused(bench):
    test = bench(simulated())
    curator = test.open(0, steps=range(2, 4))
    for step in (0, 4):
        with pytest.raises(PrivacyError, match=f"step {step} was not charged.*reserve"):
            curator.sample(step)
        with pytest.raises(PrivacyError, match=f"step {step} was not charged"):
            test.gradient(curator._pool, step)
    assert "noise.drawn" not in test.trace


def test_the_reservation_of_one_experience_does_not_pay_for_the_next(bench):
    test = bench(simulated())
    test.whole(0, REPLAY, steps=range(2))
    curator = test.open(1, REPLAY)
    with pytest.raises(PrivacyError, match="step 0 was not charged"):
        test.gradient(curator._pool, 0)


def test_two_releases_of_one_purpose_are_two_charges_with_noise_of_their_own(bench):
    test = bench(simulated())
    curator = test.open()
    queries = (lambda forward, batch: batch.inputs, lambda forward, batch: 1 - batch.inputs)
    first, second = (curator.release(query, clip_norm=10.0, purpose="mean")["value"] for query in queries)
    assert [entry.purpose for entry in test.ledger.entries] == ["release:mean"] * 2
    records = test.stream[0].train.inputs
    noise = torch.stack([first - records.sum(0), second - (1 - records).sum(0)])
    assert float((noise[0] - noise[1]).abs().min()) > 0.1
    assert test.trace.count("noise.drawn") == test.trace.count("ledger.head-written") == 2


def test_the_same_release_asked_again_after_a_restart_is_not_charged_again(bench):
    test = bench(simulated())
    answers = [
        test.open().release(lambda forward, batch: batch.inputs, clip_norm=1.0, purpose="mean")["value"] for _ in "ab"
    ]
    assert torch.equal(*answers) and len(test.ledger.entries) == 1


def test_other_records_never_meet_the_same_noise(bench, toy_stream):
    stream = toy_stream()
    answers = []
    for shift in (0.0, 1e-3):
        moved = replace(stream[0].train, inputs=stream[0].train.inputs + shift)
        test = bench(simulated(), replace(stream, experiences=(replace(stream[0], train=moved), stream[1])))
        answers.append(test.open().release(lambda f, b: b.inputs, clip_norm=1e-6, purpose="mean")["value"])
    assert float((answers[0] - answers[1]).abs().max()) > 1e-6  # clipped to nearly nothing: this is noise


def test_an_empty_partition_still_gives_noise(bench, toy_stream):
    stream = declared(toy_stream(), 24, 24)
    nobody = replace(stream[0].train.take(torch.zeros(0, dtype=torch.int64)), declared_size=24)
    test = bench(simulated(), replace(stream, experiences=(replace(stream[0], train=nobody), stream[1])))
    curator = test.open(0, steps=range(1))
    batch = curator.sample(0)
    assert len(batch) == 0
    with pytest.raises(PrivacyError, match="step 0 was drawn already; rows of a step are for the loop"):
        curator.sample(0)
    released = curator.release(lambda f, b: {"x": b.inputs, "n": b.labels.float()}, clip_norm=1.0, purpose="sums")
    assert released["x"].shape == (5,) and released["n"].shape == () and bool((released["x"] != 0).all())
    assert float(flat(test.gradient(batch, 0)).abs().min()) > 0


# --------------------------------------------------------------------------- raw records and memory


def test_raw_records_are_refused_under_privacy(bench):
    assert len(bench().open().raw("a plot")) == 24
    with pytest.raises(PrivacyError, match=r"raw records were asked for \(a plot\).*curator.release"):
        bench(simulated()).open().raw("a plot")
    closed = bench()
    with pytest.raises(PrivacyError, match="no open experience; call open"):
        closed.curator.raw("nothing")
    closed.open().close()
    with pytest.raises(PrivacyError, match="no open experience"):
        closed.curator.raw("the past")


def test_what_memory_stores_beside_a_row_comes_back_with_it(bench):
    """The model's logits at the time, as DER stores them; new rows have zeros in their place."""
    test = bench(batch_size=6)
    plan = Plan(memory=MemoryPlan(capacity=8))
    test.whole(0, plan, remember=lambda forward, batch: {"logits": forward(batch.inputs)})
    batch = test.open(1, plan).sample(0)
    replayed = batch.from_memory
    expected = test.model(batch.inputs[replayed]).detach()
    torch.testing.assert_close(batch.stored["logits"][replayed], expected)
    assert batch.stored["logits"][~replayed].abs().sum() == 0 and len(expected) == 6
    test.finish(lambda forward, batch: {"logits": forward(batch.inputs) + 1})
    rows = test.curator._held.memory.rows
    torch.testing.assert_close(rows.stored["logits"], test.model(rows.inputs).detach() + (rows.tasks == 1)[:, None])


def test_under_privacy_memory_is_by_coin_at_the_declared_threshold(bench, toy_stream):
    plan = Plan(memory=MemoryPlan(capacity=30))
    test = bench(simulated(), declared(toy_stream(), 40, 60))
    tags = {int(i): float(test.mechanism.tags(torch.tensor([i]))) for i in range(48)}
    for index, threshold in ((0, 30 / 40), (1, 30 / 100)):
        test.whole(index, plan)
        kept = set(test.curator._held.memory.rows.ids.tolist())
        offered = torch.cat([e.train.ids for e in test.stream.experiences[: index + 1]]).tolist()
        assert kept == {i for i in offered if tags[i] < threshold}
    assert test.curator._held.memory.offered == 100


def test_class_balance_of_memory_without_privacy(bench):
    test = bench()
    for index in range(2):
        test.whole(index, Plan(memory=MemoryPlan(capacity=12)))
    assert torch.bincount(test.curator._held.memory.rows.labels).tolist() == [3, 3, 3, 3]


def test_split_streams_have_disjoint_partitions(toy_data):
    stream = split(toy_data, scenario="class", experiences=2)
    assert isinstance(stream[0].train, Records)
    assert not set(stream[0].train.ids.tolist()) & set(stream[1].train.ids.tolist())


def test_equal_ids_in_two_partitions_are_two_records():
    """One of them missing must not hand its place to the other, which is another record."""
    ids, owner = torch.tensor([7, 7, 8, 7]), torch.tensor([0, 1, 0, 0])
    grouped = copies(ids, owner)
    assert grouped.ids.tolist() == [7, 7, 8] and grouped.counts.tolist() == [2, 1, 1]
    assert sorted(grouped.order[:2].tolist()) == [0, 3] and grouped.order[2:].tolist() == [1, 2]
