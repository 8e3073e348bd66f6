"""Steps, memories and references that draw no record or one record.

No code may fail on the one and run on the other: an error after the charge would reveal that a
record exists.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import nn

from perdure.adversarial import FGSM, PGD
from perdure.contract.context import Context
from perdure.contract.strategy import Strategy
from perdure.data.augmentation import Views, shift_and_flip
from perdure.data.domain import InputDomain
from perdure.data.experience import Experience, Stream
from perdure.data.records import Batch, Records
from perdure.errors import DataError, GuardError
from perdure.learner.learner import Learner
from perdure.learner.loss_path import LossPath
from perdure.models import cnn
from perdure.privacy.settings import Privacy
from perdure.strategies import AGEM, DER, EWC, GEM, Naive, Replay

SHAPE = (1, 8, 8)
CLASSES = (0, 1)


class ByShape(nn.Module):
    """A model that fails without rows, as models do that leave one size to `view`."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 8)
        self.head = nn.Linear(8, 2)

    def features(self, x):
        return torch.tanh(self.body(x.view(x.shape[0], -1)))

    def forward(self, x):
        return self.head(self.features(x))


def by_modules():
    """Return a model of listed modules that fails without rows."""
    return nn.Sequential(
        nn.Unflatten(1, (-1, 1)), nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 2)
    )


def pictures():
    return cnn(input_shape=SHAPE, num_classes=2, seed=0)


def records(n, first, partition, size):
    place = torch.Generator().manual_seed(first)
    return Records(
        inputs=torch.rand(n, *SHAPE, generator=place),
        labels=torch.randint(0, 2, (n,), generator=place),
        ids=torch.arange(first, first + n),
        partition=partition,
        declared_size=size,
    )


def stream_of(*sizes, declared=4):
    """Return a stream with one experience for each given number of records."""
    experiences = tuple(
        Experience(
            index=i,
            train=records(n, 100 * i, f"experience-{i}", declared),
            test=records(4, 900, "test", 4),
            classes=CLASSES,
        )
        for i, n in enumerate(sizes)
    )
    return Stream(
        name="few",
        scenario="domain",
        num_classes=2,
        input_shape=SHAPE,
        assigned_by_record=True,
        experiences=experiences,
    )


def learner(model, strategy=None, **changes):
    privacy = {"noise_multiplier": 1.0, "delta": 1e-3, "seed": 0} | changes.pop("privacy", {})
    torch.manual_seed(0)
    return Learner(
        model=model(),
        strategy=strategy or Naive(),
        optimizer=partial(torch.optim.SGD, lr=0.01),
        **({"iterations": 2, "batch_size": 4} | changes),
        privacy=Privacy(**privacy),
    )


def spent(made, stream):
    """Return the charges of a run; errors of the run are raised."""
    made.fit(stream)
    return [(entry.purpose, entry.steps) for entry in made.private_sum.ledger.entries]


shifted = Views(count=2, change=shift_and_flip(pixels=1, flip=True))
drawn = Views(count=2, change=lambda x: x + 0.1 * torch.rand_like(x))
STEPS = {
    "nothing beside": (ByShape, {}),
    "views": (pictures, {"views": shifted}),
    "views, a forward pass of the user": (ByShape, {"views": drawn}),
    "views, record by record": (
        ByShape,
        {"views": drawn, "privacy": {"custom_forward": "record-by-record"}},
    ),
    "adversary": (ByShape, {"adversary": PGD(epsilon=0.1, steps=2)}),
    "adversary, known modules": (by_modules, {"adversary": FGSM(epsilon=0.1)}),
    "views, correlated noise": (
        pictures,
        {"views": shifted, "batch_size": 2, "privacy": {"bands": 2}},
    ),
    "raw diagnostics": (ByShape, {"views": drawn, "privacy": {"diagnostics": "raw"}}),
    "adversary, by layers": (
        ByShape,
        {"adversary": FGSM(epsilon=0.1), "privacy": {"clipping": "per-layer"}},
    ),
    "micro-batches": (ByShape, {"views": drawn, "micro_batch_size": 1}),
}


DEEP = pytest.mark.deep(reason="full replay: every kind of step and memory, without records")
SHORT = {
    "views",
    "views, record by record",
    "adversary",
    "views, correlated noise",
    "raw diagnostics",
    "logits",
    "one reference",
}


def some_deep(names):
    """Return parameters, of which those outside the short suite are marked deep."""
    return [pytest.param(name, marks=() if name in SHORT else DEEP) for name in names]


@pytest.mark.parametrize("what", some_deep(STEPS))
def test_a_step_without_records_runs_at_the_same_privacy_cost(what):
    model, changes = STEPS[what]
    there, missing = (spent(learner(model, **changes), stream_of(n)) for n in (1, 0))
    assert there == missing and there


MEMORIES = {
    "logits": DER(memory_size=6),
    "rows": Replay(memory_size=6),
    "one reference": AGEM(memory_size=6),
    "one reference per experience": GEM(memory_size=6),
    "a Fisher matrix": EWC(strength=1.0),
}


@pytest.mark.parametrize("model", [ByShape, pytest.param(by_modules, marks=DEEP)])
@pytest.mark.parametrize("what", some_deep(MEMORIES))
def test_an_experience_without_records_has_equal_privacy_cost(what, model):
    there, first, last = (
        spent(learner(model, MEMORIES[what]), stream_of(*sizes))
        for sizes in ((1, 1), (0, 1), (1, 0))
    )
    assert there == first == last and there


def test_stored_values_of_an_empty_sample_keep_names_and_shapes():
    """The rows of the next experience are added to them."""
    made = learner(ByShape, DER(memory_size=6))
    made.fit(stream_of(0, 4))
    stored = made.session.held.memory.rows.stored
    assert [(name, value.shape[1:]) for name, value in stored.items()] == [("logits", (2,))]


@pytest.mark.parametrize("n", [0, 1, 3])
def test_user_code_never_gets_a_private_batch_of_few_rows(n):
    seen = []

    class Watching(ByShape):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    @dataclass(frozen=True, kw_only=True)
    class Watched(FGSM):
        def perturb(self, losses, inputs, *, generator=None):
            seen.append(len(inputs))
            return super().perturb(losses, inputs, generator=generator)

    made = learner(Watching, adversary=Watched(epsilon=0.1))
    made.prepare(stream_of(n))
    made.begin(0)
    made.callbacks = [lambda point, _: seen.clear() if point == "step.sampled" else None]
    made.train(range(2))
    assert all(rows >= 16 for rows in seen) and bool(seen) == (n > 0)


def test_a_record_is_attacked_alike_in_small_and_large_batches():
    """A rounding difference in the sign of a gradient would move an input by twice epsilon."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.InstanceNorm2d(16),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    place = torch.Generator().manual_seed(1)
    inputs = torch.randn(4, 3, 12, 12, generator=place)
    inputs += 1e9 * (1 + 1e-3 * torch.rand(4, 1, 1, 1, generator=place))
    batch = Batch.current(Records(inputs=inputs, labels=torch.zeros(4).long()), 0)

    every = torch.ones(1, 10).bool()
    context = Context(scenario="domain", experience=0, task_classes=every, seen=every[0])

    def attacked(rows):
        path = LossPath(strategy=Naive(), adversary=FGSM(epsilon=1e6, bounds=None))
        return path.changed(
            rows,
            lambda forward, rows: forward(rows.inputs).square().sum(1),
            model,
            dict(model.named_parameters()),
            seed_of=lambda purpose: 0,
            watched=nullcontext,
            private=True,
            context=context,
        ).inputs

    whole = attacked(batch)
    for n in range(1, 4):
        assert torch.equal(attacked(batch.take(slice(0, n))), whole[:n])


# --------------------------------------------------------------------------- before any charge


def branching(x):
    return x if float(x.sum()) > 0 else -x


@dataclass(frozen=True, kw_only=True)
class Counting(FGSM):
    """An attack that fails on fewer than 17 rows."""

    def perturb(self, losses, inputs, *, generator=None):
        if len(inputs) < 17:
            raise ValueError("too few rows")
        return super().perturb(losses, inputs, generator=generator)


@dataclass(frozen=True, kw_only=True)
class Forgetful(Strategy):
    """A strategy that stores values that need more than one record."""

    def plan(self, experience):
        return DER(memory_size=4).plan(experience)

    def remember(self, forward, batch, state):
        return {"mark": torch.ones(len(batch)) * float(batch.inputs.sum())}


BROKEN = {
    "a view": (
        {"views": Views(count=1, change=branching)},
        r"under the views fails|a step fails|views.change fails",
    ),
    "an adversary": ({"adversary": Counting(epsilon=0.1)}, "too few rows"),
    "a memory": ({"strategy": Forgetful()}, "each record alone"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_failures_on_few_records_are_refused_before_any_charge(what):
    changes, message = BROKEN[what]
    made = learner(ByShape, **changes)
    with pytest.raises(Exception, match=message) as caught:
        made.prepare(stream_of(4))
    assert isinstance(caught.value, GuardError) or what != "an adversary"
    with pytest.raises(Exception, match="prepare"):
        made.private_sum  # noqa: B018  # nothing was opened, so nothing can have been charged


def test_a_reference_that_fails_on_one_record_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Picky(AGEM):
        def references(self, curator, params, state):
            def losses(forward, batch):
                values = forward(batch.inputs).square().sum(1)
                if values.requires_grad and len(batch) < 17:
                    raise ValueError("too few rows")
                return values

            return (curator.reference(losses, params),)

    made = learner(ByShape, Picky(memory_size=4))
    with pytest.raises(GuardError, match=r"the losses of 'reference' fails.*too few rows"):
        made.fit(stream_of(4, 4))
    charged = [entry.purpose for entry in made.private_sum.ledger.entries]
    assert "reference" not in charged


def test_batches_are_not_padded_without_privacy():
    seen = []

    def view(x):
        return x

    class Watching(ByShape):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    made = replace(
        learner(Watching, views=Views(count=1, change=view), batch_size=2),
        privacy=None,
    )
    made.prepare(stream_of(3))
    made.begin(0)
    seen.clear()
    made.train(range(2))
    assert set(seen) <= {1, 2}


@pytest.mark.parametrize("strategy", [Naive(), Replay(memory_size=4)], ids=["naive", "replay"])
@pytest.mark.parametrize("empty", [0, 1])
def test_an_experience_without_records_is_refused_in_one_line(strategy, empty):
    sizes = [4, 4]
    sizes[empty] = 0
    with pytest.raises(DataError, match=rf"experience {empty} has no training records.*leave it"):
        learner(ByShape, strategy).fit(stream_of(*sizes, declared=0))
    made = replace(learner(ByShape, strategy), privacy=None)
    with pytest.raises(DataError, match=rf"experience {empty} has no training records.*leave it"):
        made.fit(stream_of(*sizes, declared=0))


def test_an_experience_of_a_declared_size_may_be_empty():
    domain = InputDomain(shape=SHAPE, range=(0.0, 1.0))
    parts = [replace(each, train=replace(each.train, domain=domain)) for each in stream_of(4, 0)]
    made = learner(ByShape, Replay(memory_size=4))
    matrix = made.fit(replace(stream_of(4, 0), experiences=tuple(parts)))
    assert matrix.isfinite().all()
