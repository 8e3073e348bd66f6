"""A federation stopped anywhere, at the server or at clients, resumes bit-identically."""

from dataclasses import replace

import pytest

from helpers.federations import SIMULATED, hard, maker, outcome
from perdure.errors import FederationError, RunError
from perdure.federated import Server, client_app, run_federation
from perdure.federated.flower_adapter import InProcessGrid
from perdure.federated.server import POINTS
from perdure.strategies import EWC, Combine, Naive, Replay

# --------------------------------------------------------------------------- stopping and going on


class StoppedError(RuntimeError):
    pass


def stopping(point, times):
    """Return a callback that raises at the nth call of `point`."""
    left = [times]

    def callback(at, _):
        if at == point:
            left[0] -= 1
            if left[0] == 0:
                raise StoppedError(point)

    return callback


STRATEGY = Combine(EWC(strength=20.0), Replay(memory_size=30))


AGAIN_PLAIN = pytest.mark.deep(reason="full replay: every point again without privacy")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(None, marks=AGAIN_PLAIN, id="plain"),
        pytest.param(SIMULATED, id="private"),
    ],
)
def reference(request, stream):
    streams, federation = hard(stream)
    make = maker(stream, STRATEGY, privacy=request.param)
    return request.param, outcome(run_federation(make, streams, federation).learner)


@pytest.mark.parametrize("point", POINTS)
def test_a_server_stopped_anywhere_resumes_bit_identically(stream, tmp_path, reference, point):
    privacy, expected = reference
    streams, federation = hard(stream)
    make = maker(stream, STRATEGY, privacy=privacy)
    for times in (1, 2):
        with pytest.raises(StoppedError):
            run_federation(
                make, streams, federation, folder=tmp_path, callbacks=[stopping(point, times)]
            )
    assert outcome(run_federation(make, streams, federation, folder=tmp_path).learner) == expected


CLIENT_POINTS = [
    ("step.gradient", 9),
    ("block.end", 5),
    ("experience.consolidated", 3),
    ("experience.end", 4),
    ("checkpoint.begin", 8),
    ("checkpoint.end", 7),
    ("noise.drawn", 20),
    ("ledger.appended", 25),
]


@pytest.mark.parametrize("point,times", CLIENT_POINTS)
def test_a_client_stopped_anywhere_resumes_bit_identically(
    stream, tmp_path, reference, point, times
):
    privacy, expected = reference
    if privacy is None and point.startswith(("noise", "ledger")):
        point = "step.done"
    streams, federation = hard(stream)
    make = maker(stream, STRATEGY, privacy=privacy, callbacks=[stopping(point, times)])
    with pytest.raises(FederationError, match=r"client \d stopped: StoppedError: "):
        run_federation(make, streams, federation, folder=tmp_path)
    make = maker(stream, STRATEGY, privacy=privacy)
    assert outcome(run_federation(make, streams, federation, folder=tmp_path).learner) == expected


def test_running_clients_go_back_to_the_checkpoint_of_the_server(stream, tmp_path, reference):
    privacy, expected = reference
    streams, federation = hard(stream)
    make = maker(stream, STRATEGY, privacy=privacy)
    app = client_app(lambda number: (make(number), streams[number]), tmp_path)

    def server(*callbacks):
        own = {
            "learner": make(0),
            "stream": streams[0],
            "federation": federation,
            "folder": tmp_path,
        }
        return Server(**own, callbacks=callbacks)

    with InProcessGrid(app, 4).running() as grid:
        for point in ("round.received", "experience.received", "round.received"):
            with pytest.raises(StoppedError):
                server(stopping(point, 2 if "round" in point else 1)).serve(grid)
        last = server()
        last.serve(grid)
    assert outcome(last.learner) == expected


def test_a_finished_federation_is_not_trained_again(stream, tmp_path):
    streams, federation = hard(stream)
    first = run_federation(maker(stream, Naive()), streams, federation, folder=tmp_path)
    again = run_federation(
        lambda number: maker(stream, Naive())(number),
        streams,
        federation,
        folder=tmp_path,
        callbacks=[lambda point, server: pytest.fail(point)],
    )
    assert outcome(first.learner) == outcome(again.learner)


def test_the_folder_of_another_federation_is_refused(stream, tmp_path):
    streams, federation = hard(stream)
    run_federation(maker(stream, Naive()), streams, federation, folder=tmp_path)
    with pytest.raises(RunError, match=r"differs in federation.seed \(given 3, stored 2\)"):
        run_federation(
            maker(stream, Naive()), streams, replace(federation, seed=3), folder=tmp_path
        )


def test_a_client_without_its_saved_state_begins_anew(stream, tmp_path, caplog):
    streams, federation = hard(stream)
    with pytest.raises(StoppedError):
        run_federation(
            maker(stream, Naive()),
            streams,
            federation,
            folder=tmp_path,
            callbacks=[stopping("evaluated", 1)],
        )
    for path in (tmp_path / "clients" / "002" / "checkpoint").glob("*"):
        path.unlink()
    server = run_federation(maker(stream, Naive()), streams, federation, folder=tmp_path)
    assert "client 2 lost its last state, and begins anew" in caplog.text
    assert server.absences == []


def test_no_file_is_pickled_and_rows_are_in_private_folders(stream, tmp_path):
    streams, federation = hard(stream)
    run_federation(maker(stream, STRATEGY, privacy=SIMULATED), streams, federation, folder=tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".head", ""}
    assert {path.parent.name for path in files if path.suffix == ".safetensors"} == {
        "checkpoint",
        "private",
    }
    assert sorted(path.name for path in (tmp_path / "clients").iterdir()) == [
        "000",
        "001",
        "002",
        "003",
    ]
    assert not any(path.name == "key" for path in files)
