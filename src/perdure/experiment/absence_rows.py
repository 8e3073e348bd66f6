"""Clients without a usable reply, in the form of `metrics.jsonl` and `result.json`."""

from typing import TYPE_CHECKING

from perdure.experiment.result_schema import AbsenceResult

if TYPE_CHECKING:
    from perdure.federated.server import Server


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
