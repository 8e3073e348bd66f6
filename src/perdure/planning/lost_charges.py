"""Upper bound of the charges of tasks whose ledger was lost before anybody else knew them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from perdure.planning.budget import Histories, charges
from perdure.planning.training_plan import Participation, TrainingPlan
from perdure.privacy.private_sum import Schedule


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Tasks of a client that one ledger has charged, each at most once.

    Args:
        first: first experience that may have been consolidated.
        last: last experience of a task.
        taken: rounds of every experience in which the client may have trained.
    """

    first: int
    last: int
    taken: tuple[frozenset[int], ...]


def at_most(
    training: TrainingPlan, noise: Sequence[float], rounds: int, stretches: Sequence[Stretch]
) -> Histories:
    """Return charges that cost at least as much as those of all these tasks, by partition.

    They depend on public facts only. Every release of an experience is counted, even if its
    consolidation was not asked for.

    Args:
        training: plan of the client.
        noise: smallest noise multiplier of a step that the client used in each experience.
        rounds: number of training rounds of an experience.
        stretches: tasks, by the ledger that was lost with them.
    """
    schedule = Schedule(noise=tuple(noise))
    found: Histories = {}
    for stretch in stretches:
        plan = replace(training, participation=Participation(rounds=rounds, taken=stretch.taken))
        for index in range(stretch.first, stretch.last + 1):
            new = charges(plan, plan.upto(index), schedule.noise_in(index))
            for partition, history in new.items():
                found.setdefault(partition, []).extend(history)
    return found
