import logging
import random
from importlib.metadata import version

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore import telemetry
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from perdure.errors import (
    BudgetError,
    ConfigError,
    DataError,
    FederationError,
    GuardError,
    LedgerError,
    PrivacyError,
    RunawayError,
    RunError,
    StrategyError,
)
from perdure.federated.flower_adapter import (
    Cohort,
    InProcessGrid,
    contained,
    error_reply,
    failure,
    simulate,
)


def echo(change=lambda message, context: None):
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        change(message, context)
        return Message(message.content, reply_to=message)

    @app.query("partition")
    def partition(message: Message, context: Context) -> Message:
        held = MetricRecord({"partition": context.node_config["partition-id"]})
        return Message(RecordDict({"metrics": held}), reply_to=message)

    return app


def ask(grid, nodes, content=None):
    record = content or RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(3))})})
    return [Message(record, node, "train") for node in nodes]


def test_private_names_used_of_flower_exist_in_flower_1_41():
    assert version("flwr").startswith("1.41.")
    assert {"_task_id", "_run_id", "_node_id"} <= vars(TaskIdentity).keys()
    assert Run.create_empty(1).run_id == 1
    assert Grid.__abstractmethods__ == {
        "set_run",
        "run",
        "create_message",
        "get_node_ids",
        "push_messages",
        "pull_messages",
        "send_and_receive",
    }
    assert telemetry.FLWR_TELEMETRY_ENABLED in ("0", "1")


def test_the_grid_returns_replies_in_the_order_asked():
    with InProcessGrid(echo(), clients=4).running() as grid:
        replies = list(grid.send_and_receive(ask(grid, [3, 1, 4])))
    assert [reply.metadata.src_node_id for reply in replies] == [3, 1, 4]
    assert [reply.metadata.reply_to_message_id for reply in replies] == ["1", "2", "3"]


def test_the_grid_delivers_each_reply_once():
    with InProcessGrid(echo(), clients=2).running() as grid:
        ids = list(grid.push_messages(ask(grid, [1, 2])))
        assert len(list(grid.pull_messages(ids))) == 2
        assert list(grid.pull_messages(ids)) == []


def test_every_grid_node_keeps_its_own_context():
    def count(message, context):
        rounds = context.state.get("seen", MetricRecord({"rounds": 0}))["rounds"] + 1
        context.state["seen"] = MetricRecord({"rounds": rounds})
        message.content["seen"] = MetricRecord(
            {"rounds": rounds, "partition": context.node_config["partition-id"]}
        )
        assert context.node_config["num-partitions"] == 3

    with InProcessGrid(echo(count), clients=3).running() as grid:
        grid.send_and_receive(ask(grid, [2]))
        replies = list(grid.send_and_receive(ask(grid, [1, 2])))
    assert [dict(reply.content["seen"]) for reply in replies] == [
        {"rounds": 1, "partition": 0},
        {"rounds": 2, "partition": 1},
    ]


def test_a_client_that_changes_its_message_changes_no_other():
    def spoil(message, context):
        assert message.content["arrays"]["w"].numpy().tolist() == [0, 0, 0]
        message.content["arrays"]["w"].numpy()[:] = 7
        message.content["arrays"]["w"] = Array(np.ones(3))
        message.content["config"]["rate"] = 9

    shared = RecordDict(
        {"arrays": ArrayRecord({"w": Array(np.zeros(3))}), "config": ConfigRecord({"rate": 1})}
    )
    with InProcessGrid(echo(spoil), clients=3).running() as grid:
        replies = list(grid.send_and_receive(ask(grid, [1, 2, 3], shared)))
    assert not any(reply.has_error() for reply in replies)
    assert shared["config"]["rate"] == 1
    assert shared["arrays"]["w"].numpy().tolist() == [0, 0, 0]


def test_progress_is_called_after_every_reply():
    seen = []
    with InProcessGrid(
        echo(), clients=3, progress=lambda done, of: seen.append((done, of))
    ).running() as grid:
        grid.send_and_receive(ask(grid, [1, 2, 3]))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_client_exception_gives_an_error_reply_for_that_client():
    def fail(message, context):
        if context.node_id == 2:
            raise ValueError("no such thing\nsecond line")

    with InProcessGrid(echo(fail), clients=3).running() as grid:
        replies = list(grid.send_and_receive(ask(grid, [1, 2, 3])))
        assert [reply.has_error() for reply in replies] == [False, True, False]
        assert replies[1].error.reason == "ValueError: no such thing"
    told = failure(1, replies[1].error.reason)
    assert (type(told), str(told)) == (
        FederationError,
        "client 1 stopped: ValueError: no such thing",
    )


def test_an_interrupt_of_a_client_stops_the_grid():
    def interrupt(message, context):
        raise KeyboardInterrupt

    with (
        InProcessGrid(echo(interrupt), clients=1).running() as grid,
        pytest.raises(KeyboardInterrupt),
    ):
        grid.send_and_receive(ask(grid, [1]))


def test_client_failures_of_other_types_are_federation_errors():
    assert type(failure(3, "StrategyError: two memories")) is FederationError
    assert (
        str(failure(3, "StrategyError: two memories"))
        == "client 3 stopped: StrategyError: two memories"
    )
    assert type(failure(3, "PrivacyError: raw")) is PrivacyError
    diverged = failure(3, "RunawayError: head.weight is NaN")
    assert type(diverged) is RunawayError
    assert str(diverged) == "client 3 diverged: head.weight is NaN"
    assert str(failure(3, "")) == "client 3 stopped: no reason given"


def test_the_error_reply_of_a_private_client_quotes_no_record(caplog):
    with InProcessGrid(echo(), clients=1).running():
        message = Message(RecordDict({}), 1, "train")
        foreign = error_reply(message, ValueError("could not convert 'Jane Doe'"), private=True)
        assert foreign.error.reason == "ValueError: see the client's log"
        for kind in (BudgetError, FederationError, GuardError, LedgerError):
            own = error_reply(message, kind("spent"), private=True)
            assert own.error.reason == f"{kind.__name__}: spent"

        class OfTheUserError(GuardError):
            pass

        quoting = "experience 0 of s has nan in row 17 (record id 17), column 3"
        for kind in (DataError, ConfigError, PrivacyError, StrategyError, RunError, OfTheUserError):
            caplog.clear()
            own = error_reply(message, kind(quoting), private=True)
            assert own.error.reason == f"{kind.__name__}: see the client's log"
            assert quoting in caplog.text
            assert error_reply(message, kind(quoting)).error.reason.endswith(quoting)


def test_the_grid_restores_the_task_identity_of_flower():
    before = dict(vars(TaskIdentity))
    with pytest.raises(ZeroDivisionError), InProcessGrid(echo(), clients=1).running():
        assert TaskIdentity.run_id == 1
        raise ZeroDivisionError
    assert dict(vars(TaskIdentity)) == before


def test_flower_sees_only_the_nodes_of_the_cohort():
    aggregator = FedAvg(min_train_nodes=1, min_available_nodes=1)
    with InProcessGrid(echo(), clients=6).running() as grid:
        cohort = Cohort(grid, [2, 5])
        assert list(cohort.get_node_ids()) == [2, 5]
        arrays = ArrayRecord({"w": torch.zeros(2)})
        messages = list(aggregator.configure_train(1, arrays, ConfigRecord(), cohort))
        assert {message.metadata.dst_node_id for message in messages} == {2, 5}
        assert len(list(cohort.send_and_receive(messages))) == 2
        assert cohort.run is grid.run


def test_running_flower_keeps_log_level_and_random_state(caplog):
    logger = logging.getLogger("flwr")
    level = logging.getLogger("flwr").level
    state = random.getstate()
    with contained():
        logger.info("hidden")
        logger.warning("shown")
        random.random()
    assert logger.level == level
    assert random.getstate() == state
    assert "hidden" not in caplog.text


def test_the_ray_engine_without_ray_names_the_package_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(FederationError, match=r"pip install perdure\[simulation\]"):
        simulate(None, None, 1)
