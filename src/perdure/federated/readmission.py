"""Readmission of a private client that lost its disk, and with it its ledger and its key.

The client goes on with a new ledger, which begins with an upper bound of everything that the lost
one charged: the charges that its last reply named, and the planned charges of every task that was
sent to it since then. So the new epsilon is that of both ledgers. The noise for the rest of the
run is calibrated for the budget that is left, and is never less than before.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perdure.errors import LedgerError
from perdure.learner.folder_claims import LEDGER
from perdure.learner.learner import Learner
from perdure.planning.lost_charges import Stretch, at_most
from perdure.planning.training_plan import LostLedgers, Participation, TrainingPlan
from perdure.privacy.accounting.charges import Charge, merged
from perdure.privacy.ledger.public_account import PublicAccount
from perdure.privacy.ledger.storage import canonical_json, head_path
from perdure.utils.atomic_files import write_atomically

FILE = "readmission.json"
"""File, in the folder of a client, with what its lost ledgers charged."""
AGAIN = "empty the client's folder, so that it is readmitted with a new ledger"


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Facts that a server knows about a client's lost ledger, which it tells the client.

    Args:
        account: text of the ledger's last public account.
        known: exchange of the reply that had it.
        sent: exchanges of the tasks that were sent since then, and True for each task with which
            the client was told to begin a new ledger.
        exchange: the present exchange, in which the client begins anew.
    """

    account: str
    known: int
    sent: Sequence[tuple[int, bool]]
    exchange: int

    def text(self) -> str:
        """Return the facts as JSON, for a message."""
        return canonical_json(
            {
                "account": self.account,
                "known": self.known,
                "sent": [[number, int(anew)] for number, anew in self.sent],
                "exchange": self.exchange,
            }
        )

    @classmethod
    def parse(cls, text: str) -> "Loss":
        """Read the facts in a message of the server."""
        facts = json.loads(text)
        sent = [(int(number), bool(anew)) for number, anew in facts["sent"]]
        return cls(
            account=str(facts["account"]),
            known=int(facts["known"]),
            sent=sent,
            exchange=int(facts["exchange"]),
        )


@dataclass(frozen=True, kw_only=True)
class Readmission:
    """A client's new ledger after a loss: its earlier charges, and its first exchange.

    Args:
        lost: the lost ledgers.
        exchange: first exchange of the new ledger.
    """

    lost: LostLedgers
    exchange: int

    @classmethod
    def after(
        cls, loss: Loss, training: TrainingPlan, rounds: int, held: Sequence[int]
    ) -> "Readmission":
        """Return the readmission of a client after a loss.

        Args:
            loss: facts from the server.
            training: plan of the client, as for a run without a loss.
            rounds: number of training rounds of an experience.
            held: experiences of the federation that the client holds.

        Raises:
            LedgerError: if the lost ledger was of other records, or its charges cannot be bounded.
        """
        old = PublicAccount.parse(loss.account, where="the lost ledger")
        _refuse_other_records(old, training)
        privacy = training.privacy
        assert privacy is not None
        stretches = _stretches(loss, rounds, held)
        if stretches and privacy.epsilons and privacy.noise_multiplier is not None:
            raise LedgerError(
                "tasks were lost with the client's ledger, and a cap (epsilon and "
                "noise_multiplier) gives no bound for their charges; allowed: one of the two; "
                "restore the client's folder from its newest backup"
            )
        pending = at_most(training, old.noise, rounds, stretches)
        charged = {
            name: merged([*old.charges[name], *pending.get(name, ())]) for name in old.charges
        }
        known = old.independence
        lost = LostLedgers(
            count=old.lost + 1,
            charges=charged,
            noise=old.noise,
            independence="tested" if known == "tested" else "by construction" if known else "",
        )
        return cls(lost=lost, exchange=loss.exchange)

    @classmethod
    def recall(cls, folder: Path) -> "Readmission | None":
        """Read the readmission of the client in this folder; None if it lost no ledger.

        Raises:
            LedgerError: if the file cannot be read.
        """
        path = folder / FILE
        if not path.exists():
            return None
        try:
            facts = json.loads(path.read_text())
            charges = {
                name: tuple(Charge(*each) for each in rows)
                for name, rows in facts["charges"].items()
            }
            lost = LostLedgers(
                count=facts["count"],
                charges=charges,
                noise=tuple(facts["noise"]),
                independence=facts["independence"],
            )
            return cls(lost=lost, exchange=int(facts["exchange"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise LedgerError(
                f"{path} cannot be read ({error}), so the charges of a lost ledger are not known; "
                f"restore it from the newest backup, or {AGAIN}"
            ) from error

    def keep(self, folder: Path) -> None:
        """Write the readmission to the client's folder, before its ledger begins."""
        facts = {
            "count": self.lost.count,
            "charges": {
                name: [[c.sampling_rate, c.noise_multiplier, c.steps, c.noise] for c in history]
                for name, history in self.lost.charges.items()
            },
            "noise": list(self.lost.noise),
            "independence": self.lost.independence,
            "exchange": self.exchange,
        }
        write_atomically(folder / FILE, canonical_json(facts).encode())

    def apply(self, learner: Learner, rounds: int, held: Sequence[int]) -> None:
        """Give a learner the plan and the earlier charges of its new ledger."""
        learner.lost = self.lost
        whole = learner.participation
        taken = []
        for place, experience in enumerate(held):
            begin = experience * (rounds + 1)
            own = set(range(rounds)) if whole is None else whole.taken[place]
            taken.append(frozenset(n for n in own if begin + n >= self.exchange))
        learner.participation = Participation(rounds=rounds, taken=tuple(taken))


def refuse_readmission(allowed: bool) -> None:
    """Refuse a new ledger if the client's own app does not allow it, whatever the server says.

    Raises:
        LedgerError: names the setting.
    """
    if not allowed:
        raise LedgerError(
            "the server allows this client a new ledger, but the client's own app does not; "
            "allowed: readmit=True in client_app, or readmit = true in the site's config, if the "
            "server is trusted to repeat the charges of the lost ledger; or restore the client's "
            "folder from its newest backup"
        )


def has_ledger(folder: Path) -> bool:
    """Return True if a folder has a ledger, or any part of one."""
    ledger = folder / LEDGER
    return any(path.exists() for path in (ledger, head_path(ledger), folder / "private" / "key"))


def _stretches(loss: Loss, rounds: int, held: Sequence[int]) -> list[Stretch]:
    """Divide the lost tasks by the ledgers that may have charged them.

    A ledger charges each exchange once. So an exchange that was sent again may have been charged
    by the same ledger or by a new one; it is counted as by a new one.
    """
    parts: list[list[tuple[int, bool]]] = []
    for number, anew in loss.sent:
        if not parts or anew or number <= parts[-1][-1][0]:
            parts.append([])
        parts[-1].append((number, anew))
    found = []
    for part in parts:
        exchanges = {number for number, _ in part}
        asked = [held.index(number // (rounds + 1)) for number in exchanges]
        fresh = part[0][1] or loss.known < 0
        first = 0 if fresh else held.index(loss.known // (rounds + 1))
        taken = tuple(
            frozenset(n for n in range(rounds) if experience * (rounds + 1) + n in exchanges)
            for experience in held
        )
        found.append(Stretch(first=min(first, *asked), last=max(asked), taken=taken))
    return found


def _refuse_other_records(old: PublicAccount, training: TrainingPlan) -> None:
    own = {each.train.partition: each.train.declared_size for each in training.stream}
    charged = {name: size for name, size in old.sizes.items() if old.charges[name]}
    wrong = [name for name, size in charged.items() if own.get(name) != size]
    if wrong:
        raise LedgerError(
            f"the lost ledger charged {charged[wrong[0]]} records of the partition {wrong[0]!r}, "
            f"and the client's stream has {own.get(wrong[0], 0)}; allowed: the same partitions and "
            "declared sizes as before; give the client the same stream"
        )
