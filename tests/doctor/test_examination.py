"""Examination before training: every rule names its fault, and is silent on a sound set-up."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from perdure.data import Experience, InputDomain, Records, Stream, load, split
from perdure.doctor import Case, examine, rules
from perdure.doctor.case import public_part
from perdure.doctor.examination import examined
from perdure.doctor.finding import CAUSES
from perdure.errors import ConfigError, PrivacyError
from perdure.explain import KernelSHAP
from perdure.models import lstm, mlp
from perdure.privacy import Privacy
from perdure.tasks import MultiLabel, Regression
from perdure.tasks.losses import BalancedSoftmax, GeneralisedCrossEntropy

ROWS = 240
CLASSES = 3
PRIVATE = Privacy(noise_multiplier=1.0, seed=0)
SGD = partial(torch.optim.SGD, lr=0.1)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stream_of(inputs, labels, *, classes=CLASSES, domain=None, declared=200, task=None):
    """One experience; every fifth record is a test record."""
    ids = torch.arange(len(inputs))
    known = {} if task is None else {"task": task}
    train, test = (
        Records(
            inputs=inputs[rows],
            labels=labels[rows],
            ids=ids[rows],
            partition=name,
            declared_size=size,
            domain=domain,
            **known,
        )
        for name, rows, size in (("a", ids % 5 > 0, declared), ("a-test", ids % 5 == 0, 0))
    )
    one = Experience(index=0, train=train, test=test, classes=tuple(range(classes)))
    return Stream(
        name="blobs",
        scenario="domain",
        experiences=(one,),
        num_classes=classes,
        input_shape=tuple(inputs.shape[1:]),
        assigned_by_record=True,
    )


LABELS = torch.arange(ROWS) % CLASSES
INPUTS = 2 * torch.eye(8)[LABELS] + 0.3 * numbers(ROWS, 8)
SHUFFLED = LABELS[torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))]
BLOBS = stream_of(INPUTS, LABELS)
SKEWED = torch.where(torch.arange(ROWS) % 37 == 1, 1, 0)
WITH_MISSING = INPUTS.clone().index_fill_(0, torch.arange(0, ROWS, 7), torch.nan)
WITH_PLACEHOLDER = INPUTS.clone()
WITH_PLACEHOLDER[::7, 3] = -999.0


def model(**options):
    """MLP (8) -> (3) with one hidden layer."""
    given = {"input_shape": (8,), "num_classes": CLASSES, "hidden": (16,), "seed": 0} | options
    return mlp(**given)


def scaled(made, factor):
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(factor)
    return made


def frozen(made, part):
    getattr(made, part).requires_grad_(False)
    return made


def half_listed(made):
    return {"model": made, "optimizer": torch.optim.SGD(made.head.parameters(), lr=0.1)}


class Detached(nn.Module):
    """Model whose head does not see the gradient of its body, and whose bias is all it trains."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.arange(CLASSES) / 2)

    def forward(self, x):
        return self.bias.expand(len(x), -1)


class Recurrent(nn.Module):
    """Plain recurrent model, whose state is the same for all records at first."""

    def __init__(self):
        super().__init__()
        self.inputs = nn.Linear(1, 8)
        self.state = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        state = x.new_zeros(len(x), 8)
        for now in self.inputs(x.unsqueeze(-1)).unbind(1):
            state = torch.tanh(now + self.state(state))
        return self.head(state)


TOKENS = InputDomain(shape=(4,), dtype=torch.int64, vocabulary=9)
OF_TOKENS = stream_of(torch.arange(ROWS * 4).view(ROWS, 4) % 9, LABELS, domain=TOKENS)
UNIT = InputDomain(shape=(8,), range=(0.0, 1.0))


def embedded(tokens):
    return nn.Sequential(nn.Embedding(tokens, 2), nn.Flatten(), nn.Linear(8, CLASSES))


def of_numbers(scale):
    targets = scale * INPUTS.sum(1, keepdim=True)
    return {"stream": stream_of(INPUTS, targets, classes=1, task=Regression())}


def of_tags():
    return stream_of(INPUTS, (INPUTS[:, :CLASSES] > 0).float(), task=MultiLabel())


TEN = stream_of(INPUTS, torch.arange(ROWS) % 10, classes=10, declared=400)

HALVES = {
    "stream": split(load("digits"), scenario="class", experiences=2),
    "model": mlp(input_shape=(1, 8, 8), num_classes=10, hidden=(64, 64), seed=0),
    "iterations": 60,
}
"""A first experience of five classes of ten."""


def of_padded(padding):
    """Sequences of 4 tokens and 8 of padding, and an LSTM that knows the padding or not."""
    rows = torch.cat([1 + LABELS[:, None].expand(-1, 4), torch.zeros(ROWS, 8).long()], 1)
    made = lstm(
        input_shape=(12,), num_classes=CLASSES, vocabulary=4, padding=padding, hidden=8, seed=0
    )
    return {"stream": stream_of(rows, LABELS), "model": made}


FAULTS = {
    "unscaled_input": [
        {"stream": stream_of(80 * INPUTS, LABELS)},
        {"stream": stream_of(1e-4 * INPUTS, LABELS)},
        {"privacy": PRIVATE, "stream": stream_of(80 * INPUTS, LABELS)},
    ],
    "missing_values": [
        {"stream": stream_of(WITH_MISSING, LABELS)},
        {"stream": stream_of(WITH_PLACEHOLDER, LABELS)},
    ],
    "input_domain": [
        {"stream": stream_of(INPUTS, LABELS, domain=UNIT)},
        {"stream": OF_TOKENS, "model": embedded(5)},
    ],
    "label_range": [
        {"model": model(num_classes=2)},
        {"stream": stream_of(INPUTS, LABELS + 1, classes=4), "model": model(num_classes=4)},
        of_numbers(100.0) | {"model": model(num_classes=1)},
    ],
    "softmax_twice": [
        {"model": nn.Sequential(model(), nn.Softmax(1))},
        {"model": nn.Sequential(model(), nn.Softmax(1)), "loss": nn.CrossEntropyLoss()},
        {"model": nn.Sequential(model(), nn.Sigmoid()), "stream": of_tags()},
    ],
    "frozen_parameters": [
        {"model": frozen(model(), "head")},
        {"model": frozen(model(), "body")},
        {"model": frozen(frozen(model(), "body"), "head")},
    ],
    "unlisted_parameters": [half_listed(model())],
    "cannot_overfit": [{"model": Detached()}],
    "shuffled_labels": [{"stream": stream_of(INPUTS, SHUFFLED)}],
    "class_imbalance": [{"stream": stream_of(INPUTS, SKEWED, classes=2)}],
    "learning_rate_range": [
        {"optimizer": partial(torch.optim.SGD, lr=100.0)},
        {"optimizer": partial(torch.optim.SGD, lr=1e-6)},
        {"optimizer": partial(torch.optim.SGD, lr=1e-5), "privacy": PRIVATE},
        HALVES | {"optimizer": partial(torch.optim.Adam, lr=3.0)},
    ],
    "memory_need": [{"batch_size": 10**12}],
    "compute_need": [{"iterations": 10**16}],
    "large_model": [{"model": nn.Linear(2**15, 2**14, device="meta")}],
    "narrow_features": [{"model": model(num_classes=10, hidden=(2,)), "stream": TEN}],
    "few_records": [{"stream": stream_of(INPUTS, LABELS, declared=20)}],
    "few_samples": [{"explainer": KernelSHAP(samples=8)}],
    "read_padding": [of_padded(None)],
    "initial_variance": [
        {"model": scaled(model(hidden=(16, 16)), 30.0)},
        {"model": scaled(model(hidden=(16, 16)), 0.01)},
        {"model": scaled(model(), 0.0)},
    ],
    "batch_statistics": [{"model": nn.Sequential(nn.BatchNorm1d(8), model()), "privacy": PRIVATE}],
    "undeclared_size": [{"privacy": PRIVATE, "stream": stream_of(INPUTS, LABELS, declared=0)}],
    "weak_signal": [{"privacy": Privacy(noise_multiplier=80.0, seed=0)}],
    "raw_diagnostics": [{"privacy": replace(PRIVATE, diagnostics="raw")}],
    "private_step_size": [
        {"privacy": PRIVATE, "optimizer": partial(torch.optim.SGD, lr=50.0)},
        {"privacy": PRIVATE, "optimizer": partial(torch.optim.SGD, lr=1e-5)},
    ],
}
HEALTHY = {
    "plain": {},
    "private": {"privacy": PRIVATE},
    "tiny": {"model": model(hidden=(3,))},
    "tanh": {"model": model(hidden=(16, 16, 16), activation="tanh")},
    "tokens": {"stream": OF_TOKENS, "model": embedded(9)},
    "recurrent": {"model": Recurrent()},
    "regression": of_numbers(0.3) | {"model": model(num_classes=1)},
    "tags": {"stream": of_tags()},
    "padded": of_padded(0),
    "explained": {"explainer": KernelSHAP()},
    "untested": {"stream": BLOBS.with_test(0, BLOBS[0].test.take(slice(0, 0))), "privacy": PRIVATE},
}
QUICK = ["cannot_overfit", "memory_need", "initial_variance", "softmax_twice"]
SOUND = {"model": model(), "stream": BLOBS, "optimizer": SGD, "batch_size": 32, "iterations": 15}


def case(**changes):
    return Case(**SOUND | changes)


@pytest.mark.parametrize(
    ("rule", "changes"),
    [(rule, changes) for rule, group in FAULTS.items() for changes in group],
    ids=[f"{rule}-{i}" for rule, group in FAULTS.items() for i in range(len(group))],
)
def test_each_rule_names_its_fault(rule, changes):
    (found,) = examined(case(**changes), chosen=[rule])
    assert found.rule == rule.replace("_", " ")
    assert found.cause in CAUSES
    assert found.remedy.advice
    assert found.source


@pytest.mark.parametrize("name", HEALTHY)
def test_no_rule_has_a_finding_for_a_sound_training(name):
    names = [rule for rule in rules.names() if rule != "learning_rate_range" or name == "plain"]
    assert [str(each) for each in examined(case(**HEALTHY[name]), chosen=names)] == []


def test_every_examining_rule_has_a_fault_and_a_docstring():
    examining = {
        name for name in rules.names() if rules.find(name).examine is not rules.Rule.examine
    }
    assert examining == set(FAULTS)
    for name in examining:
        told = rules.find(name).__doc__
        assert all(f"{word}:" in told for word in ("Symptom", "Remedy", "Source")), name


@pytest.mark.parametrize(("rate", "threshold"), [(3.0, [0.9]), (0.03, []), (0.003, [])])
def test_a_fall_to_a_guess_of_few_classes_is_no_progress(rate, threshold):
    optimizer = partial(torch.optim.Adam, lr=rate)
    found = examined(case(**HALVES, optimizer=optimizer), chosen=["learning_rate_range"])
    assert [each.threshold for each in found] == threshold
    assert all(each.remedy.changes["training.learning_rate"] <= rate / 10 for each in found)


def test_samples_are_compared_with_superpixels():
    images = stream_of(INPUTS[:, :1, None, None].expand(-1, 1, 8, 8), LABELS)

    def found(**options):
        explained = case(stream=images, explainer=KernelSHAP(**options))
        return [each.remedy.changes for each in examined(explained, chosen=["few_samples"])]

    assert found(samples=200) == [{"explain.samples": 2176}]
    assert found(samples=200, cells=2) == []
    assert found(samples=14, cells=2) == []
    assert found(samples=12, cells=2) == [{"explain.samples": 14}]


def test_a_loss_that_balances_classes_needs_no_other():
    skewed = stream_of(INPUTS, SKEWED, classes=2)
    chosen = ["class_imbalance"]
    assert examined(case(stream=skewed, loss=GeneralisedCrossEntropy()), chosen=chosen)
    assert not examined(case(stream=skewed, loss=BalancedSoftmax()), chosen=chosen)


def test_an_examination_uses_the_given_thresholds():
    small_device = rules.find("memory_need")(available=1_000)
    found = examine(SOUND["model"], BLOBS, batch_size=32, iterations=15, rules=[small_device])
    assert [each.rule for each in found] == ["memory need"]


def test_findings_are_in_the_order_of_repair():
    found = examine(
        nn.Sequential(scaled(model(), 0.0), nn.Softmax(1)),
        stream_of(80 * INPUTS, LABELS),
        optimizer=SGD,
        privacy=Privacy(noise_multiplier=80.0, seed=0),
        batch_size=32,
        epochs=1,
        trials=False,
    )
    causes = [CAUSES.index(each.cause) for each in found]
    assert causes == sorted(causes)
    assert len(set(causes)) >= 3


def test_a_finding_that_another_one_explains_is_left_out():
    slow = partial(torch.optim.SGD, lr=1e-6)
    wrong = case(stream=stream_of(80 * INPUTS, LABELS), optimizer=slow, iterations=3)
    names = ["learning_rate_range", "unscaled_input"]
    assert [each.rule for each in examined(wrong, chosen=names)] == ["unscaled input"]
    assert len(examined(wrong, chosen=names[:1])) == 1


def test_the_case_of_a_private_training_holds_no_training_record():
    made = case(privacy=PRIVATE)
    assert len(made.stream[0].train) == 0
    assert made.stream[0].train.declared_size == 200
    assert made.origin == "public test records"


def test_private_findings_do_not_depend_on_training_records():
    """Training inputs are NaN and training labels are equal, which a rule that read them tells."""
    wrong = stream_of(INPUTS, LABELS)
    train = wrong[0].train
    spoilt = replace(
        train, inputs=torch.full_like(train.inputs, torch.nan), labels=train.labels * 0
    )
    stream = replace(wrong, experiences=(replace(wrong[0], train=spoilt),))
    assert examined(case(stream=stream, privacy=PRIVATE, optimizer=None)) == ()
    sound = case(privacy=PRIVATE, iterations=3)
    rate = ["learning_rate_range"]
    assert examined(replace(sound, stream=stream), chosen=rate) == examined(sound, chosen=rate)
    assert examined(case(stream=stream), trials=False) != ()


def test_the_examination_does_not_change_model_or_generator():
    made = model()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    state = torch.get_rng_state()
    once = examined(case(model=made), chosen=QUICK)
    assert examined(case(model=made), chosen=QUICK) == once
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert made.training
    assert all(value.grad is None for value in made.parameters())


@pytest.mark.parametrize("changes", [{"model": "mlp"}, {"stream": None}])
def test_a_case_of_something_else_is_refused(changes):
    with pytest.raises(ConfigError, match="is not allowed"):
        case(**changes)


def learnt_test():
    """A stream whose test records are its training records."""
    return replace(BLOBS, experiences=(replace(BLOBS[0], test=BLOBS[0].train),))


def test_private_records_are_not_read_as_test_records():
    with pytest.raises(PrivacyError, match="test records of stage 0 are training records"):
        examine(model(), learnt_test(), privacy=PRIVATE)
    with pytest.raises(PrivacyError, match="test records of stage 0 are training records"):
        public_part(learnt_test())


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "mse"},
        {"optimizer": "sgd"},
        {"privacy": "strict"},
        {"strategy": "ewc"},
        {"batch_size": 0},
        {"batch_size": "32"},
        {"epochs": -1},
        {"epochs": 1, "iterations": 3},
        {"loss": lambda outputs, targets: None},
        {"loss": lambda outputs, targets: 1 / 0},
        {"model": nn.Linear(3, 3)},
    ],
)
def test_the_examination_refuses_what_it_cannot_use(changes):
    given = {"model": model(), "stream": BLOBS, "optimizer": SGD} | changes
    with pytest.raises(ConfigError, match=r"not allowed|cannot be applied") as caught:
        examine(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda data: data, False),
        (lambda data: replace(data, train=replace(data.train, size_published=False)), True),
    ],
    ids=["published", "own"],
)
def test_the_size_of_a_published_data_set_needs_no_declaration(change, named):
    stream = split(change(load("digits")), experiences=2, scenario="class")
    model = mlp(input_shape=stream.input_shape, num_classes=stream.num_classes, seed=0)
    found = examine(model, stream, privacy=PRIVATE, iterations=10, rules=["undeclared_size"])
    assert [each.rule for each in found] == ["undeclared size"] * named
