import copy
import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import nn

from perdure.contract.context import Spec, contexts
from perdure.contract.forward import Forward
from perdure.contract.plan import MemoryPlan, Plan, PrivacyCost
from perdure.contract.strategy import Strategy
from perdure.data.datasets.digits import digits
from perdure.data.records import Batch
from perdure.data.scenarios import split
from perdure.errors import ConfigError, StrategyError
from perdure.learner.learner import Learner
from perdure.metrics import average_accuracy
from perdure.models.classifier import Classifier
from perdure.models.classifiers import mlp
from perdure.privacy.settings import Privacy
from perdure.strategies import LUCIR
from perdure.tasks import MASKED
from perdure.testing.fixtures import small_stream

STRENGTH = 3.0
RANKING = 0.7
MARGIN = 0.4


@dataclass(frozen=True, kw_only=True)
class Pooled(Strategy):
    """Cross entropy over the same pool, without other terms."""

    memory_size: int
    privacy_cost = PrivacyCost(reuses_past_records=True)

    def plan(self, experience):
        return Plan(memory=MemoryPlan(capacity=self.memory_size, selection="herding", use="pooled"))


def model_of(stream, seed=3, head="cosine", hidden=(6,)):
    return mlp(
        input_shape=stream.input_shape,
        num_classes=stream.num_classes,
        hidden=hidden,
        seed=seed,
        activation="tanh",
        head=head,
    )


def learner_of(strategy, stream, seed=0, head="cosine", **changes):
    options = {
        "optimizer": partial(torch.optim.Adam, lr=3e-3),
        "iterations": 100,
        "batch_size": 64,
        "seed": seed,
    }
    return Learner(
        model=model_of(stream, seed, head, (50,)), strategy=strategy, **options | changes
    )


def spec_of(model, scenario="class", classes=6):
    params = {name: value.detach().clone() for name, value in model.named_parameters()}
    return Spec(
        params=params, num_classes=classes, num_experiences=3, feature_size=6, scenario=scenario
    )


def scene(experience, strategy):
    """Return a model, a different teacher, stored embeddings, and rows of all classes so far."""
    stream = small_stream("class")
    model = model_of(stream).eval()
    teacher = model_of(stream, seed=4)
    then = {name: value.detach().clone() for name, value in teacher.named_parameters()}
    held = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    state = strategy.init(spec_of(model)).replace_group("teacher", then)
    state = state.replace({"held": held, "records": torch.tensor(24.0)})
    batches = [Batch.current(stream[index].train, index) for index in range(experience + 1)]
    tensors = [batch.tensors() for batch in batches]
    batch = Batch.from_tensors(
        {name: torch.cat([part[name] for part in tensors]) for name in tensors[0]}
    )
    return model, teacher, state, batch, contexts(stream, "cpu")(experience, declared_size=12)


def unit(vector):
    return [value / math.hypot(*vector) for value in vector]


def dot(one, other):
    return sum(x * y for x, y in zip(one, other, strict=True))


def by_hand(features, then, weight, scale, label, experience, negatives, rate):
    """Return one record's loss in plain Python, with two classes per experience."""
    seen = range(2 * experience + 2)
    old = range(2 * experience)
    cosines = [dot(unit(features), unit(row)) for row in weight]
    exps = [math.exp(scale * cosines[c]) for c in seen]
    loss = -math.log(exps[label] / sum(exps))
    loss += STRENGTH * math.sqrt(len(old) / 2) * (1 - dot(unit(features), unit(then)))
    if label in old:
        rivals = sorted((cosines[c] for c in seen if c not in old), reverse=True)[:negatives]
        loss += RANKING * rate * sum(max(0.0, MARGIN - cosines[label] + rival) for rival in rivals)
    return loss


# --------------------------------------------------------------------------- the loss


@pytest.mark.reference
@pytest.mark.parametrize("experience", [1, 2])
@pytest.mark.parametrize("negatives", [1, 2, 9])
def test_the_lucir_loss_equals_its_formula(experience, negatives):
    strategy = LUCIR(
        memory_size=8, less_forget=STRENGTH, ranking=RANKING, margin=MARGIN, negatives=negatives
    )
    model, teacher, state, batch, at = scene(experience, strategy)
    mine = strategy.losses(Forward(model), batch, at, state)
    weight = torch.where(
        (torch.arange(6) < 2 * experience)[:, None], state["held"], model.head.weight.detach()
    )
    features = model.features(batch.inputs).tolist()
    then = teacher.features(batch.inputs).tolist()
    ranked = 0
    for i, label in enumerate(batch.labels.tolist()):
        given = (
            features[i],
            then[i],
            weight.tolist(),
            float(model.head.scale.detach()),
            label,
            experience,
            negatives,
        )
        expected = by_hand(*given, rate=(12 + 8) / 8)
        ranked += expected != by_hand(*given, rate=0.0)
        assert mine[i].item() == pytest.approx(expected, rel=1e-4)
    assert 0 < ranked <= 12 * experience < len(batch)


def test_lucir_is_cross_entropy_in_the_first_experience():
    strategy = LUCIR(memory_size=8)
    model, _, state, batch, at = scene(0, strategy)
    spoilt = state.replace(
        {name: torch.full_like(value, math.nan) for name, value in state.items()}
    )
    plain = nn.functional.cross_entropy(
        at.mask(model(batch.inputs), batch), batch.labels, reduction="none"
    )
    torch.testing.assert_close(strategy.losses(Forward(model), batch, at, spoilt), plain)


@pytest.mark.parametrize(("stored", "rate"), [(24.0, 20 / 8), (4.0, 16 / 4), (0.0, 13.0)])
def test_lucir_weighs_the_ranking_loss_by_declared_memory_share(stored, rate):
    """Memory holds 8 records, or all records so far."""
    strategy = LUCIR(memory_size=8, less_forget=0.0)
    model, _, state, batch, at = scene(1, strategy)
    state = state.replace({"records": torch.tensor(stored)})
    without = replace(strategy, ranking=0.0).losses(Forward(model), batch, at, state)
    ranked = strategy.losses(Forward(model), batch, at, state) - without
    once = replace(strategy, ranking=1 / rate).losses(Forward(model), batch, at, state) - without
    torch.testing.assert_close(ranked, rate * once, rtol=1e-3, atol=1e-4)
    short = (0.5 - angle(model, state, batch) + rivals(model, state, batch)).clamp(min=0).sum(1)
    torch.testing.assert_close(once[:12], short[:12], rtol=1e-3, atol=1e-4)
    assert (ranked[12:] == 0).all() and float(ranked[:12].detach().max()) > 0


def angle(model, state, batch):
    held = state["held"][batch.labels]
    return nn.functional.cosine_similarity(model.features(batch.inputs), held, dim=1)[:, None]


def rivals(model, state, batch):
    rows = model.head.weight[2:4]
    return nn.functional.cosine_similarity(model.features(batch.inputs)[:, None], rows, dim=2)


def test_lucir_without_a_new_class_has_no_ranking_loss():
    strategy = LUCIR(memory_size=8)
    model, _, state, batch, at = scene(1, strategy)
    again = replace(at, task_classes=at.task_classes[[0, 0, 0]], seen=at.task_classes[0])
    losses = strategy.losses(Forward(model), batch.take(slice(0, 12)), again, state)
    unranked = replace(strategy, ranking=0.0).losses(
        Forward(model), batch.take(slice(0, 12)), again, state
    )
    assert torch.isfinite(losses).all() and torch.equal(losses, unranked)


# --------------------------------------------------------------------------- what is held


def test_lucir_gives_teacher_and_old_class_weights_no_gradient():
    strategy = LUCIR(memory_size=8)
    model, _, state, batch, at = scene(1, strategy)
    leaves = {
        name: value.clone().requires_grad_()
        for name, value in state.items()
        if name.startswith("teacher/")
    }
    strategy.losses(Forward(model), batch, at, state.replace(leaves)).sum().backward()
    assert all(leaf.grad is None for leaf in leaves.values())
    assert (model.head.weight.grad[:2] == 0).all() and (model.head.weight.grad[4:] == 0).all()
    assert (model.head.weight.grad[2:4] != 0).any(dim=1).all() and float(model.head.scale.grad) != 0


@pytest.mark.parametrize("privacy", [None, Privacy(noise_multiplier=1.0, seed=0)])
def test_old_class_weights_of_lucir_do_not_change_in_training(privacy):
    """Momentum, weight decay and noise change the model's own rows, but not the rows used for
    predictions.
    """
    stream = small_stream("class")
    optimizer = partial(torch.optim.SGD, lr=0.2, momentum=0.9, weight_decay=0.1)
    learner = learner_of(
        LUCIR(memory_size=8), stream, optimizer=optimizer, iterations=6, privacy=privacy
    )
    learner.prepare(stream)
    ends = []
    for index in range(3):
        learner.begin(index)
        learner.train(range(learner.training.steps(index)))
        learner.finish()
        ends.append(learner.params["head.weight"].detach().clone())
    expected = torch.cat([ends[0][:2], ends[1][2:4], ends[2][4:]])
    assert torch.equal(learner.state["held"], expected)
    assert not torch.equal(ends[2][:4], expected[:4])
    x = stream[0].test.inputs
    with torch.no_grad():
        logits = learner.predictor(0, after=2)(x)
        features = learner.model.features(x)
        mine = (
            nn.functional.cosine_similarity(features[:, None], expected, dim=2)
            * learner.model.head.scale
        )
        torch.testing.assert_close(logits, mine)
        early = learner.predictor(0, after=0)(x)
    assert (early[:, 2:] == MASKED).all()
    assert float(learner.state["records"]) == 36


# --------------------------------------------------------------------------- what it is for


def answered_as_new(learner, stream):
    """Return the share of earlier test records that are predicted as a class of the last
    experience.
    """
    predict = learner.predictor(0, after=len(stream) - 1)
    newest = list(stream[-1].classes)
    with torch.no_grad():
        answers = torch.cat([predict(e.test.inputs).argmax(1) for e in stream.experiences[:-1]])
    return float(torch.isin(answers, torch.tensor(newest)).float().mean())


def test_lucir_confuses_old_with_new_less_than_pooled_replay():
    stream = split(digits(), scenario="class", experiences=5)
    found = {}
    for name, strategy, head in (
        ("linear", Pooled(memory_size=30), "linear"),
        ("cosine", LUCIR(memory_size=30), "cosine"),
    ):
        learner = learner_of(strategy, stream, head=head, iterations=60)
        found[name] = average_accuracy(learner.fit(stream)), answered_as_new(learner, stream)
    assert found["cosine"][0] > found["linear"][0] + 3
    assert found["cosine"][1] < 0.5 * found["linear"][1] and found["linear"][1] > 0.05


def test_private_lucir_releases_only_gradients():
    stream = split(digits(), scenario="class", experiences=2)
    learner = learner_of(
        LUCIR(memory_size=50), stream, iterations=4, privacy=Privacy(noise_multiplier=1.0, seed=0)
    )
    assert learner.fit(stream).isfinite().all()
    assert {entry.purpose for entry in learner.private_sum.ledger.entries} == {"gradient"}
    # those who may be stored are charged again
    assert len(learner.private_sum.ledger.entries[-1].scope) == 2


def test_lucir_trains_with_normalisation_and_dropout():
    stream = small_stream("class")
    body = nn.Sequential(nn.Linear(4, 8), nn.GroupNorm(2, 8), nn.Tanh(), nn.Dropout(0.2))
    for privacy in (None, Privacy(noise_multiplier=1.0, seed=0)):
        learner = Learner(
            model=Classifier(copy.deepcopy(body), 8, 6, "cosine"),
            strategy=LUCIR(memory_size=8),
            optimizer=torch.optim.SGD,
            iterations=2,
            batch_size=8,
            privacy=privacy,
        )
        assert learner.fit(stream).isfinite().all()


# --------------------------------------------------------------------------- refusals


def test_lucir_refuses_other_scenarios_and_a_linear_head():
    stream = small_stream("class")
    strategy = LUCIR(memory_size=8)
    for scenario in ("task", "domain"):
        with pytest.raises(StrategyError, match="use Replay for this stream"):
            strategy.init(spec_of(model_of(stream), scenario))
    with pytest.raises(StrategyError, match='build the model with head="cosine"'):
        strategy.init(spec_of(model_of(stream, head="linear")))
    assert strategy.init(spec_of(strategy.small_model(input_shape=(4,), num_classes=6)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"less_forget": -1.0}, r"lucir.less_forget = -1\.0"),
        ({"less_forget": math.inf}, "lucir.less_forget = inf"),
        ({"ranking": math.nan}, "lucir.ranking = nan"),
        ({"margin": 2.5}, r"lucir.margin = 2\.5.*from 0 to 2"),
        ({"negatives": 0}, "lucir.negatives = 0"),
        ({"memory_size": 0}, "lucir.memory_size = 0"),
    ],
)
def test_lucir_refuses_invalid_options(options, message):
    with pytest.raises(ConfigError, match=message):
        LUCIR(**{"memory_size": 8} | options)
