from functools import partial

import pytest
import torch

from perdure.contract.forward import Forward, cross_entropy_of
from perdure.data.records import Batch
from perdure.learner.learner import Learner
from perdure.privacy.clipping.clip import Clip
from perdure.privacy.settings import Privacy
from perdure.queries.batch_gradients import clipped_gradient, mean_gradient, micro_batches
from perdure.strategies.naive import Naive


def losses(forward, batch):
    return cross_entropy_of(forward(batch.inputs), batch.labels)


@pytest.fixture
def problem(toy_stream, toy_model):
    stream = toy_stream()
    model = toy_model(stream)
    return Forward(model), dict(model.named_parameters()), Batch.current(stream[0].train, 0)


def test_micro_batches_contain_every_row_once(problem):
    _, _, batch = problem
    assert [len(piece) for piece in micro_batches(batch, 7)] == [7, 7, 7, 3]
    assert torch.equal(torch.cat([piece.ids for piece in micro_batches(batch, 7)]), batch.ids)
    assert [len(piece) for size in (None, 24, 100) for piece in micro_batches(batch, size)] == [
        24,
        24,
        24,
    ]
    nobody = batch.take(slice(0, 0))
    assert [len(piece) for piece in micro_batches(nobody, 7)] == [0]


@pytest.mark.parametrize("size", [1, 5, 24])
def test_micro_batches_do_not_change_the_gradient(problem, size):
    forward, params, batch = problem
    valid = Batch.from_tensors(batch.tensors() | {"valid": torch.arange(24) % 3 != 0})
    for rows in (batch, valid):
        whole, loss = mean_gradient(forward, losses, params, rows, None)
        parts, same = mean_gradient(forward, losses, params, rows, size)
        torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(same.mean(), loss.mean())
    for clip in (Clip(norm=0.1), Clip(norm=0.1, per_layer=True), Clip(norm=0.5, counted=True)):
        whole = clipped_gradient(forward, losses, params, batch, clip, None)
        parts = clipped_gradient(forward, losses, params, batch, clip, size)
        assert whole.keys() == parts.keys()
        torch.testing.assert_close(parts, whole, check_dtype=False)
    assert (
        clipped_gradient(forward, losses, params, batch.take(slice(0, 0)), Clip(norm=1.0), size)
        is None
    )


def test_each_model_pass_has_at_most_micro_batch_size_rows(problem):
    forward, params, batch = problem
    seen = []

    def watched(forward, rows):
        seen.append(len(rows))
        return losses(forward, rows)

    mean_gradient(forward, watched, params, batch, 10)
    clipped_gradient(forward, watched, params, batch, Clip(norm=1.0), 10)
    # under privacy a model is rehearsed once, and the last pass is filled up
    assert seen == [10, 10, 4, 10, 9, 10, 10]


@pytest.mark.parametrize("private", [False, True])
def test_micro_batches_change_neither_training_nor_charges(toy_stream, toy_model, private):
    """Equal up to rounding and noise, because the noise depends on everything that shapes a sum."""
    ends = []
    charged = []
    nearly_silent = Privacy(noise_multiplier=1e-3, sampling_rate=1.0, seed=0)
    for size in (None, 3):
        stream = toy_stream()
        learner = Learner(
            model=toy_model(stream),
            strategy=Naive(),
            optimizer=partial(torch.optim.SGD, lr=0.5),
            iterations=10,
            batch_size=8,
            micro_batch_size=size,
            privacy=nearly_silent if private else None,
        )
        learner.prepare(stream)
        learner.begin(0)
        learner.train(learner.training.block(0, 0, 1))
        ends.append(learner.model.state_dict())
        charged.append(learner.private_sum.ledger.charges("experience-0") if private else ())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-2)
    assert charged[0] == charged[1] and bool(charged[0]) == private


def test_a_mask_of_ones_changes_no_bit_of_the_gradient(problem):
    """Valid rows are not multiplied by their mask; the reference multiplies them."""
    forward, params, batch = problem
    mean, loss = mean_gradient(forward, losses, params, batch, None)
    masked = (losses(forward, batch) * batch.valid).sum() / batch.valid.sum()
    expected = torch.autograd.grad(masked, list(params.values()))
    assert torch.equal(loss.mean(), masked.detach())
    assert all(map(torch.equal, mean.values(), expected))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("casting", [False, True], ids=["plain program", "casting program"])
def test_model_passes_run_in_the_given_precision(toy_stream, toy_model, precision, casting):
    stream = toy_stream()
    seen = set()

    class Watching(Naive):
        def losses(self, forward, batch, context, state):
            seen.add(str(forward(batch.inputs).dtype))
            return super().losses(forward, batch, context, state)

    learner = Learner(
        model=toy_model(stream),
        strategy=Watching(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        iterations=2,
        precision=precision,
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=casting):
        learner.fit(stream)
    assert seen == {f"torch.{precision}"}


def test_a_gradient_is_freed_before_the_next_loss_is_computed(toy_stream, toy_model):
    """So two gradients are never in memory at once."""
    stream = toy_stream()
    seen = []

    class Watching(Naive):
        def losses(self, forward, batch, context, state):
            seen.extend(param.grad for param in forward.module.parameters())
            return super().losses(forward, batch, context, state)

    learner = Learner(
        model=toy_model(stream),
        strategy=Watching(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        iterations=3,
    )
    learner.fit(stream)
    assert seen
    assert all(grad is None for grad in seen)
    assert all(param.grad is not None for param in learner.model.parameters())
