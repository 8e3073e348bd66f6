"""Heads of the clients' ledgers that the server keeps: an anchor outside the clients' folders.

Every reply of a private client holds its ledger's head, every message to it the last one that the
server knows. So a client whose folder was put back from another time is refused, by itself and by
the server.
"""

from collections.abc import Mapping
from typing import cast

from flwr.app import ConfigRecord, Message

from perdure.errors import LedgerError
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.ledger.storage import Anchor, SealedHead

LEDGER = "ledger"
"""Record of a message that holds a head."""
SERVER = "the federation's server"


class ClientHeads:
    """The last head that each client reported.

    Args:
        texts: number of a client to its head, as a checkpoint kept them.
    """

    def __init__(self, texts: Mapping[str, str] | None = None) -> None:
        self.texts = dict(texts or {})

    def told(self, client: int) -> dict[str, ConfigRecord]:
        """Return the record for a message to a client; nothing before its first head."""
        text = self.texts.get(str(client))
        return {} if text is None else {LEDGER: ConfigRecord({"head": text})}

    def take(self, client: int, reply: Message) -> None:
        """Take the head out of a client's reply and keep it.

        Raises:
            LedgerError: for a ledger that is missing, shorter or other than before.
        """
        where = f"client {client}"
        known = self.texts.get(str(client))
        if LEDGER not in reply.content:
            if known is not None:
                raise LedgerError(
                    f"{where} reports no ledger now, but it reported one before; "
                    "restore the client's folder from its newest backup"
                )
            return
        text = head_in(reply)
        del reply.content[LEDGER]  # an aggregator expects parameters and numbers only
        new = SealedHead.parse(text, where=where)
        old = SealedHead.parse(known, where=SERVER) if known is not None else None
        if old and (new.count < old.count or (new.count == old.count and new.hash != old.hash)):
            raise LedgerError(
                f"{where} reports a ledger of {new.count} lines, but {SERVER} has recorded "
                f"{old.count}, so the ledger is not the newest one; restore the client's folder "
                "from its newest backup"
            )
        self.texts[str(client)] = text


def head_in(message: Message) -> str:
    """Text of the head in a message."""
    return str(cast(ConfigRecord, message.content[LEDGER])["head"])


def reported(ledger: Ledger) -> ConfigRecord:
    """Return the record for a reply of a client with this ledger."""
    return ConfigRecord({"head": ledger.chain.head.text()})


def require_known(ledger: Ledger | None, message: Message) -> None:
    """Refuse to train on where the server knows another ledger of this client.

    Raises:
        LedgerError: for a ledger that is missing, shorter or other than the server knows.
    """
    if LEDGER not in message.content:
        return
    if ledger is None:
        raise LedgerError(
            f"{SERVER} has recorded a ledger of this client, but its learner has privacy=None; "
            "give the same privacy as before, or start a new run"
        )
    ledger.chain.require(Anchor(SealedHead.parse(head_in(message), where=SERVER), SERVER))
