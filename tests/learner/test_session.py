"""Training in a user's loop over a session gives the same bits as a learner."""

from functools import partial

import pytest
import torch
from torch import nn

from helpers.learners import adam, bits, same_bits
from helpers.strategy_examples import example, model_of, private
from perdure import Learner, Privacy, Session, strategies
from perdure.data.scenarios import split
from perdure.errors import ConfigError, DataError, RunError
from perdure.strategies import EWC, NCM, SI, FedProx, Joint, Naive, Replay

SIMULATED = Privacy(noise_multiplier=1.0, seed=0)
SETTINGS = {"iterations": 4, "blocks": 2, "batch_size": 8, "seed": 5}
OWN_MODELS = {
    name
    for name in strategies.names()
    if example(name).small_model(input_shape=(5,), num_classes=4) is not None
}
PRIVATE_IN_SHORT = ("naive", "der", "gem", "joint", "si")
LONG = pytest.mark.deep(reason="full replay: trains with every strategy twice")


def some(names, short):
    return [pytest.param(name, marks=() if name in short else LONG) for name in names]


def session_of(model, stream, strategy=None, make=torch.optim.Adam, lr=0.02, **changes):
    optimizer = make(model.parameters(), lr=lr)
    return Session(
        model=model,
        strategy=strategy or Naive(),
        stream=stream,
        optimizer=optimizer,
        **SETTINGS | changes,
    )


def train(session, experiences=None):
    """Run the training loop of the documentation."""
    for experience in session.stream if experiences is None else experiences:
        with session.experience(experience) as batches:
            for batch in batches:
                session.backward(batch)
                session.optimizer.step()
                session.after_step()
    return session


def assert_same_run(session, learner):
    assert same_bits(bits(session.model.state_dict()), bits(learner.model.state_dict()))
    assert same_bits(dict(session.state), dict(learner.state))
    assert session.position == learner.position


def both(stream, model, strategy, **settings):
    """Return a session and a learner that were trained with the same settings."""
    learner = Learner(model=model(), strategy=strategy, optimizer=adam, **SETTINGS | settings)
    last = learner.fit(stream)[-1].tolist()
    session = train(session_of(model(), stream, strategy, **settings))
    assert session.evaluate() == last
    return session, learner


@pytest.mark.parametrize("name", some(strategies.names(), {*strategies.names()} - OWN_MODELS))
def test_training_with_a_session_equals_training_by_a_learner(name, toy_stream, toy_model):
    stream = toy_stream()
    assert_same_run(*both(stream, lambda: model_of(name, stream, toy_model), example(name)))


@pytest.mark.parametrize("name", some(private(), PRIVATE_IN_SHORT))
def test_private_training_with_a_session_equals_the_learner(name, toy_stream, toy_model):
    stream = toy_stream()
    made = both(stream, lambda: model_of(name, stream, toy_model), example(name), privacy=SIMULATED)
    assert_same_run(*made)
    mine, theirs = (party.private_sum.ledger.entries for party in made)
    assert [entry.digest for entry in mine] == [entry.digest for entry in theirs]


def test_dropout_in_a_session_loop_equals_dropout_in_the_learner(toy_stream, toy_model):
    stream = toy_stream()

    def model():
        return nn.Sequential(toy_model(stream).body, nn.Dropout(0.5), toy_model(stream).head)

    assert_same_run(*both(stream, model, Naive()))


def test_random_numbers_of_the_user_do_not_change_dropout(toy_stream, toy_model):
    stream = toy_stream()
    models = [nn.Sequential(nn.Dropout(0.5), toy_model(stream)) for _ in range(2)]
    train(session_of(models[0], stream))
    session = session_of(models[1], stream)
    for experience in stream:
        with session.experience(experience) as batches:
            for batch in batches:
                torch.rand(3)
                session.backward(batch)
                session.optimizer.step()
                session.after_step()
    assert same_bits(*(bits(model.state_dict()) for model in models))


def test_a_plan_that_restarts_resets_the_optimizer_of_a_session(toy_stream, toy_model):
    stream = toy_stream()
    session = session_of(toy_model(stream), stream, Joint())
    train(session, [0])
    with session.experience(1) as batches:
        group = session.optimizer.param_groups[0]
        assert not session.optimizer.state and group["lr"] == 0.02
        schedule = torch.optim.lr_scheduler.StepLR(session.optimizer, step_size=1, gamma=0.5)
        for batch in batches:
            session.backward(batch)
            session.optimizer.step()
            schedule.step()
            session.after_step()
    assert session.optimizer.state and group["lr"] < 0.02


def test_a_session_accepts_a_new_optimizer_between_experiences(toy_stream, toy_model):
    stream = toy_stream()
    learner = Learner(
        model=toy_model(stream),
        strategy=SI(strength=1.0),
        optimizer=adam,
        reset_optimizer=True,
        **SETTINGS,
    )
    learner.fit(stream)
    session = train(session_of(toy_model(stream), stream, SI(strength=1.0)), [0])
    session.optimizer = adam(session.model.parameters())
    train(session, [1])
    assert_same_run(session, learner)
    session.optimizer = adam
    with pytest.raises(ConfigError, match="an optimiser of the session's model"):
        session.experience(1).__enter__()


def test_a_plan_without_gradients_gives_no_batches(toy_stream, toy_model):
    stream = toy_stream()
    session = session_of(toy_model(stream), stream, NCM())
    for experience in stream:
        with session.experience(experience) as batches:
            assert len(batches) == 0 and list(batches) == []
    assert session.remaining == () and session.evaluate()[1] > 40


def test_frozen_parameters_get_no_gradient(toy_stream, toy_model):
    stream = toy_stream()
    model = toy_model(stream)
    frozen = next(model.parameters()).requires_grad_(False)
    before = frozen.clone()
    session = session_of(model, stream, SI(strength=1.0))
    with session.experience(0) as batches:
        for batch in batches:
            session.backward(batch)
            assert frozen.grad is None
            session.optimizer.step()
            session.after_step()
    assert torch.equal(frozen, before)


def test_len_of_batches_is_the_number_of_steps_of_all_epochs(toy_stream, toy_model):
    stream = toy_stream()
    session = session_of(toy_model(stream), stream, iterations=None, epochs=2)
    with session.experience(stream[0]) as batches:
        assert len(batches) == 6  # 24 records, 8 a step, twice
        for batch in batches:
            session.backward(batch)
            session.optimizer.step()
            session.after_step()


def test_an_evaluation_in_the_loop_does_not_change_training(toy_stream, toy_model):
    stream = toy_stream()
    quiet = train(session_of(toy_model(stream), stream, Replay(memory_size=8)))
    session = session_of(toy_model(stream), stream, Replay(memory_size=8))
    for index in (0, 1):
        with session.experience(index) as batches:
            for batch in batches:
                session.backward(batch)
                session.optimizer.step()
                session.after_step()
                session.evaluate()
    assert same_bits(bits(session.model.state_dict()), bits(quiet.model.state_dict()))


# --------------------------------------------------------------------------- folders


@pytest.mark.parametrize("privacy", [None, SIMULATED], ids=["plain", "private"])
def test_a_session_resumes_from_the_checkpoint_in_its_folder(
    privacy, tmp_path, toy_stream, toy_model
):
    stream = toy_stream()
    options = {"strategy": EWC(strength=1.0), "privacy": privacy}
    whole = train(session_of(toy_model(stream), stream, **options))
    first = train(session_of(toy_model(stream), stream, folder=tmp_path, **options), [0])
    with pytest.raises(KeyboardInterrupt), first.experience(1) as batches:
        for batch in batches:
            first.backward(batch)
            first.optimizer.step()
            first.after_step()
            raise KeyboardInterrupt
    first.close()
    second = session_of(toy_model(stream), stream, folder=str(tmp_path), **options)
    assert [experience.index for experience in second.remaining] == [1]
    train(second, second.remaining)
    assert same_bits(bits(second.model.state_dict()), bits(whole.model.state_dict()))
    assert same_bits(dict(second.state), dict(whole.state))
    if privacy:  # the steps that were done again were paid for once
        spent = [len(party.private_sum.ledger.entries) for party in (whole, second)]
        assert spent[0] == spent[1]
    second.close()


def test_a_round_is_not_begun_again_by_a_resume_inside_it(tmp_path, toy_stream, toy_model):
    stream = toy_stream()
    settings = {"strategy": FedProx(strength=1.0), "blocks": 1}
    whole = train(session_of(toy_model(stream), stream, **settings))
    first = session_of(toy_model(stream), stream, folder=tmp_path, **settings)
    with pytest.raises(KeyboardInterrupt), first.experience(0) as batches:
        for batch in batches:
            first.backward(batch)
            first.optimizer.step()
            first.after_step()
            first.save()
            raise KeyboardInterrupt
    first.close()
    second = session_of(toy_model(stream), stream, folder=tmp_path, **settings)
    assert second.position.step == 1
    train(second, second.remaining)
    second.close()
    assert same_bits(bits(second.model.state_dict()), bits(whole.model.state_dict()))
    assert same_bits(dict(second.state), dict(whole.state))


def test_a_session_trains_only_experiences_added_to_the_stream(tmp_path, toy_data, toy_model):
    stream = split(toy_data, scenario="class", experiences=4)
    begun = type(stream)(
        name=stream.name,
        scenario=stream.scenario,
        experiences=stream.experiences[:3],
        num_classes=stream.num_classes,
        input_shape=stream.input_shape,
    )
    train(session_of(toy_model(stream), begun, folder=tmp_path)).close()
    session = session_of(toy_model(stream), stream, folder=tmp_path)
    assert [experience.index for experience in session.remaining] == [3]
    train(session, session.remaining).close()


def test_a_session_refuses_the_folder_of_another_run(tmp_path, toy_stream, toy_model):
    stream = toy_stream()
    train(session_of(toy_model(stream), stream, folder=tmp_path), [0]).close()
    with pytest.raises(RunError, match=r"differs in optimizer\.lr"):
        session_of(toy_model(stream), stream, folder=tmp_path, lr=0.5)
    learner = Learner(
        model=toy_model(stream), strategy=Naive(), optimizer=adam, folder=tmp_path, **SETTINGS
    )
    with pytest.raises(RunError, match="differs in loop"):
        learner.fit(stream)


# --------------------------------------------------------------------------- arguments


def test_session_errors_name_the_argument_as_the_learner_does(toy_stream, toy_model):
    stream = toy_stream()
    for message, changes in {
        "strategy = .*an instance of a strategy": {"strategy": EWC},
        "length of an experience": {"epochs": 2},
        "batch_size = 0": {"batch_size": 0},
    }.items():
        with pytest.raises(ConfigError, match=message):
            session_of(toy_model(stream), stream, **changes)
    with pytest.raises(ConfigError, match="stream = 'list' is not allowed"):
        session_of(toy_model(stream), [1, 2])


def test_a_session_refuses_an_optimizer_of_another_model(toy_stream, toy_model):
    stream = toy_stream()
    model = toy_model(stream)
    given = partial(Session, model=model, strategy=Naive(), stream=stream, iterations=4)
    with pytest.raises(ConfigError, match=r"optimizer = <class .*; give it to Session"):
        given(optimizer=torch.optim.SGD)
    with pytest.raises(ConfigError, match="LBFGS"):
        given(optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ConfigError, match="SparseAdam"):
        given(optimizer=torch.optim.SparseAdam(list(model.parameters())))
    with pytest.raises(ConfigError, match=r"give it to Session\(optimizer=...\)"):
        given().experience(0).__enter__()
    other = torch.optim.SGD(toy_model(stream).parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"one without body\.1\.weight"):
        given(optimizer=other).experience(0).__enter__()


def test_a_private_session_refuses_nan_before_the_first_step(toy_data, toy_model):
    stream = split(toy_data, scenario="class", experiences=2)
    inputs = stream[1].train.inputs.clone()
    inputs[3, 2] = float("nan")
    broken = split(toy_data, scenario="class", experiences=2)
    object.__setattr__(broken[1].train, "inputs", inputs)
    session = session_of(toy_model(stream), broken, privacy=SIMULATED)
    with pytest.raises(DataError, match="has nan in row 3"):
        session.experience(0).__enter__()
