"""A federation on a stream of pieces evaluates its model at the end of each stage."""

from helpers.federations import maker, short
from perdure.data import iid, online
from perdure.federated import Federation, run_federation
from perdure.strategies import Naive


def test_a_federation_is_evaluated_at_the_end_of_each_stage(stream, tmp_path):
    pieces = online(short(stream, 2), chunk=130)
    assert len(pieces) == 4 and len(pieces.stages) == 2
    evaluated = []

    def listen(point, server):
        if point == "evaluated":
            evaluated.append(server.experience)

    server = run_federation(
        maker(pieces, Naive(), iterations=2, blocks=1, evaluate_every=1),
        iid(pieces, clients=2),
        Federation(clients=2, rounds=1),
        folder=tmp_path,
        callbacks=[listen],
    )
    learner = server.learner
    assert evaluated == [0, 1, 2, 3]
    assert [len(row) for row in learner.matrix] == [2, 2]
    assert [piece for piece, _ in learner.progress] == [0, 2]
    assert learner.matrix[1] == learner.evaluate(pieces)
