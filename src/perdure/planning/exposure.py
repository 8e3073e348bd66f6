"""Exposure of every partition, computed from declared sizes without reading a record."""

import math
from collections.abc import Sequence, Set

from perdure.contract.exposure import Exposure
from perdure.contract.plan import Plan
from perdure.data.experience import Experience, declared_size_of, partitions_of
from perdure.errors import ConfigError


def exposure(
    experiences: Sequence[Experience],
    plan: Plan,
    *,
    batch_size: int,
    rate: float | None = None,
    bands: int | None = None,
    excluded: Set[str] = frozenset(),
) -> Exposure:
    """Compute the exposure in the last of `experiences`, from declared sizes only.

    New records and memory are one pool with one sampling rate. Records of earlier experiences that
    may be in memory are charged whether they are stored or not.

    Args:
        experiences: all experiences so far; the exposure is for the last one.
        plan: plan of the strategy for the experience.
        batch_size: expected number of records per step.
        rate: sampling rate; None for batch_size / declared pool size.
        bands: smallest distance between two steps of a record, if the order is fixed; None if it is
            not.
        excluded: partitions that are left out of all pools.

    Raises:
        ConfigError: if an epoch has fewer steps than `bands`.
    """
    size, exposed = pool_size(experiences, plan, excluded)
    past = experiences[:-1]
    if plan.memory and plan.memory.rehearsed and plan.pool != "memory":
        size += expected_stored(past, plan.memory.capacity, excluded)
        exposed |= partitions_of(past) - excluded
    chosen = min(1.0, batch_size / size) if rate is None else rate
    slots = None
    if bands is not None:
        slots = max(1, math.ceil(size / batch_size))
        chosen = 1 / slots
        if slots < bands:
            raise ConfigError.of(
                "privacy.bands",
                bands,
                f"up to {slots}, the number of steps in an epoch of this run",
            )
    scope = dict.fromkeys(sorted(exposed), chosen if slots is None else 1.0)
    return Exposure(scope=scope, rate=chosen, pool_size=size, slots=slots)


def pool_size(
    experiences: Sequence[Experience], plan: Plan, excluded: Set[str] = frozenset()
) -> tuple[float, set[str]]:
    """Return the declared number of records in the pool, and the names of their partitions.

    Records that are rehearsed in addition to the pool are not counted.
    """
    pooled = experiences[-1:] if plan.pool == "experience" else experiences
    partitions = set(partitions_of(pooled) - excluded)
    if plan.pool == "memory" and plan.memory:
        return expected_stored(experiences, plan.memory.capacity, excluded), partitions
    return _staying(pooled, excluded), partitions


def expected_stored(
    seen: Sequence[Experience], capacity: int, excluded: Set[str] = frozenset()
) -> float:
    """Declared number of records in a memory, without the partitions `excluded`."""
    everything = declared_size_of(seen)
    staying = _staying(seen, excluded)
    return min(capacity, everything) * staying / everything if everything else 0.0


def _staying(experiences: Sequence[Experience], excluded: Set[str]) -> int:
    """Declared number of records without the partitions `excluded`."""
    if not excluded:
        return declared_size_of(experiences)
    kept = (each.train for each in experiences if each.train.partition not in excluded)
    return sum(records.declared_size for records in kept)


def reference_exposures(
    experiences: Sequence[Experience],
    plan: Plan,
    *,
    batch_size: int,
    excluded: Set[str] = frozenset(),
) -> dict[str, Exposure]:
    """Compute the exposure by each reference gradient of a step in the last of `experiences`.

    The plan has one reference gradient over all stored records, named `reference`, or one per
    earlier experience, named `reference 0`, `reference 1` and so on.
    """
    if not plan.memory or plan.memory.rehearsed:
        return {}
    past = [e for e in experiences[:-1] if e.train.partition not in excluded]
    if not past:
        return {}
    whole = expected_stored(experiences[:-1], plan.memory.capacity, excluded)
    sizes = {f"reference {e.index}": (whole * share(e, past), {e.train.partition}) for e in past}
    if plan.memory.use == "reference":
        sizes = {"reference": (whole, {e.train.partition for e in past})}
    rows = plan.memory.batch_size or batch_size
    return {
        name: Exposure(
            scope=dict.fromkeys(sorted(exposed), min(1.0, rows / size)),
            rate=min(1.0, rows / size),
            pool_size=size,
        )
        for name, (size, exposed) in sizes.items()
    }


def share(experience: Experience, among: Sequence[Experience]) -> float:
    """Declared size of an experience divided by the total declared size of those in `among`."""
    return experience.train.declared_size / sum(e.train.declared_size for e in among)


def split_steps(steps: int, blocks: int) -> list[range]:
    """Cut the steps of an experience into blocks of nearly equal length."""
    return [block_of_steps(steps, blocks, number) for number in range(blocks)]


def block_of_steps(steps: int, blocks: int, number: int) -> range:
    """Return block `number` of those into which `split_steps` cuts the steps."""
    return range(number * steps // blocks, (number + 1) * steps // blocks)
