"""Heads of the clients' ledgers that the server records, outside the clients' folders.

Every reply of a private client contains the head of its ledger, and every message to it contains
the last head that the server recorded. So a client whose folder was replaced by an older copy is
refused, by itself and by the server. A client whose first replies were lost has no recorded head,
but may have drawn noise. It is told so, and refuses if its ledger has no entry.
"""

from collections.abc import Iterable, Mapping
from typing import cast

from flwr.app import ConfigRecord, Message

from perdure.errors import LedgerError
from perdure.planning.budget import ELSEWHERE
from perdure.privacy.ledger.account import WARM_START
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.ledger.storage import Anchor, SealedHead

LEDGER = "ledger"
"""Name of the record that holds a head in a message."""
SERVER = "the federation's server"
OUTSIDE = {ELSEWHERE, WARM_START}
"""Purposes of entries for earlier noise, which a ledger that begins anew has, too."""


class ClientHeads:
    """Last head that each client has reported, and the clients that may have begun a task.

    Args:
        texts: number of a client to its head, as saved in a checkpoint.
        begun: clients that were sent a private task, and gave no valid reply to it.
    """

    def __init__(self, texts: Mapping[str, str] | None = None, begun: Iterable[int] = ()) -> None:
        self.texts = dict(texts or {})
        self.begun = set(begun)

    def told(self, client: int) -> dict[str, ConfigRecord]:
        """Return the client's recorded head as part of a message to the client.

        Before the client has reported a head, it is empty, or says that a task may have begun.
        """
        text = self.texts.get(str(client))
        if text is not None:
            return {LEDGER: ConfigRecord({"head": text})}
        return {LEDGER: ConfigRecord({"begun": 1})} if client in self.begun else {}

    def take(self, client: int, reply: Message) -> None:
        """Take the head from a client's reply, and record it.

        Raises:
            LedgerError: if the ledger is missing, or does not continue the recorded one.
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
        del reply.content[LEDGER]  # an aggregator accepts only parameters and numbers
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
    """Return the text of the head in a message."""
    return str(cast(ConfigRecord, message.content[LEDGER])["head"])


def reported(ledger: Ledger) -> ConfigRecord:
    """Return the record with the head of this ledger, for a client's reply."""
    return ConfigRecord({"head": ledger.chain.head.text()})


def require_known(ledger: Ledger | None, message: Message) -> None:
    """Refuse to train if the server has recorded another ledger of this client.

    Raises:
        LedgerError: if the ledger is missing, or does not continue the recorded one, or if it is
            empty although a task may have begun.
    """
    if LEDGER not in message.content:
        return
    if ledger is None:
        raise LedgerError(
            f"{SERVER} has recorded a ledger of this client, but its learner has privacy=None; "
            "give the same privacy as before, or start a new run"
        )
    if "begun" in cast(ConfigRecord, message.content[LEDGER]):
        if all(entry.purpose in OUTSIDE for entry in ledger.entries):
            raise LedgerError(
                f"{SERVER} has sent a private task to this client before, but the client's ledger "
                "has no entry of this run, so noise that it does not count may have been drawn; "
                "restore the client's folder from its newest backup, or start a new run with the "
                "lost steps in Privacy.spent"
            )
        return
    ledger.chain.require(Anchor(SealedHead.parse(head_in(message), where=SERVER), SERVER))
