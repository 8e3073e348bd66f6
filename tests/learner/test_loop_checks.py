"""Misuse of a session in the user's own loop is refused at the wrong call."""

import pytest
import torch
import torch.nn.functional as F

from perdure import Privacy, Session
from perdure.errors import ConfigError, GuardError, LoopError, PrivacyError
from perdure.strategies import DER, Naive

SIMULATED = Privacy(noise_multiplier=1.0, seed=0)


@pytest.fixture
def session(toy_stream, toy_model):
    stream = toy_stream()
    model = toy_model(stream)
    return Session(
        model=model,
        strategy=DER(memory_size=8),
        stream=stream,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        iterations=3,
        batch_size=8,
    )


def step(session, batch):
    session.backward(batch)
    session.optimizer.step()
    session.after_step()


def run(session, index):
    with session.experience(index) as batches:
        for batch in batches:
            step(session, batch)


def misused(session, wrong):
    """Return the error message of one wrong step, and assert that nothing was consolidated."""
    with pytest.raises(LoopError) as caught, session.experience(0) as batches:
        for batch in batches:
            wrong(batch)
    assert session.position.experience == 0 and session.held.memory.latest < 0
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_session_refuses_a_second_backward_for_one_batch(session):
    def wrong(batch):
        session.backward(batch)
        session.backward(batch)

    assert "backward() was called twice in step 0" in misused(session, wrong)


def test_a_session_refuses_the_next_step_without_after_step(session):
    def wrong(batch):
        session.backward(batch)
        session.optimizer.step()

    assert "step 0 was not ended by session.after_step()" in misused(session, wrong)


def test_a_session_refuses_a_batch_without_a_training_step(session):
    assert "step 0 was not ended" in misused(session, lambda batch: None)


def test_a_session_refuses_after_step_before_optimizer_step(session):
    def wrong(batch):
        session.backward(batch)
        session.after_step()

    assert "came before optimizer.step()" in misused(session, wrong)
    assert "came before session.backward" in misused(session, lambda _: session.after_step())


def test_a_session_refuses_a_step_of_another_optimizer(session):
    other = torch.optim.SGD(session.model.parameters(), lr=0.1)

    def wrong(batch):
        session.backward(batch)
        other.step()
        session.after_step()

    assert "on the session's own optimizer" in misused(session, wrong)


def test_a_session_refuses_two_optimizer_steps_for_one_batch(session):
    def wrong(batch):
        session.backward(batch)
        session.optimizer.step()
        session.optimizer.step()

    assert "optimizer.step() was called twice in step 0" in misused(session, wrong)


def test_a_session_refuses_a_second_after_step_for_one_batch(session):
    def wrong(batch):
        step(session, batch)
        session.after_step()

    assert "after_step() was called outside a step" in misused(session, wrong)


@pytest.mark.parametrize("to_none", [True, False])
def test_a_session_refuses_gradients_zeroed_before_a_step(session, to_none):
    def wrong(batch):
        session.backward(batch)
        session.optimizer.zero_grad(set_to_none=to_none)
        session.optimizer.step()

    assert "zeroed between session.backward(batch) and optimizer.step()" in misused(session, wrong)


def test_gradients_may_be_zeroed_before_backward(session):
    with session.experience(0) as batches:
        for batch in batches:
            session.optimizer.zero_grad(set_to_none=False)
            step(session, batch)
    assert session.position.experience == 1


def test_gradients_may_be_clipped_before_the_optimizer_step(session):
    with session.experience(0) as batches:
        for batch in batches:
            session.backward(batch)
            torch.nn.utils.clip_grad_norm_(session.model.parameters(), 0.01)
            session.optimizer.step()
            session.after_step()
    assert session.position.experience == 1


def test_a_session_refuses_backward_of_a_users_own_loss(session):
    def loss(batch):
        return F.cross_entropy(session.model(batch.inputs), batch.labels)

    def wrong(batch):
        loss(batch).backward()
        session.optimizer.step()

    assert "loss.backward() added to .grad" in misused(session, wrong)

    def both(batch):
        session.backward(batch)
        loss(batch).backward()

    assert "loss.backward() added to .grad" in misused(session, both)
    loss(session.held.rows).backward()  # outside the loop nobody minds


def test_a_session_refuses_an_optimizer_step_without_backward(session):
    told = misused(session, lambda batch: session.optimizer.step())
    assert "came before session.backward(batch)" in told
    assert told.endswith("optimizer.step(), session.after_step()")


CHANGES = {
    "hook": lambda session: session.model.register_forward_hook(lambda *given: given[2] * 2),
    "method": lambda session: setattr(session.model, "forward", type(session.model).forward),
    "strategy": lambda session: setattr(session, "strategy", Naive()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_private_session_refuses_a_changed_loss_or_model(toy_stream, toy_model, change):
    """The refusal comes at the next step, because one block may be all steps of an experience."""
    stream = toy_stream()
    model = toy_model(stream)
    session = Session(
        model=model,
        strategy=Naive(),
        stream=stream,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        iterations=3,
        batch_size=8,
        privacy=SIMULATED,
    )
    changed = pytest.raises(GuardError, match="changed between two steps")
    with changed, session.experience(0) as batches:
        for number, batch in enumerate(batches):
            if number == 1:
                CHANGES[change](session)
            step(session, batch)
    assert session.position.step == 1


def test_a_session_refuses_backward_with_another_batch(session):
    assert "another batch than the batch of step 0" in misused(
        session, lambda batch: session.backward(batch.take(slice(0, 2)))
    )


def test_a_session_refuses_backward_in_evaluation_mode(session):
    def wrong(batch):
        session.model.eval()
        session.backward(batch)

    assert "the model is in evaluation mode inside the loop" in misused(session, wrong)


def test_a_session_refuses_backward_without_gradients_enabled(session):
    with torch.no_grad():
        assert "gradients are switched off" in misused(session, session.backward)


def test_a_session_refuses_a_second_loop_over_the_batches(session):
    twice = r"looped over twice.*give epochs="
    with pytest.raises(LoopError, match=twice), session.experience(0) as batches:
        for _ in range(2):
            for batch in batches:
                step(session, batch)


def test_a_session_refuses_calls_outside_an_experience(session):
    with session.experience(0) as batches:
        for batch in batches:
            step(session, batch)
    with pytest.raises(LoopError, match=r"backward\(\) was called outside a step"):
        session.backward(batch)
    with pytest.raises(LoopError, match=r"after_step\(\) was called outside a step"):
        session.after_step()
    with pytest.raises(LoopError, match="was used outside a `with`"):
        next(iter(batches))
    with pytest.raises(LoopError, match="was used outside a `with`"):
        len(session.experience(1))


def test_a_session_refuses_experiences_out_of_order(session):
    with pytest.raises(LoopError, match="experience 1 was opened but experience 0 is next"):
        run(session, 1)
    run(session, 0)
    with pytest.raises(LoopError, match="experience 0 was opened but experience 1 is next"):
        run(session, 0)
    inside = pytest.raises(LoopError, match="experience 1 was opened inside experience 1")
    with inside, session.experience(1), session.experience(1):
        pass
    run(session, 1)
    with pytest.raises(LoopError, match="experience 1 was opened but none is next"):
        run(session, 1)


def test_a_session_refuses_an_experience_of_another_stream(session, toy_stream):
    for given, message in {
        "records": (session.stream[0].train, "experience = 'Records' is not allowed"),
        "number": (2, "experience = 2 is not allowed"),
        "other": (toy_stream()[0], "experience 0 of another stream"),
    }.values():
        with pytest.raises(ConfigError, match=message):
            run(session, given)


def test_an_experience_left_early_is_not_consolidated(session):
    left = "left at step 1 of 3 and not consolidated"
    with pytest.raises(LoopError, match=left), session.experience(0) as batches:
        for batch in batches:
            step(session, batch)
            break
    assert session.position.experience == 0 and session.position.step == 1
    with pytest.raises(ZeroDivisionError) as caught, session.experience(0) as batches:
        assert len(batches) == 2
        for batch in batches:
            session.backward(batch)
            session.optimizer.step()
            raise ZeroDivisionError
    assert "left at step 2 of 3 and not consolidated" in caught.value.__notes__[0]
    assert session.position.step == 2  # the optimiser took the step, and the strategy followed
    run(session, 0)
    assert session.position.experience == 1


def test_a_resumed_experience_is_bit_identical(session, toy_stream, toy_model):
    with pytest.raises(KeyboardInterrupt), session.experience(0) as batches:
        for batch in batches:
            if session.position.step == 1:
                raise KeyboardInterrupt
            step(session, batch)
    run(session, 0)
    stream = toy_stream()
    model = toy_model(stream)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    whole = Session(
        model=model,
        strategy=DER(memory_size=8),
        stream=stream,
        optimizer=optimizer,
        iterations=3,
        batch_size=8,
    )
    run(whole, 0)
    assert all(map(torch.equal, session.model.parameters(), whole.model.parameters()))


def test_the_session_leaves_no_hooks_on_the_parameters(session):
    run(session, 0)
    with pytest.raises(LoopError), session.experience(1) as batches:
        for _ in batches:
            session.optimizer.step()
    kept = [value._post_accumulate_grad_hooks for value in session.model.parameters()]
    assert not any(kept)
    session.optimizer.step()
    F.cross_entropy(session.model(session.stream[0].test.inputs), session.stream[0].test.labels)


def test_a_private_batch_hides_its_records(toy_stream, toy_model):
    stream = toy_stream()
    model = toy_model(stream)
    session = Session(
        model=model,
        strategy=Naive(),
        stream=stream,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        iterations=2,
        batch_size=8,
        privacy=SIMULATED,
    )
    with session.experience(0) as batches:
        for number, batch in enumerate(batches):
            assert batch.step == number and not hasattr(batch, "other")
            with pytest.raises(PrivacyError, match="inputs of a private batch may not be read"):
                _ = batch.inputs
            with pytest.raises(PrivacyError, match="the number of records"):
                len(batch)
            step(session, batch)
