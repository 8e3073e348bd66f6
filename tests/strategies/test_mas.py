from dataclasses import replace

import pytest
import torch

from helpers.parties import opened_party
from perdure.contract.context import Spec
from perdure.errors import ConfigError
from perdure.learner.learner import Learner
from perdure.privacy.settings import Privacy
from perdure.strategies import MAS


def consolidated(strategy, stream, model, index, state=None):
    params = {name: value.detach().clone() for name, value in model.named_parameters()}
    width = stream.num_classes
    spec = Spec(
        params=params,
        num_classes=width,
        num_experiences=2,
        feature_size=6,
        scenario=stream.scenario,
    )
    _, curator = opened_party(stream, model.eval(), experience=index)
    return strategy.after_experience(curator, params, state or strategy.init(spec)), params


def by_hand(model, records, classes):
    """Return the mean over records of |gradient of the squared norm of the logits of `classes`|,
    one backward pass per record.
    """
    sums = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for x in records.inputs:
        square = model(x[None])[0, classes].square().sum()
        for name, gradient in zip(
            sums, torch.autograd.grad(square, list(model.parameters())), strict=True
        ):
            sums[name] += gradient.abs() / len(records)
    return sums


@pytest.mark.reference
@pytest.mark.parametrize(
    ("scenario", "classes"),
    [("task", [2, 3]), ("class", [0, 1, 2, 3]), ("domain", [0, 1])],
    ids=str,
)
def test_the_mas_importance_equals_a_written_out_loop(toy_stream, toy_model, scenario, classes):
    stream = toy_stream(scenario)
    model = toy_model(stream)
    state, params = consolidated(MAS(strength=1.0), stream, model, 1)
    expected = by_hand(model, stream[1].train, classes)
    assert set(state.group("importance")) == set(params)
    for name, value in expected.items():
        torch.testing.assert_close(state[f"importance/{name}"], value, rtol=1e-4, atol=1e-6)
        assert torch.equal(state[f"anchor/{name}"], params[name])


def test_the_mas_importance_differs_from_the_mean_gradient(toy_stream, toy_model):
    """Records with opposite gradients both count; in the gradient of the mean they would cancel."""
    stream = toy_stream()
    records = stream[0].train
    opposed = replace(
        stream[0], train=replace(records, inputs=records.inputs - records.inputs.mean(0))
    )
    stream = replace(stream, experiences=(opposed, stream[1]))
    model = toy_model(stream)
    state, _ = consolidated(MAS(strength=1.0), stream, model, 0)
    mean = model(stream[0].train.inputs)[:, :2].square().sum(1).mean()
    batch = dict(
        zip(
            state.group("importance"),
            torch.autograd.grad(mean, list(model.parameters())),
            strict=True,
        )
    )
    ratios = [float(batch[n].abs().sum() / state[f"importance/{n}"].sum()) for n in batch]
    assert min(ratios) < 0.9 and max(ratios) < 1 + 1e-5


def test_the_mas_importance_is_added_up_over_experiences(toy_stream, toy_model):
    stream = toy_stream()
    strategy = MAS(strength=0.3)
    model = toy_model(stream)
    first, _ = consolidated(strategy, stream, model, 0)
    with torch.no_grad():
        model.head.weight.add_(0.5)
    alone, params = consolidated(strategy, stream, model, 1)
    both, _ = consolidated(strategy, stream, model, 1, first)
    at = {name: value + 0.1 for name, value in params.items()}
    total = sum((first[f"importance/{n}"] + alone[f"importance/{n}"]).sum() for n in params)
    torch.testing.assert_close(strategy.penalty(at, both), 0.3 * 0.01 * total, rtol=1e-4, atol=0)
    rules = {name.partition("/")[0]: rule for name, rule in both.rules.items()}
    assert rules == {"importance": "mean", "anchor": "local"}


def test_private_mas_makes_one_clipped_importance_release(toy_stream, toy_model):
    """The share of zeros is over 16 keys, because that of one, 64 numbers, varies with the noise
    (0.14 +- 0.04).
    """
    stream = toy_stream()
    values = []
    for seed in range(16):
        learner = Learner(
            model=toy_model(stream),
            strategy=MAS(strength=1.0),
            optimizer=torch.optim.SGD,
            iterations=2,
            batch_size=8,
            privacy=Privacy(noise_multiplier=1.0, clip_norm=0.2, seed=seed),
        )
        learner.fit(stream)
        released = [
            entry
            for entry in learner.private_sum.ledger.entries
            if entry.purpose == "release:importance"
        ]
        assert [entry.clip_norm for entry in released] == [0.2, 0.2]
        values += [value.flatten() for value in learner.state.group("importance").values()]
    values = torch.cat(values)
    # noise twice, cut at 0
    assert float(values.min()) == 0.0 and 0.1 < float((values == 0).float().mean()) < 0.5


@pytest.mark.parametrize("strength", [-1.0, float("inf"), float("nan")])
def test_mas_refuses_an_invalid_strength(strength):
    with pytest.raises(ConfigError, match=r"mas\.strength"):
        MAS(strength=strength)
