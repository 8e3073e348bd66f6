"""Heads and public accounts of the clients' ledgers, which the server records.

Every reply of a private client contains the head and the public account of its ledger, and every
message to it contains the last head that the server recorded. So a client whose folder was replaced
by an older copy is refused, by itself and by the server. A client whose first replies were lost has
no recorded head, but may have drawn noise. It is told so, and refuses if its ledger has no entry.

A client that lost its folder is refused, too, unless `Federation.readmit` allows it a new ledger,
which begins with the charges of the lost one (see `perdure.federated.readmission`).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from flwr.app import ConfigRecord, Message

from perdure.errors import LedgerError
from perdure.federated.readmission import Loss, has_ledger
from perdure.planning.budget import ELSEWHERE
from perdure.planning.training_plan import LostLedgers
from perdure.privacy.ledger.account import WARM_START
from perdure.privacy.ledger.public_account import PublicAccount
from perdure.privacy.ledger.storage import Anchor, SealedHead
from perdure.privacy.private_sum import PrivateSum

LEDGER = "ledger"
"""Name of the record that holds a head in a message."""
SERVER = "the federation's server"
OUTSIDE = frozenset({ELSEWHERE, WARM_START})
"""Purposes of entries for noise from outside the run, which a ledger that begins anew has, too."""
LOSS = "loss"
"""Key of the record with which the server readmits a client, for what it knows of the loss."""


class ClientHeads:
    """Last head and account that each client reported, and the clients that may have begun a task.

    Args:
        texts: number of a client to its head, as saved in a checkpoint.
        begun: clients that were sent a private task, and gave no valid reply to it.
        accounts: number of a client to the exchange and the text of its last public account.
    """

    def __init__(
        self,
        texts: Mapping[str, str] | None = None,
        begun: Iterable[int] = (),
        accounts: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        self.texts = dict(texts or {})
        self.begun = set(begun)
        self.accounts = {name: (int(n), str(text)) for name, (n, text) in (accounts or {}).items()}

    def account(self, client: int) -> PublicAccount | None:
        """Return the last public account of a client; None if it has reported none."""
        _, text = self.accounts.get(str(client), (0, ""))
        return PublicAccount.parse(text, where=f"client {client}") if text else None

    def known(self, client: int) -> tuple[int, str] | None:
        """Return the exchange and text of a client's last account; None if there is none."""
        return self.accounts.get(str(client))

    def told(self, client: int, loss: Loss | None = None) -> dict[str, ConfigRecord]:
        """Return the client's recorded head as part of a message to the client.

        Before the client has reported a head, it is empty, or says that a task may have begun.

        Args:
            client: number of the client.
            loss: facts for a client that may begin a new ledger; None for all others.
        """
        text = self.texts.get(str(client))
        if text is not None:
            record = ConfigRecord({"head": text})
            if loss:
                record[LOSS] = loss.text()
            return {LEDGER: record}
        return {LEDGER: ConfigRecord({"begun": 1})} if client in self.begun else {}

    def take(self, client: int, reply: Message, exchange: int, *, readmitted: bool = False) -> None:
        """Take head and account from a client's reply, and record them.

        Args:
            client: number of the client.
            reply: its reply, out of which they are taken.
            exchange: the present exchange.
            readmitted: True if the client was allowed a new ledger in this exchange.

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
        record = cast(ConfigRecord, reply.content[LEDGER])
        text, told = str(record["head"]), str(record.get("account", ""))
        del reply.content[LEDGER]  # an aggregator accepts only parameters and numbers
        new = SealedHead.parse(text, where=where)
        account = PublicAccount.parse(told, where=where)
        before = self.account(client)
        if before and account.lost == before.lost + 1 and readmitted:
            known = None  # a new chain
        elif account.lost != (before.lost if before else 0):
            raise LedgerError(
                f"{where} reports {account.lost} lost ledgers, but {SERVER} has recorded "
                f"{before.lost if before else 0}; restore the client's folder from its newest "
                "backup"
            )
        if before and not account.continues_from(before):
            raise LedgerError(
                f"{where} reports fewer charges than {SERVER} has recorded; restore the client's "
                "folder from its newest backup"
            )
        old = SealedHead.parse(known, where=SERVER) if known is not None else None
        if old and (new.count < old.count or (new.count == old.count and new.hash != old.hash)):
            raise LedgerError(
                f"{where} reports a ledger of {new.count} lines, but {SERVER} has recorded "
                f"{old.count}, so the ledger is not the newest one; restore the client's folder "
                "from its newest backup"
            )
        self.texts[str(client)] = text
        self.accounts[str(client)] = (exchange, told)


def head_in(message: Message) -> str:
    """Return the text of the head in a message."""
    return str(cast(ConfigRecord, message.content[LEDGER])["head"])


def reported(private_sum: PrivateSum, lost: LostLedgers | None) -> ConfigRecord:
    """Return the record with head and public account of a ledger, for a client's reply."""
    ledger = private_sum.ledger
    account = PublicAccount.of(
        ledger,
        outside=OUTSIDE,
        noise=private_sum.schedule.noise,
        lost=lost.count if lost else 0,
    )
    return ConfigRecord({"head": ledger.chain.head.text(), "account": account.text()})


def loss_in(message: Message) -> Loss | None:
    """Return the facts with which the server allows a new ledger; None if it does not."""
    record = cast(Mapping[str, Any], message.content.get(LEDGER) or {})
    return Loss.parse(str(record[LOSS])) if LOSS in record else None


def refuse_lost(folder: Path, message: Message) -> None:
    """Refuse a folder without the ledger that the server records, before a new one begins in it.

    Raises:
        LedgerError: if the folder has no ledger, and the server allows no new one.
    """
    record = cast(Mapping[str, Any], message.content.get(LEDGER) or {})
    if "head" in record and LOSS not in record and not has_ledger(folder):
        head = SealedHead.parse(str(record["head"]), where=SERVER)
        raise LedgerError(
            f"{SERVER} records {head.count} lines of this client's ledger, but {folder} has none; "
            "restore the folder from its newest backup, or set federation.readmit = true on the "
            "server for a new ledger that counts the lost one"
        )


def require_known(
    private_sum: PrivateSum | None, message: Message, lost: LostLedgers | None
) -> None:
    """Refuse to train if the server has recorded another ledger of this client.

    Args:
        private_sum: private sum of the client; None without privacy.
        message: message of the server.
        lost: ledgers that the client has lost.

    Raises:
        LedgerError: if the ledger is missing, or does not continue the recorded one, or if it is
            empty although a task may have begun.
    """
    if LEDGER not in message.content:
        return
    if private_sum is None:
        raise LedgerError(
            f"{SERVER} has recorded a ledger of this client, but its learner has privacy=None; "
            "give the same privacy as before, or start a new run"
        )
    ledger = private_sum.ledger
    if "begun" in cast(ConfigRecord, message.content[LEDGER]):
        if all(entry.purpose in OUTSIDE for entry in ledger.entries):
            raise LedgerError(
                f"{SERVER} has sent a private task to this client before, but the client's ledger "
                "has no entry of this run, so noise that it does not count may have been drawn; "
                "restore the client's folder from its newest backup, or start a new run with the "
                "lost steps in Privacy.spent"
            )
        return
    loss = loss_in(message)
    if loss and lost and lost.count == PublicAccount.parse(loss.account, where=SERVER).lost + 1:
        return  # its new ledger is the one that the server allows
    ledger.chain.require(Anchor(SealedHead.parse(head_in(message), where=SERVER), SERVER))
