"""Stored verdicts of the guard: equal learners share a verdict, changed parts are inspected.

Inspections are counted by the matrix products of a linear layer during `prepare`.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.learners import SIMULATED
from perdure.adversarial import FGSM
from perdure.contract.forward import Forward
from perdure.data import InputDomain
from perdure.errors import GuardError
from perdure.learner.known_verdicts import MOST, VERDICTS, UnknownKindError, described
from perdure.learner.private_setup import reached
from perdure.models import mlp
from perdure.privacy import Adaptive
from perdure.strategies import EWC, LUCIR, LwF, Naive, Replay
from perdure.tasks import SingleLabel, single_label


class Products(TorchDispatchMode):
    """Count the matrix products with a weight."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.addmm.default
        return func(*args, **(kwargs or {}))


def looks(learner, stream):
    """Return the number of products of the guard while the learner is prepared, without model
    checks.
    """
    with Products() as products:
        learner.prepare(stream)
    return products.count


@pytest.fixture(autouse=True)
def _none_known():
    VERDICTS.forget()
    yield
    VERDICTS.forget()


@pytest.fixture
def known(learner_of, toy_stream):
    """Return the products of a first and of a repeated inspection, and a maker of equal
    learners.
    """
    stream = toy_stream()

    def make(**changes):
        return learner_of(**{"strategy": EWC(strength=1.0), "privacy": SIMULATED} | changes)

    first = looks(make(), stream)
    again = looks(make(), stream)
    return first, again, make, stream


def test_the_guard_inspects_equal_learners_once(known):
    first, again, _, _ = known
    assert again <= 4 < 100 < first


def test_a_guard_verdict_is_reused_for_other_declared_sizes(known):
    _, again, make, stream = known
    sizes = [replace(e, train=e.train.declared(40 + e.index)) for e in stream]
    other = replace(stream, experiences=tuple(sizes))
    assert looks(make(client=3), other) == again


def test_losses_using_the_declared_size_are_inspected_per_size(learner_of, toy_stream):
    stream = toy_stream()
    sizes = [replace(e, train=e.train.declared(40 + e.index)) for e in stream]
    other = replace(stream, experiences=tuple(sizes))

    def cosine(of):
        model = mlp(input_shape=(5,), num_classes=4, hidden=(6,), seed=3, head="cosine")
        learner = learner_of(model=model, strategy=LUCIR(memory_size=8), privacy=SIMULATED)
        return looks(learner, of)

    first = cosine(stream)
    again = cosine(stream)
    assert cosine(other) == first > 10 * again
    assert cosine(other) == cosine(stream) == again


OTHERS = {
    "strategy": lambda: {"strategy": LwF()},
    "setting": lambda: {"strategy": EWC(strength=2.0)},
    "memory": lambda: {"strategy": Replay(memory_size=8)},
    "attack": lambda: {"adversary": FGSM(epsilon=0.1)},
    "clipping": lambda: {"privacy": replace(SIMULATED, clipping="per-layer")},
    "micro batch": lambda: {"micro_batch_size": 3},
    "precision": lambda: {"precision": "bfloat16"},
    "seed": lambda: {"seed": 1},
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_guard_inspects_a_learner_with_another_setting(name, known):
    _, again, make, stream = known
    assert looks(make(**OTHERS[name]()), stream) > 10 * again


def test_the_guard_inspects_once_for_fixed_and_adaptive_norms(known):
    _, again, make, stream = known
    privacy = replace(SIMULATED, clipping=Adaptive(count_noise=0.5))
    assert looks(make(privacy=privacy), stream) == again


def models(stream):
    """Return models that are equal except for one thing each."""

    def plain():
        return mlp(
            input_shape=stream.input_shape,
            num_classes=stream.num_classes,
            hidden=(6,),
            seed=3,
            activation="tanh",
        )

    frozen = plain()
    next(frozen.parameters()).requires_grad_(requires_grad=False)
    moved = plain()
    with torch.no_grad():
        next(moved.parameters()).data[0, 0] += 1e-3
    marked = plain()
    marked.head.scale = 2.0
    return {"frozen": frozen, "value": moved, "setting": marked}


@pytest.mark.parametrize("name", ["frozen", "value", "setting"])
def test_the_guard_inspects_a_changed_model_again(name, known):
    _, again, make, stream = known
    assert looks(make(model=models(stream)[name]), stream) > 10 * again


def test_a_verdict_is_not_reused_for_other_domains_or_classes(known):
    _, again, make, stream = known
    wide = InputDomain(shape=(5,), dtype=torch.float32, range=(-100.0, 100.0))
    declared = [replace(e, train=replace(e.train, domain=wide)) for e in stream]
    classes = [replace(e, classes=(0, 1, 2, 3)) for e in stream]
    for experiences in (declared, classes):
        other = replace(stream, experiences=tuple(experiences))
        assert looks(make(), other) > 10 * again


@dataclass(frozen=True, kw_only=True)
class Mine(Naive):
    """Losses of the user's own code."""

    parts: list = field(default_factory=list)

    def losses(self, forward, batch, context, state):
        z = forward(batch.inputs)
        each = nn.functional.cross_entropy(z, batch.labels, reduction="none")
        return each - z.mean() if self.parts else each


def test_the_guard_inspects_user_code_every_time(known):
    first, _, make, stream = known
    mine = Mine()
    assert looks(make(strategy=mine), stream) >= first
    assert looks(make(strategy=mine), stream) >= first
    mine.parts.append(1)  # the same object, and another loss
    with pytest.raises(GuardError, match="couples records"):
        make(strategy=mine).prepare(stream)


def test_the_guard_inspects_a_replaced_library_method(known, monkeypatch):
    _, _, make, stream = known
    make().prepare(stream)

    def losses(self, forward, batch, context, state):
        z = forward(batch.inputs)
        return nn.functional.cross_entropy(z - z.mean(0), batch.labels, reduction="none")

    monkeypatch.setattr(EWC, "losses", losses)
    with pytest.raises(GuardError):
        make().prepare(stream)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (nn.functional, "linear"),
        (single_label, "mask_outputs"),
        (Forward, "__call__"),
    ],
)
def test_the_guard_inspects_a_replaced_library_function_again(known, monkeypatch, place, name):
    first, again, make, stream = known
    own = getattr(place, name)

    def coupled(*args, **named):
        found = own(*args, **named)
        return found + found.mean(0)

    with monkeypatch.context() as patched:
        patched.setattr(place, name, coupled)
        with pytest.raises(GuardError):
            make().prepare(stream)
    assert looks(make(), stream) >= first
    assert looks(make(), stream) == again


def _centred(self, outputs, targets, mask=None):
    return F.cross_entropy(outputs - outputs.mean(0), targets, reduction="none")  # noqa: F821


@pytest.mark.parametrize("function", [SingleLabel.losses, single_label.mask_outputs])
def test_the_guard_inspects_code_that_was_reloaded(known, monkeypatch, function):
    first, again, make, stream = known
    assert looks(make(), stream) == again
    code = function.__code__
    if function is SingleLabel.losses:
        monkeypatch.setattr(function, "__code__", _centred.__code__)
        with pytest.raises(GuardError, match="couples records"):
            make().prepare(stream)
    else:  # the same code, loaded again
        monkeypatch.setattr(function, "__code__", code.replace())
        assert looks(make(), stream) == first


def test_the_guard_inspects_a_new_hook_of_a_known_model(known):
    _, _, make, stream = known
    learner = make()
    learner.model.head.register_forward_hook(lambda module, args, out: out - out.mean(0))
    with pytest.raises(GuardError):
        learner.prepare(stream)


def test_a_reused_verdict_puts_the_model_in_training_mode(known):
    _, _, make, stream = known
    learner = make()
    learner.model.eval()
    learner.prepare(stream)
    assert learner.model.training


def test_a_refusal_by_the_guard_is_not_stored_for_later_learners(learner_of, toy_stream):
    for _ in range(2):
        with pytest.raises(GuardError, match="couples"):
            learner_of(strategy=Mine(parts=[1]), privacy=SIMULATED).prepare(toy_stream())


def test_a_stored_verdict_equals_a_new_verdict(known):
    _, _, make, stream = known
    learner = make()
    learner.prepare(stream)
    recalled = reached(learner.session.inspection())
    VERDICTS.forget()
    assert reached(learner.session.inspection()) == recalled


def test_the_verdict_key_differs_for_different_values():
    a = torch.zeros(3)
    values = [0, 0.0, -0.0, False, "0", b"0", None, (0,), [0], {0: 0}, {0}, a, a.double(), a + 1]
    values += [EWC(strength=1.0), EWC(strength=2.0), torch.relu, nn.functional.relu, float, int]
    keys = {described(value) for value in values}
    assert len(keys) == len(values)
    assert described(EWC(strength=1.0)) == described(EWC(strength=1.0))


@pytest.mark.parametrize("value", [lambda x: x, object(), torch.Generator(), Mine()])
def test_the_verdict_key_refuses_unknown_objects(value):
    with pytest.raises(UnknownKindError):
        described(value)


def test_the_number_of_stored_verdicts_is_limited(known):
    _, _, make, stream = known
    learner = make()
    learner.prepare(stream)
    inspection = learner.session.inspection()
    verdict = reached(inspection)
    for number in range(MOST + 5):
        VERDICTS.keep(number, inspection, verdict)
    assert VERDICTS.recall(0, inspection) is None
    assert VERDICTS.recall(MOST, inspection) == verdict
