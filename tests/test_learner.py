import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR, StepLR

from perdure.adversarial import FGSM, PGD, robust_accuracy
from perdure.augment import Views
from perdure.checkpoint import Store
from perdure.combine import Combine
from perdure.errors import ConfigError, LedgerError, PrivacyError, StrategyError
from perdure.learner import POINTS, Learner, accuracy, numbered
from perdure.models import mlp
from perdure.privacy.adaptive import Adaptive
from perdure.privacy.ledger import read
from perdure.privacy.noise import NoiseKey
from perdure.privacy.policy import Privacy
from perdure.records import Batch
from perdure.strategies import EWC, Joint, LwF, Naive, Replay
from perdure.strategy import Plan, State, Strategy

SIMULATED = Privacy(noise_multiplier=1.0, seed=0)
SECRET = Privacy(noise_multiplier=1.0)
adam = partial(torch.optim.Adam, lr=0.02)


@pytest.fixture
def learner_of(toy_stream, toy_model):
    def make(strategy=None, stream=None, **changes):
        options = {"optimizer": adam, "iterations": 4, "batch_size": 8, "seed": 5} | changes
        model = options.pop("model", None) or toy_model(stream or toy_stream())
        return Learner(model=model, strategy=strategy or Naive(), **options)

    return make


def bits(tensors):
    return {name: value.detach().clone() for name, value in tensors.items()}


def same_bits(mine, theirs):
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# --------------------------------------------------------------------------- how long


def test_epochs_and_iterations_say_how_many_steps(learner_of, toy_stream):
    stream = toy_stream()
    for options, steps in (({"iterations": 7}, 7), ({"iterations": None, "epochs": 3}, 9)):
        learner = learner_of(**options)
        learner.prepare(stream)
        assert [learner.steps(index) for index in range(2)] == [steps, steps]
    ragged = learner_of(iterations=None, epochs=3, batch_size=7)
    ragged.prepare(stream)
    assert ragged.steps(0) == 11  # 3 * 24 / 7, rounded up


def test_under_privacy_an_epoch_is_one_over_the_rate(learner_of, toy_stream):
    learner = learner_of(iterations=None, epochs=2, privacy=replace(SIMULATED, sampling_rate=0.15))
    learner.prepare(toy_stream())
    assert learner.steps(0) == 14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 1}, "exactly one of epochs and iterations"),
        ({"iterations": None}, "exactly one of epochs and iterations"),
        ({"iterations": 0}, "iterations = 0 is not allowed"),
        ({"blocks": 0}, "blocks = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
    ],
)
def test_options_are_checked(learner_of, options, message):
    with pytest.raises(ConfigError, match=message):
        learner_of(**options)


def test_blocks_cut_an_experience_without_a_gap(learner_of, toy_stream):
    learner = learner_of(iterations=7, blocks=3)
    learner.prepare(toy_stream())
    assert learner.remaining_blocks() == [range(0, 2), range(2, 4), range(4, 7)]
    learner.position.step = 4
    assert learner.remaining_blocks() == [range(4, 7)]
    many = learner_of(iterations=2, blocks=5)
    many.prepare(toy_stream())
    assert [step for block in many.remaining_blocks() for step in block] == [0, 1]


@pytest.mark.parametrize("strategy", [Naive(), EWC(strength=9.0), Replay(memory_size=12)])
def test_without_privacy_blocks_do_not_change_the_result(learner_of, toy_stream, strategy):
    ends = []
    for blocks in (1, 4):
        learner = learner_of(strategy, blocks=blocks)
        learner.fit(toy_stream())
        ends.append(bits(learner.model.state_dict()))
    assert same_bits(*ends)


# --------------------------------------------------------------------------- the loop, hook by hook


class Ledger(list):
    """What the hooks of `Tracing` were handed."""


HANDED = Ledger()


@dataclass(frozen=True, kw_only=True)
class Tracing(Strategy):
    """Penalty 3 * sum(theta), projection that doubles, a path that counts; says what each hook was handed."""

    def init(self, spec):
        return State().declare("steps", torch.zeros(()), "sum")

    def penalty(self, params, state):
        return 3 * torch.stack([value.sum() for value in params.values()]).sum()

    def references(self, curator, params, state):
        return ({name: torch.full_like(value, 0.5) for name, value in params.items()},)

    def project(self, gradient, references, state):
        HANDED.append(("project", bits(gradient), references))
        return {name: 2 * value for name, value in gradient.items()}

    def after_step(self, before, after, gradient, state, noise_variance=0.0):
        HANDED.append(("after_step", bits(before), bits(after), bits(gradient)))
        return state.replace({"steps": state["steps"] + 1})


@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, partial(torch.optim.SGD, momentum=0.9, nesterov=True, foreach=True)]
)
def test_penalty_projection_and_path_are_handed_the_right_things(learner_of, toy_stream, optimizer):
    HANDED.clear()
    stream, losses = toy_stream(), []

    def look(point, learner):
        if point == "step.gradient":
            batch = learner.curator.sample(learner.position.step)
            loss = learner.strategy.losses(learner.forward, batch, learner.curator.context, learner.state).mean()
            grads = torch.autograd.grad(loss, list(learner.params.values()))
            losses.append(dict(zip(learner.params, grads, strict=True)))

    learner = learner_of(Tracing(), optimizer=partial(optimizer, lr=0.1), callbacks=[look])
    start = bits(dict(learner.model.named_parameters()))
    learner.fit(stream)
    assert float(learner.state["steps"]) == 8 and [kind for kind, *_ in HANDED] == ["project", "after_step"] * 8
    place = start
    for (_, projected, references), (_, before, after, released), loss in zip(
        HANDED[::2], HANDED[1::2], losses, strict=True
    ):
        assert same_bits(before, place)
        for name, gradient in loss.items():
            torch.testing.assert_close(released[name], gradient)  # before penalty and projection
            torch.testing.assert_close(projected[name], gradient + 3)
            assert references[0][name].unique().tolist() == [0.5]
            if optimizer is torch.optim.SGD:
                torch.testing.assert_close(after[name], before[name] - 0.1 * 2 * (gradient + 3))
        place = after
    assert same_bits(place, bits(dict(learner.model.named_parameters())))


class Tied(Strategy):
    def plan(self, experience):
        return Plan(trainable=("head.",))


class Tying(Tied):
    """Pulls the head towards what is not trained."""

    def penalty(self, params, state):
        return (params["head.weight"] * params["body.1.weight"].mean()).sum()


def test_a_penalty_is_handed_all_parameters_and_moves_what_is_trained(learner_of, toy_stream):
    ends = []
    for strategy in (Tying(), Tied()):
        learner = learner_of(strategy, iterations=1, optimizer=partial(torch.optim.SGD, lr=0.1))
        learner.prepare(toy_stream())
        learner.begin(0)
        learner.train(range(1))
        ends.append(bits(dict(learner.model.named_parameters())))
    pull = ends[0]["body.1.weight"].mean()
    torch.testing.assert_close(ends[0]["head.weight"], ends[1]["head.weight"] - 0.1 * pull)
    assert torch.equal(ends[0]["body.1.weight"], ends[1]["body.1.weight"]) and float(pull.abs()) > 1e-3
    assert learner_of(Tying(), privacy=SIMULATED).fit(toy_stream()).isfinite().all()  # its digest calls it too


def test_a_penalty_is_not_asked_for_where_the_plan_rules_it_out(learner_of, toy_stream):
    asked = []

    class Watched(EWC):
        def penalty(self, params, state):
            asked.append(len(asked))
            return super().penalty(params, state)

    stream, quiet, loud = toy_stream(), Watched(strength=1.0), Combine(Watched(strength=1.0), Tying())
    learner_of(quiet, iterations=3, privacy=None).fit(stream)
    assert len(asked) == 3 * (len(stream) - 1)  # not in the first experience
    assert [loud.plan(e).penalised for e in stream] == [True] * len(stream)  # of the part that always pulls


def test_a_scheduler_is_stepped_after_every_step(learner_of, toy_stream):
    rates = []

    def look(point, learner):
        if point == "step.sampled":
            rates.append(learner._optimizer.param_groups[0]["lr"])

    learner_of(scheduler=partial(StepLR, step_size=3, gamma=0.1), callbacks=[look]).fit(toy_stream())
    assert rates == pytest.approx([0.02] * 3 + [0.002] * 3 + [0.0002] * 2)  # it goes on over experiences
    rates.clear()
    learner_of(scheduler=partial(StepLR, step_size=3, gamma=0.1), callbacks=[look], reset_optimizer=True).fit(
        toy_stream()
    )
    assert rates == pytest.approx([0.02] * 3 + [0.002] + [0.02] * 3 + [0.002])


@pytest.mark.parametrize(("reset", "steps"), [(False, 8), (True, 4)])
def test_an_experience_may_begin_with_a_fresh_optimiser(learner_of, toy_stream, reset, steps):
    learner = learner_of(reset_optimizer=reset)
    learner.fit(toy_stream())
    assert {float(entry["step"]) for entry in learner._optimizer.state.values()} == {steps}


@dataclass(frozen=True, kw_only=True)
class HeadOnly(Strategy):
    """Trains everything first, and the head alone from the second experience on."""

    prefix: str = "head"

    def plan(self, experience):
        return Plan(trainable=(self.prefix,) if experience.index else None)


@pytest.mark.parametrize("privacy", [None, SIMULATED])
@pytest.mark.parametrize("optimizer", [adam, partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)])
def test_what_is_not_trained_keeps_its_bits(learner_of, toy_stream, privacy, optimizer):
    moments = []

    def look(point, learner):
        if point in ("experience.begin", "experience.end"):
            moments.append(bits(dict(learner.model.named_parameters())))

    learner_of(HeadOnly(), optimizer=optimizer, privacy=privacy, callbacks=[look]).fit(toy_stream())
    start, first, begin, end = moments
    assert same_bits(first, begin) and not any(torch.equal(start[name], first[name]) for name in start)
    for name, value in begin.items():
        assert torch.equal(value, end[name]) == name.startswith("body")


def test_a_prefix_that_no_parameter_has_is_refused(learner_of, toy_stream):
    with pytest.raises(StrategyError, match=r"no parameter begins with \('haed',\); the model trains body.1.weight"):
        learner_of(HeadOnly(prefix="haed")).fit(toy_stream())


def test_parameters_that_were_frozen_by_hand_stay(learner_of, toy_stream, toy_model):
    for strategy in (EWC(strength=10.0), EWC(strength=10.0, fisher="empirical"), LwF()):
        model = toy_model(toy_stream())
        model.body[1].requires_grad_(False)
        before = bits(model.state_dict())
        learner_of(strategy, model=model).fit(toy_stream())
        assert [torch.equal(before[name], value) for name, value in model.state_dict().items()] == [
            True,
            True,
            False,
            False,
        ]


def test_callbacks_see_every_point_in_order(learner_of, toy_stream, tmp_path):
    seen = []
    learner_of(iterations=2, blocks=2, folder=tmp_path, callbacks=[lambda point, _: seen.append(point)]).fit(
        toy_stream()
    )
    step = ["step.sampled", "step.gradient", "step.done"]
    block = ["block.begin", *step, "block.end", "checkpoint.begin", "checkpoint.end"]
    end = ["experience.consolidated", "experience.end", "evaluated", "checkpoint.begin", "checkpoint.end"]
    assert seen == ["experience.begin", *block, *block, *end] * 2
    assert set(POINTS) - set(seen) == {point for point in POINTS if point.startswith(("ledger.", "noise."))}


def test_under_privacy_callbacks_see_the_ledger_too(learner_of, toy_stream):
    seen = []
    learner_of(privacy=SIMULATED, callbacks=[lambda point, _: seen.append(point)]).fit(toy_stream())
    at = seen.index("block.begin")
    assert seen[at + 1 : at + 6] == [
        "ledger.before-append", "ledger.appended", "ledger.head-written", "step.sampled", "noise.drawn"
    ]  # fmt: skip


# --------------------------------------------------------------------------- seeds


def dropping(stream):
    model = mlp(input_shape=stream.input_shape, num_classes=stream.num_classes, hidden=(6,), seed=3)
    model.body.append(nn.Dropout(0.4))
    return model


@pytest.mark.parametrize("privacy", [None, SIMULATED])
@pytest.mark.parametrize("strategy", [Replay(memory_size=12), LwF()])
def test_a_seed_gives_the_same_bits_also_with_dropout(learner_of, toy_stream, strategy, privacy):
    ends = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(ends))  # what the caller does with the global generator is nobody's business
        learner = learner_of(strategy, model=dropping(toy_stream()), seed=seed, privacy=privacy)
        learner.fit(toy_stream())
        ends.append(bits(learner.model.state_dict()))
    assert same_bits(ends[0], ends[1]) and not same_bits(ends[0], ends[2])


def test_under_privacy_dropout_and_attacks_draw_from_the_secret(learner_of, toy_stream):
    """Draws go by a row's place in the batch: were they public, one more record would change those of the others."""
    learner = learner_of(seed=5)
    learner.prepare(toy_stream())
    seeds = [learner._seed_of("layers", 0)]
    for privacy in (SIMULATED, replace(SIMULATED, seed=1), replace(SIMULATED, seed=1)):
        learner = learner_of(seed=5, privacy=privacy)
        learner.prepare(toy_stream())
        learner.begin(0)
        learner.curator.reserve(range(9), "start")
        seeds.append(learner._seed_of("layers", 0))
    assert len(set(seeds)) == 3 and seeds[2] == seeds[3] and len({learner._seed_of("layers", s) for s in range(9)}) == 9


def test_fitting_again_measures_the_same_stream_anew(learner_of, toy_stream):
    learner = learner_of(iterations=60)
    first = learner.fit(toy_stream())
    again = learner.fit(toy_stream())
    assert again.shape == first.shape == (2, 2) and len(learner.matrix) == 2
    assert learner.position.experience == 2


# --------------------------------------------------------------------------- measuring


@dataclass(frozen=True, kw_only=True)
class Oracle(Strategy):
    """Answers from the first input alone, before the mask of the scenario."""

    def predict(self, forward, x, context, state):
        return torch.where(context.allowed, F.one_hot(x[:, 0].long(), 4).float(), -1.0)


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        ("class", [[100.0, 0.0], [100.0, 100.0]]),  # classes not yet seen are never predicted
        ("task", [[100.0, 100.0], [100.0, 100.0]]),
    ],
)
def test_the_matrix_of_an_oracle(learner_of, toy_stream, scenario, expected):
    stream = toy_stream(scenario)
    telling = tuple(
        replace(e, test=replace(e.test, inputs=e.test.labels[:, None].float().expand(-1, 5))) for e in stream
    )
    matrix = learner_of(Oracle(), iterations=1).fit(replace(stream, experiences=telling))
    assert matrix.tolist() == expected


@pytest.mark.parametrize(("scenario", "answers"), [("task", 2), ("class", 4), ("domain", 2)])
def test_predictions_stay_among_the_classes_of_the_scenario(learner_of, toy_stream, toy_model, scenario, answers):
    stream = toy_stream(scenario)
    learner = learner_of(stream=stream)
    learner.prepare(stream)
    x = torch.rand(200, 5, generator=torch.Generator().manual_seed(0)) * 40 - 20
    late = learner.predictor(0, after=1)(x)
    assert late.shape == (200, stream.num_classes) and int((late > -1e9).all(0).sum()) == answers
    early = learner.predictor(1, after=0)(x)
    shown = torch.nonzero((early > -1e9).all(0)).flatten().tolist()
    assert shown == {"task": [2, 3], "class": [0, 1], "domain": [0, 1]}[scenario]


def test_accuracy_is_in_percent_and_unknown_without_records():
    def predict(x):
        return x

    logits, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    assert accuracy(predict, logits, labels, 3) == 75.0
    assert torch.tensor(accuracy(predict, logits[:0], labels[:0], 3)).isnan()


def test_training_learns_every_kind_of_stream(learner_of, toy_stream):
    for scenario in ("task", "domain", "class"):
        matrix = learner_of(stream=toy_stream(scenario), iterations=80).fit(toy_stream(scenario))
        assert matrix.diagonal().min() > 80


# --------------------------------------------------------------------------- adversaries


class Watched(FGSM):
    """Keeps what it was given, what it made of it, and the losses before and after."""

    def perturb(self, losses, inputs, *, generator=None):
        moved = super().perturb(losses, inputs, generator=generator)
        SEEN.append((inputs.clone(), moved, losses(inputs).detach().sum(), losses(moved).detach().sum()))
        return moved


SEEN = []


@pytest.mark.parametrize("privacy", [None, SIMULATED])
def test_the_adversary_moves_the_training_inputs_uphill_and_nothing_else(learner_of, toy_stream, privacy):
    SEEN.clear()
    stream, trained = toy_stream(), []
    copies = [bits({"inputs": e.train.inputs, "test": e.test.inputs}) for e in stream]

    def look(point, learner):
        if point == "step.sampled":
            held = learner.curator._held
            drawn = held.rows.take(held._drawn) if privacy else learner.curator.sample(learner.position.step)
            trained.append(drawn)

    attack = Watched(epsilon=0.05)
    learner = learner_of(Replay(memory_size=12), adversary=attack, callbacks=[look], privacy=privacy)
    learner.fit(stream)
    assert len(SEEN) == len(trained) == 8
    for (inputs, moved, before, after), batch in zip(SEEN, trained, strict=True):
        assert torch.equal(inputs, batch.inputs) and after > before
        assert float((moved - inputs).abs().max()) <= 0.05 + 1e-6
    for experience, copy in zip(stream, copies, strict=True):
        assert torch.equal(experience.train.inputs, copy["inputs"])
        assert torch.equal(experience.test.inputs, copy["test"])
    rows = learner.curator._held.memory.rows
    originals = torch.cat([e.train.inputs for e in stream])[torch.cat([e.train.ids for e in stream]).argsort()]
    order = torch.cat([e.train.ids for e in stream]).sort().values
    assert torch.equal(rows.inputs, originals[torch.searchsorted(order, rows.ids)])  # memory keeps what was seen


def test_adversarial_training_raises_robust_accuracy_on_digits():
    from perdure.datasets import digits
    from perdure.streams import split

    stream = split(digits(), scenario="domain", experiences=1)
    attack = PGD(epsilon=0.15, steps=4)
    robust = {}
    for adversary in (None, attack):
        model = mlp(input_shape=(1, 8, 8), num_classes=10, hidden=(32,), seed=0)
        learner = Learner(
            model=model, strategy=Naive(), optimizer=partial(torch.optim.Adam, lr=0.01), iterations=80, batch_size=128,
            adversary=adversary,
        )  # fmt: skip
        assert learner.fit(stream).min() > 80
        test = stream[0].test
        place = torch.Generator().manual_seed(0)
        predict = learner.predictor(0, after=0)
        robust[adversary] = robust_accuracy(predict, test.inputs, test.labels, attack, generator=place)
    assert robust[attack] > robust[None] + 5


# --------------------------------------------------------------------------- stopping and going on


class Stop(Exception):  # noqa: N818
    """A power cut."""


class Cut:
    """Stops a run at the k-th time it comes to a point; counts draws of noise."""

    def __init__(self, point=None, k=1):
        self.point, self.left, self.draws = point, k, 0

    def __call__(self, point, learner):
        self.draws += point == "noise.drawn"
        if point == self.point:
            self.left -= 1
            if self.left == 0:
                raise Stop(point)


RESUMED = {
    "replay": Replay(memory_size=12),
    "ewc": EWC(strength=20.0),
    "online": Combine(EWC(strength=20.0, mode="online"), LwF()),
    "joint": Joint(),
}
schedule = partial(MultiStepLR, milestones=[3, 6], gamma=0.3)


@pytest.fixture
def start(learner_of, toy_stream):
    """From a folder to the result of a run, stopped at `cut` or not."""

    def run(folder, name, privacy, cut, **changes):
        learner = learner_of(
            RESUMED[name], blocks=2, folder=folder, privacy=privacy, callbacks=[cut], scheduler=schedule, **changes
        )
        matrix = learner.fit(toy_stream())
        return matrix.tolist(), bits(learner.snapshot().tensors), bits(learner.snapshot().private)

    return run


def entries(folder):
    (part,) = read(folder / "ledger.jsonl").parts
    return part.account.entries


def charged(folder):
    """Steps and releases in the ledger; 0 where it was stopped before its first line counted."""
    head = folder / "ledger.head.json"
    begun = head.exists() and json.loads(head.read_text())["count"] > 0
    return sum(entry.steps for entry in entries(folder)) if begun else 0


def assert_same(mine, theirs):
    assert mine[0] == theirs[0] and same_bits(mine[1], theirs[1]) and same_bits(mine[2], theirs[2])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Result, ledger and number of passes through every point of a run that nobody stopped, once for each kind."""
    known = {}

    def whole(start, name, privacy):
        if (name, privacy) not in known:
            folder, passed = tmp_path_factory.mktemp("whole"), Counter()
            result = start(folder, name, privacy, lambda point, learner: passed.update([point]))
            assert not privacy or passed["noise.drawn"] == charged(folder)
            ledger = (folder / "ledger.jsonl").read_text() if privacy else ""
            known[name, privacy] = (result, ledger, passed)
        return known[name, privacy]

    return whole


FREE = [point for point in POINTS if not point.startswith(("ledger.", "noise."))]


@pytest.mark.parametrize(
    ("name", "point"),
    [*product(["replay", "ewc"], FREE), *product(["online", "joint"], ["step.gradient", "experience.consolidated"])],
)
def test_a_run_stopped_anywhere_goes_on_to_the_same_bits(start, undisturbed, tmp_path, name, point):
    result, _, passed = undisturbed(start, name, None)
    assert passed[point] >= 2
    for k in (1, passed[point] // 2 + 1):
        folder = tmp_path / str(k)
        with pytest.raises(Stop):
            start(folder, name, None, Cut(point, k))
        assert_same(start(folder, name, None, Cut()), result)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", ["replay", "ewc"])
def test_a_private_run_stopped_anywhere_goes_on_to_the_same_bits_and_charges(start, undisturbed, tmp_path, name, point):
    result, ledger, passed = undisturbed(start, name, SIMULATED)
    assert passed[point] >= 2
    for k in sorted({passed[point] // 2 + 1, passed[point]}):
        folder, cut = tmp_path / str(k), Cut(point, k)
        with pytest.raises(Stop):
            start(folder, name, SIMULATED, cut)
        assert charged(folder) >= cut.draws
        assert_same(start(folder, name, SIMULATED, Cut()), result)
        assert (folder / "ledger.jsonl").read_text() == ledger


@pytest.mark.parametrize("point", POINTS)
def test_with_secret_noise_nothing_is_drawn_that_was_not_charged(start, undisturbed, tmp_path, point):
    """The key survives the cut, so what is done again is done with the same noise: no charge is missing or doubled."""
    _, ledger, passed = undisturbed(start, "ewc", SIMULATED)
    cut = Cut(point, passed[point] // 2 + 1)
    with pytest.raises(Stop):
        start(tmp_path, "ewc", SECRET, cut)
    assert charged(tmp_path) >= cut.draws
    start(tmp_path, "ewc", SECRET, Cut())
    merged = read(tmp_path / "ledger.jsonl", keys={"curator": NoiseKey.from_os(tmp_path / "private" / "key")})
    assert merged.verified == "chains and keyed heads verified" and not merged.simulated
    assert charged(tmp_path) == passed["noise.drawn"] and len(entries(tmp_path)) == ledger.count('"kind":"entry"')


def test_a_run_stopped_twice_goes_on(start, undisturbed, tmp_path):
    result, _, _ = undisturbed(start, "replay", SIMULATED)
    for point, k in (("step.done", 3), ("noise.drawn", 1), ("ledger.appended", 1), ("checkpoint.begin", 2)):
        with pytest.raises(Stop):
            start(tmp_path / "cut", "replay", SIMULATED, Cut(point, k))
    assert_same(start(tmp_path / "cut", "replay", SIMULATED, Cut()), result)


def test_a_finished_run_is_not_run_again(start, tmp_path):
    first = start(tmp_path, "ewc", SIMULATED, Cut())
    cut = Cut("step.sampled")
    assert_same(start(tmp_path, "ewc", SIMULATED, cut), first)
    assert cut.draws == 0


@pytest.mark.parametrize(
    "changes",
    [{"scheduler": partial(StepLR, step_size=1)}, {"seed": 6}, {"optimizer": partial(torch.optim.Adam, lr=0.5)}],
)
def test_a_changed_request_meets_fresh_noise_and_is_charged_again(learner_of, toy_stream, tmp_path, changes):
    """The scheduler's first rate is the same: what comes later in the block must count too."""
    noises = []
    for options in ({}, changes):
        folder, drawn = tmp_path, []

        def look(point, learner, drawn=drawn):
            if point == "step.gradient":
                drawn.append(learner.mechanism._paid(learner.position.step))
                raise Stop

        settings = {"scheduler": schedule} | options
        learner = learner_of(privacy=SIMULATED, folder=folder, callbacks=[look], **settings)
        with pytest.raises(Stop):
            learner.fit(toy_stream())
        noises += drawn
    assert noises[0] != noises[1] and len(entries(tmp_path)) == 2


def test_a_ledger_of_another_key_is_refused(start, tmp_path):
    start(tmp_path, "ewc", SIMULATED, Cut())
    with pytest.raises(LedgerError, match="not sealed with this key"):
        start(tmp_path, "ewc", replace(SIMULATED, seed=1), Cut())


def test_secret_noise_needs_a_folder(learner_of, toy_stream):
    from perdure.errors import PrivacyError

    with pytest.raises(PrivacyError, match="secret noise needs a folder"):
        learner_of(privacy=SECRET).prepare(toy_stream())


def test_a_snapshot_does_not_change_while_training_goes_on(learner_of, toy_stream):
    learner = learner_of(LwF())
    learner.fit(toy_stream())
    kept = learner.snapshot()
    before = bits(kept.tensors)
    learner.fit(toy_stream())
    assert same_bits(dict(kept.tensors), before)
    assert not same_bits(learner.snapshot().tensors, before)


def test_private_rows_are_kept_apart(learner_of, toy_stream, tmp_path):
    learner = learner_of(Replay(memory_size=12), folder=tmp_path)
    learner.fit(toy_stream())
    saved = Store(tmp_path).load()
    assert not any(name.startswith("memory") for name in saved.tensors)
    assert len(saved.private["memory.inputs"]) == 12
    assert (tmp_path / "private").stat().st_mode & 0o077 == 0
    records = torch.cat([e.train.inputs for e in toy_stream()]).numpy()
    published = b"".join(path.read_bytes() for path in (tmp_path / "checkpoint").iterdir())
    assert not any(record.tobytes() in published for record in records)


@pytest.mark.parametrize("scheduler", [schedule, partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step))])
def test_a_scheduler_survives_the_disk(learner_of, toy_stream, tmp_path, scheduler):
    rates = {"whole": [], "cut": []}

    def run(key, cut):
        def look(point, learner):
            if point == "step.done":
                rates[key].append(learner._optimizer.param_groups[0]["lr"])

        learner_of(scheduler=scheduler, blocks=4, folder=tmp_path / key, callbacks=[look, cut]).fit(toy_stream())

    run("whole", Cut())
    with pytest.raises(Stop):
        run("cut", Cut("checkpoint.end", 2))
    run("cut", Cut())
    assert rates["cut"] == rates["whole"] and len(set(rates["whole"])) > 2


def test_whole_number_keys_survive_json():
    assert numbered({"milestones": {"3": 1, "60": 2}, "lrs": [{"0": 1.0}], "name": "x"}) == {
        "milestones": {3: 1, 60: 2}, "lrs": [{0: 1.0}], "name": "x"
    }  # fmt: skip


# --------------------------------------------------------------------------- budgets


def test_the_whole_plan_is_calibrated_and_granted_before_the_first_draw(learner_of, toy_stream):
    learner = learner_of(EWC(strength=1.0), privacy=Privacy(epsilon=4.0, delta=1e-2, seed=0))
    learner.prepare(toy_stream())
    ledger = learner.mechanism.ledger
    assert not ledger.entries and ledger.epsilon(delta=1e-2) == 0
    learner.fit(toy_stream())
    spent = learner.mechanism.ledger.epsilon(delta=1e-2)
    assert 3.5 < spent <= 4.0


def test_a_release_that_was_not_planned_is_refused(learner_of, toy_stream):
    from perdure.errors import BudgetError

    @dataclass(frozen=True, kw_only=True)
    class Greedy(EWC):
        """Asks for one release more than it says."""

        def after_experience(self, curator, params, state):
            curator.release(lambda forward, batch: batch.inputs, clip_norm=1.0, purpose="mean")
            return super().after_experience(curator, params, state)

    learner = learner_of(Greedy(strength=1.0), privacy=Privacy(epsilon=4.0, delta=1e-2, seed=0))
    with pytest.raises(BudgetError, match="allowed 0 by the grant"):
        learner.fit(toy_stream())


def test_two_fisher_matrices_are_paid_for_twice(learner_of, toy_stream):
    both = Combine(EWC(strength=1.0), EWC(strength=1.0, fisher="empirical"))
    learner = learner_of(both, privacy=SIMULATED)
    learner.fit(toy_stream())
    purposes = [entry.purpose for entry in learner.mechanism.ledger.entries]
    assert purposes == ["gradient", "release:fisher", "release:fisher"] * 2


def test_a_batch_of_nobody_still_takes_a_step(learner_of, toy_stream):
    """Rate so low that no one is drawn: noise alone moves the model, also behind an adversary."""
    privacy = replace(SIMULATED, sampling_rate=1e-9)
    learner = learner_of(
        privacy=privacy, adversary=PGD(epsilon=0.1, steps=2), optimizer=partial(torch.optim.SGD, lr=1e-9)
    )
    before = bits(learner.model.state_dict())
    learner.fit(toy_stream())
    assert not any(torch.equal(before[name], value) for name, value in learner.model.state_dict().items())


def test_batches_are_rows_of_the_stream(toy_stream):
    batch = Batch.current(toy_stream()[1].train, 1)
    assert len(batch) == 24 and batch.tasks.unique().tolist() == [1] and not batch.from_memory.any()


def test_another_loss_or_view_under_the_same_name_meets_fresh_noise(learner_of, toy_stream):
    """Names and settings alike; only the code differs. The start of a block is keyed by what it does."""

    def start(factor, scale):
        @dataclass(frozen=True, kw_only=True)
        class Scaled(Strategy):
            def losses(self, forward, batch, context, state):
                return factor * super().losses(forward, batch, context, state)

        views = Views(count=1, change=lambda record: scale * record)
        learner = learner_of(Scaled(), privacy=SIMULATED, views=views)
        learner.prepare(toy_stream())
        learner.begin(0)
        return learner._start()

    assert start(1.0, 0.9) == start(1.0, 0.9)
    assert len({start(1.0, 0.9), start(2.0, 0.9), start(1.0, 0.8)}) == 3


def test_another_release_under_the_same_name_meets_fresh_noise(learner_of, toy_stream):
    """Once more from the same checkpoint with another query: the answers must not differ by the records alone."""

    def answer(query):
        learner = learner_of(privacy=SIMULATED)
        learner.prepare(toy_stream())
        learner.begin(0)
        return learner.curator.release(query, clip_norm=100.0, purpose="mean")["value"], learner.mechanism.ledger

    (one, ledger), (same, _), (other, others) = (
        answer(lambda f, b, k=k: k * b.inputs) for k in (1.0, 1.0, 2.0)
    )  # fmt: skip
    assert torch.equal(one, same)
    records = toy_stream()[0].train.inputs.sum(0)
    assert not torch.allclose(other - one, records, atol=1e-2)
    assert ledger.entries[-1].digest != others.entries[-1].digest


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy": replace(SIMULATED, clipping="per-layer")}, {"privacy": replace(SIMULATED, bands=2)},
        {"privacy": replace(SIMULATED, bands=3)}, {"privacy": replace(SIMULATED, clipping=Adaptive(count_noise=0.5))},
        {"privacy": replace(SIMULATED, clipping=Adaptive(count_noise=0.6))}, {"micro_batch_size": 2},
        {"scheduler": partial(LambdaLR, lr_lambda=lambda step: 0.5)},
        {"scheduler": partial(LambdaLR, lr_lambda=lambda step: 0.4)},
    ],
)  # fmt: skip
def test_whatever_shapes_a_sum_or_its_noise_keys_it(learner_of, toy_stream, changes):
    """The ledger's entry, under whose digest noise is drawn, differs from that of every other setting."""

    def entry(**options):
        learner = learner_of(**{"privacy": SIMULATED} | options)
        learner.prepare(toy_stream())
        learner.begin(0)
        learner.curator.reserve(range(2), learner._start())
        return learner.mechanism.ledger.entries[-1]

    others = [{}, {"privacy": replace(SIMULATED, bands=2)}, {"privacy": replace(SIMULATED, bands=3)},
              {"privacy": replace(SIMULATED, clipping=Adaptive(count_noise=0.5))},
              {"scheduler": partial(LambdaLR, lr_lambda=lambda step: 0.4)}]  # fmt: skip
    mine = entry(**changes)
    assert mine.digest == entry(**changes).digest
    same = [other for other in others if entry(**other).digest == mine.digest]
    assert [repr(other)[:40] for other in same] in ([], [repr(changes)[:40]])


def test_a_step_is_drawn_once(learner_of, toy_stream):
    """Another sum must not meet its noise: the difference of the two would be free of it."""
    learner = learner_of(privacy=SIMULATED)
    learner.prepare(toy_stream())
    learner.begin(0)
    learner.train(learner.block(0, 1))
    with pytest.raises(PrivacyError, match="step 0 is out of turn: every step is drawn once"):
        learner.curator.gradient(learner._losses, learner.params, learner.curator._pool, 0)
