import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from perdure.contract.context import Spec, contexts
from perdure.contract.forward import Forward
from perdure.data.records import Batch
from perdure.errors import ConfigError
from perdure.learner.learner import Learner
from perdure.strategies import AttributionDistillation, LwF, Naive

EPSILON = 1e-4


@pytest.fixture
def problem(toy_stream, toy_model):
    stream = toy_stream()
    model = toy_model(stream).eval()
    teacher = {name: value.detach() + 0.3 for name, value in model.named_parameters()}
    spec = Spec(params=teacher, num_classes=4, num_experiences=2, feature_size=6, scenario="class")
    return stream, model, teacher, spec


def by_hand(forward, x, target, parts):
    """Direction of the occlusion map of one record, one part at a time."""
    with torch.no_grad():
        full = forward(x[None])[0, target]
        found = []
        for part in parts:
            changed = x.clone()
            changed[part] = 0
            found.append(float(full - forward(changed[None])[0, target]))
    size = math.sqrt(sum(value**2 for value in found) + EPSILON)
    return [value / size for value in found]


@pytest.mark.reference
def test_attribution_distillation_equals_its_formula(problem):
    stream, model, teacher, spec = problem
    strategy = AttributionDistillation(strength=0.7, distillation=0.4, temperature=3.0, cells=2)
    batch = Batch.current(stream[1].train, 1)
    at = contexts(stream, "cpu")(1)
    mine = strategy.losses(Forward(model), batch, at, strategy.init(spec))
    now, before = Forward(model), Forward(model).at(teacher)
    parts = [[0], [1], [2], [3, 4]]  # five numbers in four groups
    labels, kept = batch.labels, []
    with torch.no_grad():
        crossed = F.cross_entropy(now(batch.inputs), labels, reduction="none")
    for x in batch.inputs:
        answers = before(x[None])[0]
        target = int(answers[:2].argmax())
        q = F.softmax(answers[:2] / 3, dim=0)
        p = F.softmax(now(x[None]).detach()[0] / 3, dim=0)
        kept.append(float(-(q * p[:2].log()).sum()))
        u, v = by_hand(now, x, target, parts), by_hand(before, x, target, parts)
        kept[-1] = 0.4 * kept[-1] + 0.7 * sum(abs(a - b) for a, b in zip(u, v, strict=True))
    assert torch.allclose(mine.detach(), crossed + torch.tensor(kept), rtol=1e-4)
    assert min(kept) > 0.05


def test_attribution_distillation_starts_without_a_teacher(problem):
    stream, model, _, spec = problem
    strategy = AttributionDistillation()
    batch = Batch.current(stream[0].train, 0)
    at = contexts(stream, "cpu")(0)
    state = strategy.init(spec)
    poisoned = state.replace(
        {name: torch.full_like(value, math.nan) for name, value in state.items()}
    )
    plain = Naive().losses(Forward(model), batch, at, poisoned)
    torch.testing.assert_close(strategy.losses(Forward(model), batch, at, poisoned), plain)


def test_images_are_cut_into_a_grid_and_rows_into_runs():
    strategy = AttributionDistillation(cells=2)
    assert strategy.groups(torch.Size((1, 2, 4))).tolist() == [[[0, 0, 1, 1], [2, 2, 3, 3]]]
    assert strategy.groups(torch.Size((6,))).tolist() == [0, 1, 1, 2, 3, 3]
    assert strategy.groups(torch.Size((3,))).tolist() == [0, 1, 2]
    assert strategy.groups(torch.Size((1, 1, 5))).unique().tolist() == [0]


def test_attribution_maps_move_less_than_with_lwf_alone(toy_stream, toy_model):
    def moved(strategy):
        """Return the mean distance of the maps of an old class, for new inputs, from before."""
        stream = toy_stream()
        seen = []

        def look(point, learner):
            if point == "experience.end":
                forward, inputs = learner.session.forward, stream[1].train.inputs[:16]
                seen.append([by_hand(forward, x, 0, [[0], [1], [2], [3], [4]]) for x in inputs])

        Learner(
            model=toy_model(stream),
            strategy=strategy,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            iterations=60,
            batch_size=16,
            callbacks=[look],
            show_progress=False,
        ).fit(stream)
        return float((torch.tensor(seen[1]) - torch.tensor(seen[0])).abs().sum(1).mean())

    assert moved(AttributionDistillation(strength=2.0)) < 0.7 * moved(LwF())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"strength": -1.0}, "strength"),
        ({"distillation": math.inf}, "distillation"),
        ({"temperature": 0.0}, "temperature"),
        ({"cells": 0}, "cells"),
    ],
)
def test_attribution_distillation_refuses_a_wrong_field(change, field):
    with pytest.raises(ConfigError, match=f"attribution_distillation.{field}"):
        AttributionDistillation(**change)
