"""Split a stream over clients by an attribute of the records, such as their hospital."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from perdure.data.client_splits import ACTUAL_SIZES, of_clients, sizes_by_experience
from perdure.data.experience import Stream, placed_again, require_stream
from perdure.data.groups import group_of
from perdure.errors import ConfigError, PrivacyError
from perdure.utils.checked_arguments import checked_arguments


@checked_arguments
def by_attribute(
    stream: Stream,
    attribute: str,
    *,
    clients: int,
    values: Sequence[int] | None = None,
    exact: bool = True,
    client_sizes: Sequence[Sequence[int]] | None = None,
) -> list[Stream]:
    """Give each client the records of one value of an attribute, such as a hospital or a region.

    A client without records of an experience has a gap there (declared size 0), and is not asked
    for it. Every client gets all test records, which are public.

    Guarantee: with `exact=False`, the client of a record depends only on its own value and on
    public facts. With `exact=True`, sizes and gaps depend on all records, and `assigned_by_record`
    of the streams is False.

    Args:
        stream: stream to split.
        attribute: name among `Records.attributes`; its values are whole numbers from 0.
        clients: number of clients, one for each value.
        values: public value of each client; records of other values are left out. Default: client k
            has the value k, and no record may have another value.
        exact: True to declare the actual sizes, False for declared sizes (needed under privacy).
        client_sizes: public number of records of every client (outer) in every experience (inner),
            0 for a gap; given if and only if `exact` is False.

    Raises:
        ConfigError: if the number of clients is not the number of values, or sizes do not fit.
        DataError: if the records do not have the attribute, or its values are not whole numbers.
        PrivacyError: with `exact=False`, if the values were found in the records, and not declared.
    """
    require_stream(stream)
    if clients < 1:
        raise ConfigError.of("clients", clients, "whole numbers from 1")
    chosen = tuple(range(clients)) if values is None else tuple(values)
    if len(chosen) != clients or len(set(chosen)) != clients:
        allowed = f"{clients} values of {attribute}, each once, one for each of {clients} clients"
        raise ConfigError.of("values", chosen, allowed)
    sizes = _declared_sizes(stream, attribute, clients, exact, client_sizes)
    groups = [group_of(each.train, attribute).cpu() for each in stream]
    if values is None:
        _refuse_other_values(attribute, torch.cat(groups), clients, every=exact)
    owners = [_places(each, chosen) for each in groups]
    rule = "" if exact else repr(["by_attribute", attribute, chosen, sizes])
    whole = replace(stream, assigned_by_record=placed_again(stream, by_record=not exact))
    return of_clients(whole, owners, clients, sizes, rule)


def _declared_sizes(
    stream: Stream,
    attribute: str,
    clients: int,
    exact: bool,
    client_sizes: Sequence[Sequence[int]] | None,
) -> Sequence[Sequence[int | None]]:
    """Return the size of every client (inner) in every experience (outer); None for the actual one.

    Raises:
        ConfigError: if sizes are given where they are counted, or missing where they are not.
        PrivacyError: if sizes are declared, but the numbers of the values depend on all records.
    """
    if exact:
        if client_sizes is not None:
            raise ConfigError.of("client_sizes", client_sizes, ACTUAL_SIZES)
        return [[None] * clients for _ in stream]
    if any(attribute in each.train.numbered_by_records for each in stream):
        raise PrivacyError(
            f"the values of {attribute} were found in the records and numbered in their order, so "
            "one record more may move others to other clients; declare all values, with "
            "categories= of from_pandas or ClassLabel of from_huggingface"
        )
    if client_sizes is None:
        allowed = "public sizes for every client, because records of a value are not counted here"
        raise ConfigError.of("client_sizes", None, allowed)
    return sizes_by_experience(client_sizes, clients, len(stream))


def _refuse_other_values(attribute: str, found: Tensor, clients: int, *, every: bool) -> None:
    """Refuse values without a client and, with `every`, clients without a record."""
    known = torch.unique(found).tolist()
    if max(known, default=0) >= clients or (every and len(known) < clients):
        numbers = ", ".join(map(str, known))
        allowed = (
            f"one client for each value of {attribute}, which are {numbers}; or give the values of "
            "the clients, as values = [0, 2]"
        )
        raise ConfigError.of("clients", clients, allowed)


def _places(groups: Tensor, values: Sequence[int]) -> Tensor:
    """Return (n,) client of each record: the index of its value, or -1 for a value of nobody."""
    places = torch.full_like(groups, -1)
    for client, value in enumerate(values):
        places[groups == value] = client
    return places
