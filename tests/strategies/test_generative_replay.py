import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.learners import distinct_rows
from perdure.auditing.canaries import audit
from perdure.contract.context import Spec, contexts
from perdure.contract.forward import Forward
from perdure.contract.state import State
from perdure.data.datasets.digits import digits
from perdure.data.records import Batch
from perdure.data.scenarios import split
from perdure.errors import ConfigError, StrategyError
from perdure.experiment.config import parse
from perdure.experiment.run import run
from perdure.learner.learner import Learner
from perdure.metrics import average_accuracy
from perdure.models.classifier import Classifier
from perdure.models.classifiers import cnn, mlp
from perdure.models.vae import Generative, generative
from perdure.privacy.clipping.bookkeeping import clipped_gradient_sum
from perdure.privacy.clipping.clip import Clip, clipped_sum
from perdure.privacy.settings import Privacy
from perdure.queries.per_record import gradient_rows
from perdure.strategies import GenerativeReplay, Naive
from perdure.strategies.generative_replay import distillation, drawn, vae_loss

LATENT = 3


def with_generator(classifier, stream, **changes):
    options = {"latent": LATENT, "hidden": (7,), "seed": 5} | changes
    return generative(classifier, input_shape=stream.input_shape, **options)


class Scene:
    """The second experience of a stream, a model, a different teacher, and a state with steps."""

    def __init__(self, stream, classifier, temperature=None):
        self.stream = stream
        self.model = with_generator(classifier, stream).eval()
        self.teacher = {
            name: 0.5 * value.detach().flip(0) + 0.1
            for name, value in self.model.named_parameters()
        }
        self.strategy = GenerativeReplay(temperature=temperature, seed=4)
        spec = Spec(
            params=self.teacher,
            num_classes=stream.num_classes,
            num_experiences=2,
            feature_size=6,
            scenario=stream.scenario,
        )
        self.state = self.strategy.init(spec).replace({"steps": torch.tensor(11)})
        self.batch = Batch.current(stream[1].train, 1)
        self.at = contexts(stream, "cpu")(1)

    def losses(self, forward, batch, state=None):
        return self.strategy.losses(forward, batch, self.at, state or self.state)

    def made(self):
        """Return latent noise of the rows, the generated rows, and their latent noise."""
        e, z, e_made = drawn(self.batch.ids, torch.tensor(11), 3 * LATENT, 4).chunk(3, dim=1)
        old = Forward(self.model, self.teacher)
        return e, torch.sigmoid(old.method("decode")(z)).detach(), e_made


@pytest.fixture
def scene(toy_stream, toy_model):
    def make(scenario="class", temperature=None):
        stream = toy_stream(scenario)
        return Scene(stream, toy_model(stream), temperature)

    return make


# --------------------------------------------------------------------------- the formula


def vae_by_hand(model, x, noise):
    """Return the autoencoder's loss of one row, in plain Python."""
    mean, log_variance = (part[0].tolist() for part in model.encode(x[None]))
    z = [
        m + math.exp(v / 2) * e for m, v, e in zip(mean, log_variance, noise.tolist(), strict=True)
    ]
    pixels = torch.sigmoid(model.decode(torch.tensor([z])))[0].flatten().tolist()
    seen = x.flatten().tolist()
    apart = -sum(
        a * math.log(p) + (1 - a) * math.log(1 - p) for a, p in zip(seen, pixels, strict=True)
    )
    divergence = (
        sum(m * m + math.exp(v) - 1 - v for m, v in zip(mean, log_variance, strict=True)) / 2
    )
    return (apart + divergence) / len(seen)


def answer_by_hand(scenario, temperature, new, old):
    """Return the distillation of one generated row; classes 0, 1 are old and 2, 3 are new."""
    width = len(new)
    asked = [0, 1] if scenario != "domain" else list(range(width))
    answering = {"task": [0, 1], "class": list(range(width)), "domain": asked}[scenario]

    def softened(logits, classes, t):
        scaled = {c: math.exp(logits[c] / t) for c in classes}
        return {c: value / sum(scaled.values()) for c, value in scaled.items()}

    if temperature is None:
        most = max(asked, key=lambda c: old[c])
        return -math.log(softened(new, answering, 1.0)[most])
    q = softened(old, asked, temperature)
    p = softened(new, answering, temperature)
    return -sum(q[c] * math.log(p[c]) for c in asked)


@pytest.mark.reference
@pytest.mark.parametrize("temperature", [None, 3.0])
@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_the_generative_replay_loss_equals_its_formula(scene, scenario, temperature):
    it = scene(scenario, temperature)
    mine = it.losses(Forward(it.model), it.batch)
    e, made, e_made = it.made()
    with torch.no_grad():
        of_rows = it.model(it.batch.inputs).tolist()
        of_made = it.model(made).tolist()
        of_teacher = Forward(it.model, it.teacher)(made).tolist()
        for i, label in enumerate(it.batch.labels.tolist()):
            compete = [2, 3] if scenario == "task" else list(range(len(of_rows[i])))
            entropy = math.log(sum(math.exp(of_rows[i][c]) for c in compete)) - of_rows[i][label]
            new = entropy + vae_by_hand(it.model, it.batch.inputs[i], e[i])
            old = answer_by_hand(scenario, temperature, of_made[i], of_teacher[i])
            old += vae_by_hand(it.model, made[i], e_made[i])
            assert mine[i].item() == pytest.approx((new + old) / 2, rel=1e-4)


@pytest.mark.reference
def test_the_distillation_loss_averages_over_earlier_tasks():
    at = contexts(split(digits(), scenario="task", experiences=5), "cpu")(4)
    new, old = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).split(3)
    mine = distillation(torch.cat([new, old]), torch.cat([old, new]), at, None)
    each = [
        answer_by_hand("task", None, z[2 * k : 2 * k + 2], t[2 * k : 2 * k + 2])
        for z, t in zip([*new.tolist(), *old.tolist()], [*old.tolist(), *new.tolist()], strict=True)
        for k in range(4)
    ]
    torch.testing.assert_close(mine, torch.tensor(each).view(6, 4).mean(1))


@pytest.mark.reference
def test_the_vae_loss_is_minus_the_evidence_lower_bound(toy_stream, toy_model):
    """With one latent number, p(x) is an integral over a line. Means are over 4,000 draws; the gap
    is far above them.

    Means over 4,000 draws; the gap is far above them.
    """
    stream = toy_stream()
    model = with_generator(toy_model(stream), stream, latent=1).eval()
    rows = stream[0].train.inputs[:4]
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    draws = 4000
    with torch.no_grad():
        for value in model.decoder.parameters():
            # so that the latent number matters, and the bound is far from the evidence
            value.mul_(4)
        logits = model.decode(z.float()[:, None]).double()
        noise = drawn(torch.arange(draws), torch.tensor(0), 1, 0)
        for x in rows:
            given = -F.binary_cross_entropy_with_logits(
                logits, x.double().expand_as(logits), reduction="none"
            ).sum(1)
            prior = -(z**2) / 2 - math.log(2 * math.pi) / 2
            evidence = torch.logsumexp(given + prior, 0) + math.log(16 / 4000)
            losses = vae_loss(Forward(model), x.expand(draws, -1), noise).double() * len(x)
            mean, variance = (value[0].double() for value in model.encode(x[None]))
            # the bound is loose by the divergence of q from the true posterior
            posterior = given + prior - evidence
            q = -((z - mean) ** 2) / (2 * variance.exp()) - (variance + math.log(2 * math.pi)) / 2
            loose = (q.exp() * (q - posterior)).sum() * 16 / 4000
            error = losses.std() / math.sqrt(draws)
            assert loose > 20 * error
            assert abs(-losses.mean() - (evidence - loose)) < 5 * error


def test_generative_replay_starts_without_a_teacher(scene):
    it = scene()
    at = contexts(it.stream, "cpu")(0)
    batch = Batch.current(it.stream[0].train, 0)
    poisoned = it.state.replace_group(
        "teacher", {n: torch.full_like(t, math.nan) for n, t in it.teacher.items()}
    )
    e = drawn(batch.ids, torch.tensor(11), 3 * LATENT, 4)[:, :LATENT]
    entropy = F.cross_entropy(
        at.mask(it.model(batch.inputs), batch), batch.labels, reduction="none"
    )
    mine = it.strategy.losses(Forward(it.model), batch, at, poisoned)
    torch.testing.assert_close(mine, entropy + vae_loss(Forward(it.model), batch.inputs, e))


def test_teacher_classifier_and_generator_share_no_gradient(scene):
    it = scene()
    leaves = {name: value.clone().requires_grad_() for name, value in it.teacher.items()}
    loss = it.losses(Forward(it.model), it.batch, it.state.replace_group("teacher", leaves)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
    assert grads == (None,) * len(leaves)
    _, made, _ = it.made()
    targets = torch.where(it.at.task_classes[0], Forward(it.model, it.teacher)(made), -1e9).argmax(
        1
    )
    alone = F.cross_entropy(
        it.at.mask(it.model(it.batch.inputs), it.batch), it.batch.labels, reduction="sum"
    )
    alone = (alone + F.cross_entropy(it.model(made), targets, reduction="sum")) / 2
    own = [
        value for name, value in it.model.named_parameters() if name.startswith(("body.", "head."))
    ]
    for mine, expected in zip(
        torch.autograd.grad(loss, own), torch.autograd.grad(alone, own), strict=True
    ):
        torch.testing.assert_close(mine, expected)


# --------------------------------------------------------------------------- what is drawn


def test_generated_rows_depend_only_on_the_record_and_the_step(scene):
    it = scene()

    def at(step, batch=it.batch):
        return it.losses(
            Forward(it.model), batch, it.state.replace({"steps": torch.tensor(step)})
        ).detach()

    assert torch.equal(at(3), at(3)) and (at(3) != at(4)).all()
    twins = it.batch.take(torch.zeros(24, dtype=torch.int64))
    renumbered = Batch.from_tensors(twins.tensors() | {"ids": torch.arange(24)})
    assert distinct_rows(at(3, twins)[:, None], rtol=1e-5) == 1
    assert distinct_rows(at(3, renumbered)[:, None], rtol=1e-5) == 24
    other = GenerativeReplay(seed=5).losses(Forward(it.model), it.batch, it.at, it.state)
    assert (other != at(11)).all()


def test_the_replay_teacher_is_the_model_of_the_last_experience(toy_stream, toy_model):
    stream = toy_stream()
    seen = []
    ends = []

    def look(point, learner):
        if point == "step.done":
            seen.append(
                (int(learner.state["steps"]), learner.state["teacher/decoder.0.weight"].clone())
            )
        if point == "experience.end":
            ends.append(learner.model.decoder[0].weight.detach().clone())

    model = with_generator(toy_model(stream), stream)
    start = model.decoder[0].weight.detach().clone()
    options = {"optimizer": torch.optim.Adam, "iterations": 3, "batch_size": 8, "callbacks": [look]}
    Learner(model=model, strategy=GenerativeReplay(), **options).fit(stream)
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6]
    for (_, teacher), expected in zip(seen, [start] * 3 + [ends[0]] * 3, strict=True):
        assert torch.equal(teacher, expected)
    assert not torch.equal(start, ends[0])


# --------------------------------------------------------------------------- per record


@pytest.mark.reference
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("temperature", [None, 2.0])
def test_book_keeping_of_generative_replay_equals_single_records(scene, temperature, per_layer):
    it = scene("class", temperature)
    params = dict(it.model.named_parameters())
    each = [
        torch.autograd.grad(loss, list(params.values()), retain_graph=True)
        for loss in it.losses(Forward(it.model), it.batch)
    ]
    norms = torch.tensor(
        [math.sqrt(sum(float(g.double().square().sum()) for g in row)) for row in each]
    )
    clip = Clip(norm=float(norms.median()), per_layer=per_layer)
    n = len(it.batch)
    mine = clipped_gradient_sum(
        it.model, params, lambda: it.losses(Forward(it.model), it.batch), n, clip
    )
    expected = clipped_sum(gradient_rows(it.losses, it.model), params, it.batch.tensors(), clip, n)
    assert mine is not None and mine.keys() == expected.keys() == params.keys()
    for name, value in expected.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5)
    if not per_layer:
        factors = (clip.norm / norms).clamp(max=1)
        by_hand = sum(f * row[0] for f, row in zip(factors, each, strict=True))
        torch.testing.assert_close(mine[next(iter(params))], by_hand, rtol=1e-4, atol=1e-5)
        assert 0 < int((factors < 1).sum()) < n


def test_private_generative_replay_releases_only_gradients(toy_stream, toy_model):
    stream = toy_stream()
    learner = Learner(
        model=with_generator(toy_model(stream), stream),
        strategy=GenerativeReplay(),
        optimizer=torch.optim.Adam,
        iterations=4,
        batch_size=8,
        privacy=Privacy(noise_multiplier=1.0, seed=0),
    )
    assert learner.fit(stream).isfinite().all()
    entries = learner.private_sum.ledger.entries
    assert {entry.purpose for entry in entries} == {"gradient"} and sum(
        entry.steps for entry in entries
    ) == 8
    first = stream[0].train.partition
    assert sum(entry.steps for entry in entries if first in entry.scope) == 4
    assert learner.session.held.memory.rows is None


def test_generative_replay_can_be_audited(toy_stream, toy_model):
    """The audit adds a probe to the model, which must still offer `encode` and `decode`."""
    stream = toy_stream()
    learner = Learner(
        model=with_generator(toy_model(stream), stream),
        strategy=GenerativeReplay(),
        optimizer=torch.optim.SGD,
        iterations=3,
        batch_size=8,
        privacy=Privacy(noise_multiplier=2.0, seed=0),
    )
    found = audit(learner, stream, canaries=20)
    assert found.canaries == 20 and found.steps == 3 and 0 < found.claimed < math.inf


def test_generative_replay_runs_with_dropout_and_bfloat16(toy_stream):
    stream = toy_stream()
    body = nn.Sequential(nn.Linear(5, 8), nn.GroupNorm(2, 8), nn.Tanh(), nn.Dropout(0.2))
    for privacy, precision in (
        (Privacy(noise_multiplier=1.0, seed=0), "float32"),
        (None, "bfloat16"),
    ):
        learner = Learner(
            model=with_generator(Classifier(copy.deepcopy(body), 8, 4), stream),
            strategy=GenerativeReplay(),
            iterations=2,
            batch_size=8,
            optimizer=torch.optim.SGD,
            privacy=privacy,
            precision=precision,
        )
        assert learner.fit(stream).isfinite().all()
        assert all(value.isfinite().all() for value in learner.model.parameters())


# --------------------------------------------------------------------------- what the paper claims


def digits_of(strategy, seed):
    stream = split(digits(), scenario="class", experiences=2, seed=seed)
    classifier = mlp(input_shape=stream.input_shape, num_classes=10, hidden=(60,), seed=seed)
    learner = Learner(
        model=with_generator(classifier, stream, latent=10, hidden=(60,)),
        strategy=strategy,
        iterations=120,
        optimizer=partial(torch.optim.Adam, lr=3e-3),
        batch_size=64,
        seed=seed,
    )
    return learner, float(average_accuracy(learner.fit(stream)))


def test_generative_replay_forgets_less_than_plain_training():
    for seed in range(1):
        learner, accuracy = digits_of(GenerativeReplay(), seed)
        assert accuracy > digits_of(Naive(), seed)[1] + 20
        with torch.no_grad():
            made = torch.sigmoid(
                learner.model.decode(drawn(torch.arange(600), torch.tensor(-1), 10, 0))
            )
            named = learner.predictor(0, after=1)(made).argmax(1)
        train = [experience.train for experience in learner.stream]
        assert min(int(torch.isin(named, records.labels).sum()) for records in train) > 100, (
            "both halves are made up"
        )
        for records in train:
            for label in records.labels.unique():
                if int((named == label).sum()) < 10:
                    continue
                seen, shown = (
                    part.mean(0).flatten()
                    for part in (records.inputs[records.labels == label], made[named == label])
                )
                assert float(torch.corrcoef(torch.stack([seen, shown]))[0, 1]) > 0.7


def test_a_config_can_use_generative_replay(tmp_path):
    text = """
    name = "made-up"
    [data]
    experiences = 2
    [model]
    name = "generative"
    hidden = [8]
    latent = 2
    [training]
    iterations = 2
    [[arms]]
    strategy = "generative_replay"
    temperature = 2.0
    """
    result = run(parse(text), text, tmp_path / "run", lambda arm, share, state: None)
    assert [row["strategy"] for row in result["arms"]] == ["generative_replay"]


# --------------------------------------------------------------------------- what it cannot take


def test_generative_replay_refuses_a_model_without_a_generator(toy_stream, toy_model):
    stream = toy_stream()
    learner = Learner(
        model=toy_model(stream),
        strategy=GenerativeReplay(),
        optimizer=torch.optim.SGD,
        iterations=1,
        batch_size=8,
    )
    with pytest.raises(
        StrategyError, match=r"needs a model with a generator.*perdure.models.generative"
    ):
        learner.fit(stream)
    small = GenerativeReplay().small_model(input_shape=(5,), num_classes=4)
    assert isinstance(small, Generative) and isinstance(
        GenerativeReplay().init(
            Spec(
                params=dict(small.named_parameters()),
                num_classes=4,
                num_experiences=2,
                feature_size=8,
                scenario="class",
            )
        ),
        State,
    )


@pytest.mark.parametrize("outside", [-0.4, 1.2, math.nan])
def test_generative_replay_refuses_inputs_outside_0_to_1(toy_stream, outside):
    experience = toy_stream()[0]
    assert GenerativeReplay().plan(experience).train
    inputs = experience.test.inputs.clone()
    inputs[0, 0] = outside
    changed = replace(experience, test=replace(experience.test, inputs=inputs))
    with pytest.raises(StrategyError, match=r"inputs are from .* in \[0, 1\]; scale the inputs"):
        GenerativeReplay().plan(changed)


def test_the_vae_loss_clamps_inputs_outside_0_to_1(toy_stream, toy_model):
    stream = toy_stream()
    forward = Forward(with_generator(toy_model(stream), stream))
    x = stream[0].train.inputs[:2] + torch.tensor([[9.0], [-9.0]])
    noise = torch.zeros(2, LATENT)
    mean, log_variance = forward.method("encode")(x)
    logits = forward.method("decode")(mean)
    ends = torch.tensor([[1.0], [0.0]]).expand_as(logits)
    apart = F.binary_cross_entropy_with_logits(logits, ends, reduction="none").sum(1)
    divergence = (mean**2 + log_variance.exp() - 1 - log_variance).sum(1) / 2
    torch.testing.assert_close(vae_loss(forward, x, noise), (apart + divergence) / 5)


def test_generative_replay_refuses_images_of_another_size():
    stream = split(digits(), scenario="class", experiences=2)
    classifier = cnn(input_shape=(1, 8, 8), num_classes=10, width=4, seed=0)
    learner = Learner(
        model=generative(classifier, input_shape=(1, 6, 6), latent=2, hidden=(4,)),
        strategy=GenerativeReplay(),
        optimizer=torch.optim.SGD,
        iterations=1,
        batch_size=8,
    )
    with pytest.raises(
        ConfigError, match=r"input shape = \(1, 8, 8\) .*\(1, 6, 6\), as the generator was made for"
    ):
        learner.fit(stream)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_generative_replay_refuses_a_temperature_of_0_or_less(temperature):
    with pytest.raises(ConfigError, match=r"generative_replay\.temperature = "):
        GenerativeReplay(temperature=temperature)
