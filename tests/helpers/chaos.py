"""A federation with lost and late replies, deleted folders and a killed server.

Every fault depends only on the seed, the exchange and the client, so a repeated exchange has the
same ones.
"""

import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from helpers.federations import SIMULATED, maker
from perdure.data import digits, iid, split
from perdure.federated import Federation, InProcessGrid, Server, client_app
from perdure.strategies import EWC, Combine, Replay
from perdure.utils.seeding import generator


def chance(*place):
    """Return a number from 0 to 1 that depends on the place only."""
    return float(torch.rand((), generator=generator(*place)))


class ChaosGrid(InProcessGrid):
    """Grid that loses some replies, and delivers others when nobody waits for them any more.

    Args:
        app: app of the clients.
        clients: number of clients.
        lost: share of lost replies.
        late: share of late ones.
        seed: seed of the faults.
        surely: pairs of an exchange and a client whose reply is lost in any case.
    """

    def __init__(self, app, clients, *, lost, late, seed, surely=()):
        super().__init__(app, clients)
        self._lost, self._late, self._seed, self._surely = lost, late, seed, surely
        self._held = []
        self.faults = 0

    def push_messages(self, messages):
        messages = list(messages)
        names = list(super().push_messages(messages))
        for name, message in zip(names, messages, strict=True):
            task = message.content.get("task")
            if task is None or "exchange" not in task:
                continue
            place = (self._seed, "fault", task["exchange"], message.metadata.dst_node_id)
            surely = (task["exchange"], message.metadata.dst_node_id - 1) in self._surely
            drawn = -1.0 if surely else chance(*place)
            if drawn < self._lost + self._late:
                self.faults += 1
                reply = self._replies.pop(name)
                if drawn >= self._lost:
                    self._held.append(reply)
        return names

    def pull_messages(self, message_ids):
        late, self._held = self._held, []
        return [*late, *super().pull_messages(message_ids)] if message_ids else []


def parties(clients, *, privacy=None, callbacks=()):
    """Return a function that makes learners, and the streams of all clients."""
    whole = split(digits(), scenario="class", experiences=5)
    whole = replace(whole, experiences=whole.experiences[:2])
    streams = iid(whole, clients=clients, min_size=8, exact=False)
    strategy = Combine(EWC(strength=5.0), Replay(memory_size=20))
    make = maker(whole, strategy, iterations=2, blocks=1, privacy=privacy, callbacks=callbacks)
    return make, streams


def lose(folder, client, exchange):
    """Delete the folder of a client, and keep a copy of its ledger in `gone`."""
    own = Path(folder, "clients", f"{client:03d}")
    kept = Path(folder, "gone", f"{client}-{exchange}-{len(list(Path(folder).glob('gone/*')))}")
    if (own / "ledger.jsonl").exists():
        kept.mkdir(parents=True)
        for name in ("ledger.jsonl", "ledger.head.json"):
            shutil.copy(own / name, kept / name)
    shutil.rmtree(own, ignore_errors=True)


def serve(
    folder,
    clients,
    rounds,
    *,
    deleted=(),
    kills=(),
    privacy=None,
    share=0.3,
    lost=(),
    kill=None,
    readmit=False,
    consents=None,
):
    """Run a federation with faults from its last checkpoint, and return its server.

    Args:
        folder: folder of the run.
        clients: number of clients.
        rounds: rounds of an experience.
        deleted: pairs of an exchange and the client whose folder is deleted before it.
        kills: exchanges before whose checkpoint the server is killed, once each.
        privacy: privacy of the clients.
        share: share of lost replies; a third as many come late.
        lost: pairs of an exchange and a client whose reply is lost in any case.
        kill: function that kills the server; the process itself by default.
        readmit: setting of the federation. The ledgers of deleted folders are kept in `gone`.
        consents: setting of the clients' app; that of the federation if it is not given.
    """
    make, streams = parties(clients, privacy=privacy)
    federation = Federation(
        clients=clients,
        rounds=rounds,
        local_steps=1,
        quorum=0.25,
        deadline=0.01,
        grace=0.01,
        readmit=readmit,
    )

    def faults(point, server):
        if point in ("round.begin", "experience.received"):
            app.current = fresh()
        if point == "round.begin":
            for exchange, client in deleted:
                if exchange == server.exchange:
                    lose(folder, client, exchange)
        if point == "checkpoint.begin":
            mark = Path(folder, f"killed-{server.exchange}")
            if server.exchange in kills and not mark.exists():
                mark.touch()
                (kill or _kill)()

    def fresh():
        """Build the app of clients whose processes have restarted."""
        may = readmit if consents is None else consents
        return client_app(lambda n: (make(n), streams[n]), folder, readmit=may)

    def app(message, context):
        return app.current(message, context)

    app.current = fresh()
    server = Server(
        learner=make(0),
        stream=streams[0],
        federation=federation,
        folder=folder,
        callbacks=[faults],
        sizes=[[each.train.declared_size for each in own] for own in streams],
    )
    chaotic = ChaosGrid(app, clients, lost=share, late=share / 3, seed=1, surely=lost)
    with chaotic.running() as grid:
        server.serve(grid)
    return server


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    where, private, *exchanges = sys.argv[1:]
    serve(
        Path(where),
        6,
        4,
        deleted=[(3, 1), (7, 4)],
        kills=[int(each) for each in exchanges],
        privacy=None if private == "plain" else SIMULATED,
        readmit=private == "readmit",
    )
