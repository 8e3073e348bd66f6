"""Prompts: selection and weights against loops over single records, and initial values."""

import pytest
import torch

from perdure.contract.forward import Forward
from perdure.errors import ConfigError
from perdure.models.prompts import composed, prompted
from perdure.models.vision_transformer import Addition, transformer

WIDTH = 8
N = 6


def backbone():
    return moved(
        transformer(input_shape=(6,), num_classes=1, seed=0, patch=2, width=WIDTH, depth=3, heads=2)
    ).body


def moved(model):
    place = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.5 * torch.randn(value.shape, generator=place))
    return model


def inputs(n=N):
    return 3 * torch.randn(n, 6, generator=torch.Generator().manual_seed(2))


def cos(a, b):
    return float(a @ b / (a.norm() * b.norm()))


# --------------------------------------------------------------------------- a pool


@torch.no_grad()
def by_hand(model, x, length, chosen):
    """Return, for one record, the query, the nearest keys, and the mean of the prompts' last
    states.
    """
    body = model.body
    plain = backbone()
    keys = body.keys.weight
    prompts = body.prompts.weight
    query = plain(x[None])[0]
    order = sorted(range(len(keys)), key=lambda m: -cos(query, keys[m]))[:chosen]
    tokens = torch.cat([*(prompts[m].view(length, WIDTH) for m in order), plain.tokens(x[None])[0]])
    states = plain.encode(tokens[None])[0]
    return states[: chosen * length].mean(0), [cos(query, keys[m]) for m in order], order


@torch.no_grad()
def test_every_record_uses_the_prompts_with_the_nearest_keys():
    model = moved(prompted(backbone(), num_classes=4, pool=6, length=2, chosen=3))
    x = inputs()
    orders = []
    logits, similarity = model.matched(x)
    for row in range(N):
        features, similarities, order = by_hand(model, x[row], 2, 3)
        torch.testing.assert_close(logits[row], model.head(features), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            similarity[row], torch.tensor(similarities), rtol=1e-4, atol=1e-5
        )
        orders.append(tuple(order))
    assert torch.equal(model(x), logits)
    assert len(set(orders)) > 1, "all pick alike, so that a choice for the batch would pass"


def test_prompts_that_are_not_used_have_no_gradient():
    model = moved(prompted(backbone(), num_classes=4, pool=6, length=2, chosen=2))
    x = inputs(1)
    logits, similarity = model.matched(x)
    (logits.sum() + similarity.sum()).backward()
    picked = set(by_hand(model, x[0], 2, 2)[2])
    for table in (model.body.prompts, model.body.keys):
        assert {m for m in range(6) if float(table.weight.grad[m].abs().max()) > 0} == picked


def test_gradients_reach_the_inputs_of_prompted_models():
    for model in (
        prompted(backbone(), num_classes=4),
        composed(backbone(), num_classes=4, experiences=2),
    ):
        x = inputs().requires_grad_()
        model(x).sum().backward()
        assert float(x.grad.abs().max()) > 0


# --------------------------------------------------------------------------- components


@torch.no_grad()
@pytest.mark.parametrize("experience", [0, 1])
def test_prefixes_are_sums_of_components_weighted_by_attention(experience):
    model = moved(
        composed(backbone(), num_classes=4, experiences=2, components=3, length=2, depth=2)
    )
    x = inputs()
    plain = backbone()
    for row in range(N):
        query = plain(x[row][None])[0]
        additions = []
        for block in range(2):
            prefix = torch.zeros(2 * 2 * WIDTH)
            for components in (model.body.components[t][block] for t in range(experience + 1)):
                for m in range(3):
                    weight = cos(query * components.attention.weight[m], components.keys.weight[m])
                    prefix += weight * components.prompts.weight[:, m]
            keys, values = prefix.view(2, 1, 2, WIDTH)
            additions.append(Addition(keys=keys, values=values))
        features = plain.encode(plain.tokens(x[row][None]), additions)[0, 0]
        torch.testing.assert_close(
            model.upto(x, experience)[row], model.head(features), rtol=1e-4, atol=1e-5
        )


def test_upto_uses_only_components_up_to_the_experience():
    model = composed(backbone(), num_classes=4, experiences=3, components=2, length=2)
    x = inputs()
    before = [model.upto(x, t) for t in range(3)]
    assert torch.equal(before[2], model(x)) and not torch.equal(before[1], before[2])
    with torch.no_grad():
        for value in model.body.components[2].parameters():
            value.mul_(3).add_(1)
    after = [model.upto(x, t) for t in range(3)]
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert not torch.equal(before[2], after[2])


def test_all_prompt_components_start_orthonormal():
    model = composed(backbone(), num_classes=4, experiences=2, components=3, length=2)
    for block in range(3):
        sets = [experience[block] for experience in model.body.components]
        for rows in (
            torch.cat([part.prompts.weight.T for part in sets]),
            torch.cat([part.keys.weight for part in sets]),
            torch.cat([part.attention.weight for part in sets]),
        ):
            torch.testing.assert_close(rows @ rows.T, torch.eye(6), atol=1e-5, rtol=0)


# --------------------------------------------------------------------------- building


def test_forward_runs_prompt_methods_with_other_parameters():
    model = moved(prompted(backbone(), num_classes=4))
    x = inputs()
    params = {name: value.detach() * 0.5 for name, value in model.named_parameters()}
    at = Forward(model, params)
    logits, similarity = at.method("matched")(x)
    assert torch.equal(logits, at(x)) and not torch.equal(
        logits, Forward(model).method("matched")(x)[0]
    )
    assert similarity.shape == (N, 5)
    teacher = Forward(model).at(dict(model.named_parameters())).method("matched")
    assert Forward(model).method("matched")(x)[0].requires_grad and not teacher(x)[0].requires_grad
    tuned = Forward(composed(backbone(), num_classes=4, experiences=2)).method("upto")
    assert not torch.equal(tuned(x, 0), tuned(x, 1))


@pytest.mark.parametrize("make", [prompted, composed])
def test_prompt_parameters_depend_only_on_the_seed(make):
    more = {} if make is prompted else {"experiences": 2}
    first, again, other = (make(backbone(), num_classes=4, seed=s, **more) for s in (1, 1, 2))
    states = [model.state_dict() for model in (first, again, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not any(torch.equal(value, states[2][name]) for name, value in states[0].items())


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (prompted, {"pool": 0}, "pool = 0"),
        (prompted, {"length": 0}, "length = 0"),
        (prompted, {"chosen": 0}, "chosen = 0"),
        (prompted, {"num_classes": 0}, "num_classes = 0"),
        (prompted, {"pool": 3, "chosen": 4}, "chosen = 4 .* at most pool = 3"),
        (composed, {"experiences": 0}, "experiences = 0"),
        (composed, {"components": 0}, "components = 0"),
        (composed, {"length": 0}, "length = 0"),
        (composed, {"depth": 0}, "depth = 0"),
        (composed, {"depth": 4}, "depth = 4 .* at most the 3 blocks"),
        (composed, {"components": 5}, "components = 5 .* width / experiences = 4"),
    ],
)
def test_prompted_models_refuse_invalid_numbers_of_prompts(make, changes, message):
    more = {"num_classes": 4} | ({} if make is prompted else {"experiences": 2})
    with pytest.raises(ConfigError, match=message):
        make(backbone(), **more | changes)
