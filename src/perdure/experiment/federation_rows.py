"""Clients of a federated run in the form of `metrics.jsonl` and `result.json`.

Rows have missing replies, and participation, bytes and accuracy of every client.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from perdure.adversarial import Attack
from perdure.experiment.result_schema import AbsenceResult, ClientResult, ClientsResult, OverClients

if TYPE_CHECKING:
    from perdure.federated.server import Server


class FederationRows:
    """Rows about the clients of one training, kept from one evaluation to the next."""

    def __init__(self) -> None:
        self._told = 0
        self._server: Server | None = None
        self._seconds: dict[int, float] = {}
        self.measured: dict[str, Any] = {}
        """Values after the last evaluation, for the line of `metrics.jsonl`."""

    def evaluated(self, server: "Server") -> dict[str, float]:
        """Take the rows of a server after an evaluation, and return the curves for loggers."""
        self._server = server
        absent = absence_rows(server, self._told)
        self._told += len(absent)
        accuracies = server.client_accuracies()
        rows = client_rows(server, accuracies)
        over = summary_row(accuracies, higher_is_better=_higher_is_better(server))
        self.measured = {"clients": rows, "accuracy_over_clients": over}
        if absent:
            self.measured["absences"] = absent
        curves = {f"clients/accuracy_{name}": value for name, value in (over or {}).items()}
        for name in ("bytes_sent", "bytes_received"):
            curves[f"clients/{name}"] = float(sum(row[name] for row in rows))
        return curves

    def attacked(self, known: Sequence[float], attack: Attack, seed: int) -> None:
        """Add accuracy under attack to the rows of the last evaluation; nothing without clients.

        Args:
            known: robust accuracy of each stage so far on the test records of the federation.
            attack: attack, with bounds that fit the stream.
            seed: seed of the attack's random numbers.
        """
        server = self._server
        if server is None:
            return
        from perdure.federated.client_accuracy import own_robustness

        robust: list[float | None] = [None] * len(server.clients)
        if server.tests is not None and server.sizes is not None:
            robust = own_robustness(
                server.learner, server.tests, server.sizes, attack, known=known, seed=seed
            )
        for row, value in zip(self.measured["clients"], robust, strict=True):
            row["robust_accuracy"] = value
        self.measured["robust_accuracy_over_clients"] = summary_row(robust, higher_is_better=True)

    def ended(self, server: "Server") -> None:
        """Take the times of a server that has ended, unless they depend on private records."""
        if server.private:
            return
        self._seconds = {each.client: each.seconds for each in server.clients}

    def result(
        self,
        rows: Sequence[list[ClientResult]],
        over: Sequence[OverClients | None],
        robust: Sequence[OverClients | None],
    ) -> ClientsResult:
        """Return the rows after the last stage with seconds; {} without a federation.

        Args:
            rows: rows of the clients after each stage.
            over: summaries of their accuracies after each stage.
            robust: summaries of their accuracies under attack; () without an attack.
        """
        if not rows:
            return {}
        timed: list[ClientResult] = [
            {**row, "seconds": self._seconds.get(row["client"])} for row in rows[-1]
        ]
        found: ClientsResult = {"clients": timed, "accuracy_over_clients": over[-1]}
        if robust:
            found["robust_accuracy_over_clients"] = robust[-1]
        return found


def client_rows(server: "Server", accuracies: Sequence[float | None]) -> list[ClientResult]:
    """Return the counts and the accuracy of every client, without its seconds.

    Seconds differ between two runs with the same bits.
    """
    return [
        {
            "client": total.client,
            "asked": total.asked,
            "accepted": total.accepted,
            "bytes_sent": total.bytes_sent,
            "bytes_received": total.bytes_received,
            "accuracy": accuracy,
        }
        for total, accuracy in zip(server.clients, accuracies, strict=True)
    ]


def summary_row(
    accuracies: Sequence[float | None], *, higher_is_better: bool
) -> dict[str, float] | None:
    """Return mean, worst value and spread of the clients' accuracies; None without any."""
    from perdure.federated.client_accuracy import accuracy_over_clients

    found = accuracy_over_clients(accuracies, higher_is_better=higher_is_better)
    return None if found is None else asdict(found)


def _higher_is_better(server: "Server") -> bool:
    return server.stream.task.metric.higher_is_better


def absence_rows(server: "Server", told: int = 0) -> list[AbsenceResult]:
    """Return the absences that a server has noted since its start.

    Args:
        server: server of a federation.
        told: number of the first absences that are left out.
    """
    exchanges = server.federation.rounds + 1
    found: list[AbsenceResult] = []
    for each in server.absences[told:]:
        experience, number = divmod(each.exchange, exchanges)
        found.append(
            {
                "experience": experience,
                "round": number if number < server.federation.rounds else None,
                "client": each.client,
                "cause": each.cause,
                "field": each.field,
            }
        )
    return found
