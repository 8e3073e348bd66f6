"""Scenarios that use an attribute of the records: their time, or their domain."""

from collections.abc import Sequence

import torch
from torch import Tensor

from perdure.data.datasets.base import Dataset, require_data_set
from perdure.data.experience import Experience, Stream
from perdure.data.records import Records
from perdure.data.scenarios.places import expected_sizes, placed, placing_rule, with_sizes
from perdure.errors import ConfigError, DataError
from perdure.utils.checked_arguments import checked_arguments


@checked_arguments
def by_time(
    data: Dataset,
    attribute: str = "time",
    *,
    experiences: int | None = None,
    boundaries: Sequence[float] | None = None,
    declared_size: int | Sequence[int] | None = None,
) -> Stream:
    """Cut the records by their time; domain-incremental.

    With `boundaries` b, experience e has the times in [b[e-1], b[e]), the first one all times
    before b[0], and the last one all times from b[-1]. With `experiences`, the boundaries are
    quantiles of the times of training records: experiences have about equal sizes, and records with
    the same time stay together.

    Guarantee: with `boundaries`, which are public, the experience of a record depends only on its
    own time, and experiences are separate partitions. With `experiences` the boundaries depend on
    all records, so `assigned_by_record` is False.

    Args:
        data: the source; its training and test records have the attribute.
        attribute: name of the time among `Records.attributes`.
        experiences: number of experiences, at least 1. Give this or `boundaries`.
        boundaries: public, ascending times at which a new experience begins.
        declared_size: public number of training records of an experience, one for all or one each.
            Default: an equal share of the declared size of `data`; without one, the actual size.

    Raises:
        ConfigError: if boundaries are not ascending, if there are more experiences than different
            times, or if `declared_size` is neither one number nor one number per experience.
        DataError: if records do not have the attribute, or a time is missing (NaN).
    """
    require_data_set(data)
    if (experiences is None) == (boundaries is None):
        given = f"experiences={experiences}, boundaries={boundaries}"
        raise ConfigError.of("cut", given, "exactly one of experiences and boundaries")
    times = [_values(part, attribute).double() for part in (data.train, data.test)]
    if boundaries is None:
        assert experiences is not None
        cuts = _quantiles(times[0], experiences)
    else:
        cuts = torch.tensor(list(boundaries), dtype=torch.float64)
        ascending = bool((cuts.diff() > 0).all()) and bool(cuts.isfinite().all())
        if not len(cuts) or not ascending:
            raise ConfigError.of("boundaries", tuple(boundaries), "ascending times, at least one")
    places = [torch.bucketize(each, cuts, right=True) for each in times]
    rule: list[object] | None = [attribute, cuts.tolist()] if boundaries is not None else None
    return _by_place(data, "time", places, len(cuts) + 1, rule, declared_size)


@checked_arguments
def by_domain(
    data: Dataset,
    attribute: str = "domain",
    *,
    order: Sequence[int] | None = None,
    declared_size: int | Sequence[int] | None = None,
) -> Stream:
    """Make one experience of each natural domain, such as a hospital, a speaker or a camera.

    The stream is domain-incremental: labels and head do not change.

    Guarantee: if the domains are public (`order`, or `Dataset.categories`), the experience of a
    record depends only on its own domain, and experiences are separate partitions. Domains that are
    found in the records, here or by `from_pandas`, depend on all records, so `assigned_by_record`
    is then False.

    Args:
        data: the source; its training and test records have the attribute.
        attribute: name of the domain among `Records.attributes`.
        order: public numbers of the domains, in the order of training. Default: all domains in
            `Dataset.categories`, or, without these, the domains of the training records in
            ascending order.
        declared_size: public number of training records of an experience, one for all or one each.
            Default: an equal share of the declared size of `data`; without one, the actual size.

    Raises:
        ConfigError: if a domain is twice in the order, or if `declared_size` is neither one number
            nor one number per experience.
        DataError: if records do not have the attribute, or have a domain that is not in the order.
    """
    require_data_set(data)
    values = [_values(part, attribute) for part in (data.train, data.test)]
    names = data.categories.get(attribute)
    declared = order is not None or names is not None
    public = declared and attribute not in data.train.numbered_by_records
    if order is None:
        order = range(len(names)) if names is not None else torch.unique(values[0]).tolist()
    if any(isinstance(each, str) for each in order):
        allowed = f"numbers of domains, whose names are {names or 'not declared'}"
        raise ConfigError.of("order", tuple(order), allowed)
    # plain numbers, of an array as well: they go into a digest
    order = torch.as_tensor(order).tolist()
    if not order or len(set(order)) < len(order):
        raise ConfigError.of("order", tuple(order), "numbers of domains, each once")
    places = [_positions(each, order, attribute) for each in values]
    rule: list[object] | None = [attribute, list(order)] if public else None
    return _by_place(data, "domain", places, len(order), rule, declared_size)


def _by_place(
    data: Dataset,
    kind: str,
    places: Sequence[Tensor],
    count: int,
    facts: list[object] | None,
    declared_size: int | Sequence[int] | None,
) -> Stream:
    """Make a stream from the experience of each record.

    Args:
        data: the source.
        kind: name of the scenario.
        places: experience of every training record (n,), and of every test record (m,).
        count: number of experiences.
        facts: public facts that decide the experience of a record; None if other records do, too.
        declared_size: public number of training records of an experience.
    """
    sizes = expected_sizes(data, declared_size, [1 / count] * count)
    rule = "" if facts is None else placing_rule(kind, data, facts=facts, sizes=sizes)
    train, test = places
    parts = [
        Experience(
            index=index,
            train=placed(data.train, train == index, index, rule),
            test=data.test.take((test == index).to(data.test.inputs.device)),
            classes=tuple(range(data.num_classes)),
        )
        for index in range(count)
    ]
    return Stream(
        name=f"{kind}-{data.name}",
        scenario="domain",
        experiences=with_sizes(parts, sizes),
        num_classes=data.num_classes,
        input_shape=data.input_shape,
        assigned_by_record=facts is not None,
    )


def _values(records: Records, attribute: str) -> Tensor:
    """Return (n,) value of the attribute for every record, on the CPU."""
    if attribute not in records.attributes:
        known = ", ".join(records.attributes) or "none"
        raise DataError(
            f"{records.partition} has no attribute {attribute!r}; its attributes: {known}; give "
            f"training and test records Records(attributes={{{attribute!r}: tensor}})"
        )
    values = records.attributes[attribute].cpu()
    missing = values.isnan().nonzero().flatten().tolist()
    if missing:
        raise DataError(
            f"{records.partition} has no {attribute} in row {missing[0]} ({len(missing)} in all); "
            "set a value, or leave the record out"
        )
    return values


def _quantiles(times: Tensor, experiences: int) -> Tensor:
    """Return (experiences - 1,) times at which new experiences begin, for about equal sizes."""
    found = torch.unique(times)
    if not 1 <= experiences <= len(found):
        allowed = f"1 to {len(found)}, the number of different times"
        raise ConfigError.of("experiences", experiences, allowed)
    ordered = times.sort().values
    cuts = ordered[torch.arange(1, experiences) * len(times) // experiences]
    if len(torch.unique(cuts)) < len(cuts) or (len(cuts) and cuts[0] == ordered[0]):
        # too many records have the same time: give each experience equally many different times
        cuts = found[torch.arange(1, experiences) * len(found) // experiences]
    return cuts


def _positions(values: Tensor, order: Sequence[int], attribute: str) -> Tensor:
    """Return (n,) index of every value in the order."""
    places = torch.full(values.shape, -1, dtype=torch.int64)
    for place, domain in enumerate(order):
        places[values == domain] = place
    strange = values[places < 0]
    if len(strange):
        raise DataError(
            f"{attribute} {strange[0].item()} is in no experience; the order has {tuple(order)}; "
            "add it, or leave its records out"
        )
    return places
