from functools import partial

import torch
import torch.nn.functional as F

from perdure.learner.learner import Learner
from perdure.strategies import Joint, Naive


def fit(stream, model, strategy, **changes):
    options = {
        "optimizer": partial(torch.optim.Adam, lr=0.03),
        "epochs": 4,
        "batch_size": 8,
        "seed": 1,
    } | changes
    learner = Learner(model=model, strategy=strategy, **options)
    return learner, learner.fit(stream)


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_naive_equals_a_written_out_training_loop(toy_stream, toy_model):
    """A plain PyTorch loop over the same batches gives the same bits."""
    stream = toy_stream()
    batches = []

    def look(point, learner):
        if point == "experience.begin":
            batches.append(
                [
                    learner.session.held.sample(step)
                    for step in range(learner.training.steps(learner.position.experience))
                ]
            )

    learner, _ = fit(stream, toy_model(stream), Naive(), callbacks=[look])
    model = toy_model(stream)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for experience, steps in enumerate(batches):
        for batch in steps:
            logits = model(batch.inputs)
            logits = logits if experience else logits.index_fill(1, torch.tensor([2, 3]), -1e9)
            optimizer.zero_grad()
            F.cross_entropy(logits, batch.labels).backward()
            optimizer.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(
            weights(learner.model)[name], value.detach(), rtol=1e-5, atol=1e-6
        )


def test_joint_restarts_on_a_pool_of_all_records(toy_stream, toy_model):
    stream = toy_stream()
    model = toy_model(toy_stream())
    starts = []
    pools = []
    initial = weights(model)

    def look(point, learner):
        if point == "experience.begin":
            starts.append(weights(learner.model))
            pools.append(learner.curator.raw("to look at it").ids.sort().values)
            assert not learner.current_optimizer.state_dict()["state"]  # and from a fresh optimiser

    fit(stream, model, Joint(), callbacks=[look])
    for start in starts:
        assert all(torch.equal(start[name], value) for name, value in initial.items())
    first, second = (experience.train.ids for experience in stream)
    assert torch.equal(pools[0], first.sort().values)
    assert torch.equal(pools[1], torch.cat([first, second]).sort().values)


def test_joint_trains_one_epoch_of_the_whole_pool(toy_stream, toy_model):
    stream = toy_stream()
    learner, _ = fit(stream, toy_model(stream), Joint())
    # 4 epochs of 24, then of 48, in batches of 8
    assert [learner.training.steps(index) for index in range(2)] == [12, 24]


def test_joint_forgets_less_than_naive(toy_stream, toy_model):
    stream = toy_stream()
    _, naive = fit(stream, toy_model(stream), Naive(), epochs=20)
    _, joint = fit(stream, toy_model(stream), Joint(), epochs=20)
    assert naive[0, 0] > 90 and naive[1, 0] < 10 and naive[1, 1] > 90
    assert joint[1].min() > 80 and joint[0, 1] == 0  # classes not yet seen are never predicted
