"""Data sets of token sequences, which may have different lengths and padding."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perdure.data.datasets.base import Dataset
from perdure.data.domain import InputDomain
from perdure.data.sources.assembly import (
    Part,
    Settings,
    dataset_of,
    refuse_beside_share,
    share_of,
)
from perdure.data.sources.targets import TaskName, task_of
from perdure.data.sources.values import numbers_of
from perdure.errors import ConfigError, DataError
from perdure.tasks import NextToken, Task
from perdure.utils.checked_arguments import checked_arguments

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@checked_arguments
def from_tokens(
    sequences: "Sequence[ArrayLike | Tensor] | ArrayLike | Tensor",
    targets: "ArrayLike | Tensor | None" = None,
    *,
    vocabulary: int,
    padding: int | None = None,
    length: int | None = None,
    test: "Sequence[ArrayLike | Tensor] | ArrayLike | Tensor | float" = 0.2,
    task: TaskName | Task | None = None,
    classes: Sequence[object] | None = None,
    num_classes: int | None = None,
    ids: "ArrayLike | Tensor | None" = None,
    test_ids: "ArrayLike | Tensor | None" = None,
    attributes: Mapping[str, "ArrayLike | Tensor"] | None = None,
    test_attributes: Mapping[str, "ArrayLike | Tensor"] | None = None,
    declared_size: int | None = None,
    seed: int = 0,
    name: str = "data",
) -> Dataset:
    """Build a data set from sequences of tokens, each one record.

    Without targets, every token is predicted from the tokens before it (`NextToken`): inputs are
    all tokens except the last, targets all tokens except the first, and positions of padding are
    ignored. With targets, a sequence has a class, or the target of another task. Shorter sequences
    are filled with the padding id. If a given sequence already has padding at its end, these
    positions are ignored, too.

    >>> from_tokens([[3, 1, 2], [2, 2]], vocabulary=4, padding=0, test=0.5)

    Guarantee: none for facts computed from the records: the length of the longest sequence, unless
    it is declared, and the facts named in `from_arrays`. The test part is public.

    Args:
        sequences: one sequence of whole numbers per record; or (n, L) numbers.
        targets: one target per sequence, as in `from_arrays`; None for the next token.
        vocabulary: declared number of different tokens, which are 0 .. vocabulary - 1.
        padding: token that fills sequences after their end. Needed if lengths differ.
        length: declared length L of the inputs; longer sequences are refused. Default: the length
            of the longest sequence.
        test: sequences of the test part, with targets (sequences, targets); or the average share of
            records in the test part, chosen by a hash of their ids.
        task: meaning of the targets. Default: "next-token" without targets, "single-label" with
            them.
        classes: all classes, as the targets write them. Default: as in `from_arrays`.
        num_classes: number of classes, if targets are numbers; the vocabulary for the next token.
        ids: (n,) identity of each sequence, as in `from_arrays`. Default: the position.
        test_ids: (m,) identities of the sequences of a given test part.
        attributes: further facts of each sequence, name to (n,) numbers, as in `from_arrays`.
        test_attributes: attributes (m,) of the sequences of a given test part.
        declared_size: public number of training records. Default: the number of sequences.
        seed: seed of the hash that draws the test part.
        name: name of the data set and of its partition. Other records, or other targets of the same
            records, need another name: a warm start compares names.

    Raises:
        ConfigError: if a setting is not allowed.
        DataError: if a token is outside the vocabulary (with row and column), or if sequences are
            empty, too long, or of different lengths without padding; other cases as in
            `from_arrays`.
    """
    meaning = task_of(task or ("next-token" if targets is None else "single-label"))
    shift = int(isinstance(meaning, NextToken))
    if bool(shift) != (targets is None):
        allowed = (
            "None for task 'next-token', whose targets are in the sequences; one target per "
            "sequence for other tasks"
        )
        raise ConfigError.of("targets", "an array" if shift else None, allowed)
    _refuse_other_counts(vocabulary=vocabulary, length=length)
    share = isinstance(test, int | float) and not isinstance(test, bool)
    label = "" if share else "training "
    rows = _rows(sequences, f"{label}sequences", vocabulary, padding, 1 + shift)
    test_rows: list[Tensor] = []
    test_targets: object = None
    if not share:
        test_sequences, test_targets = _test_part(test, with_targets=not shift)
        test_rows = _rows(test_sequences, "test sequences", vocabulary, padding, 1 + shift)
    width = length or max(len(row) for row in [*rows, *test_rows]) - shift

    part = partial(_part, width=width, padding=padding, task=meaning)
    rest: Part | float
    if share:
        rest = share_of(test, others="sequences of its own")
        refuse_beside_share(test_ids=test_ids, test_attributes=test_attributes)
    else:
        rest = part(test_rows, test_targets, test_ids, test_attributes, "test ")
    settings = Settings(
        name=name,
        task=meaning,
        classes=classes,
        num_classes=vocabulary if shift else num_classes,
        declared_size=declared_size,
        seed=seed,
        domain=_domain(width, vocabulary, padding),
        facts=() if length else ("the length of the longest sequence is declared public",),
    )
    return dataset_of(part(rows, targets, ids, attributes, label), rest, settings, {})


def _part(
    rows: Sequence[Tensor],
    given: object,
    ids: object,
    attributes: object,
    label: str,
    *,
    width: int,
    padding: int | None,
    task: Task,
) -> Part:
    """Pad the sequences of a part; without targets, the targets are the next tokens."""
    shift = isinstance(task, NextToken)
    filled = _filled(rows, width + shift, padding, f"{label}sequences")
    return Part(
        inputs=filled[:, :width].contiguous(),
        targets=_following(filled, rows, task.padding) if isinstance(task, NextToken) else given,
        ids=ids,
        attributes=attributes,  # type: ignore[arg-type]
        label=label,
    )


def _domain(length: int, vocabulary: int, padding: int | None) -> InputDomain:
    return InputDomain(
        shape=(length,),
        dtype=torch.int64,
        vocabulary=vocabulary,
        padding=padding,
        sequence_axes=() if padding is None else (0,),
    )


def _refuse_other_counts(*, vocabulary: object, length: object) -> None:
    for field, value in (("vocabulary", vocabulary), ("length", length)):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole and value >= 1) and not (field == "length" and value is None):  # type: ignore[operator]
            raise ConfigError.of(field, value, "a whole number from 1")


def _test_part(test: object, *, with_targets: bool) -> tuple[object, object]:
    """Split a user's `test` into sequences and targets; None for targets without them."""
    if not with_targets:
        return test, None
    if not isinstance(test, tuple) or len(test) != 2:
        given = f"a {type(test).__name__}"
        raise ConfigError.of("test", given, "a share between 0 and 1, or (sequences, targets)")
    return test


def _rows(
    sequences: object, name: str, vocabulary: int, padding: int | None, least: int
) -> list[Tensor]:
    """Convert each sequence to int64 tokens, without the padding at its end.

    Args:
        sequences: sequences given by the user.
        name: name of the argument and its part, for the message.
        vocabulary: number of different tokens.
        padding: token that fills sequences after their end.
        least: smallest number of tokens in a sequence.

    Raises:
        DataError: names row and column of the first token that is not allowed.
    """
    if not isinstance(sequences, list | tuple):
        sequences = numbers_of(sequences, name)
        if sequences.dim() != 2:
            raise DataError(
                f"{name} have shape {tuple(sequences.shape)}; allowed: (n, L), or a list of n "
                "sequences; cut one long text into pieces first, text.unfold(0, L + 1, L)"
            )
    if not len(sequences):
        raise DataError(f"{name} are empty; allowed: at least one sequence")
    found = []
    for number, sequence in enumerate(sequences):
        row = numbers_of(sequence, f"row {number} of {name}")
        if row.dim() != 1 or (row.is_floating_point() and len(row)):
            raise DataError(
                f"row {number} of {name} is {row.dtype} of shape {tuple(row.shape)}; allowed: "
                "whole numbers, one per token"
            )
        row = row.long()
        outside = ((row < 0) | (row >= vocabulary)).nonzero()
        if len(outside):
            column = int(outside[0])
            raise DataError(
                f"{name} have {int(row[column])} in row {number}, column {column}; allowed: tokens "
                f"0 .. {vocabulary - 1}; give a larger vocabulary"
            )
        if padding is not None:
            real = (row != padding).nonzero()
            row = row[: int(real[-1]) + 1 if len(real) else 0]
        if len(row) < least:
            raise DataError(
                f"row {number} of {name} has {len(row)} tokens; allowed: at least {least}; leave "
                "out the row"
            )
        found.append(row)
    return found


def _filled(rows: Sequence[Tensor], width: int, padding: int | None, name: str) -> Tensor:
    """Pad sequences to tokens (n, width).

    Args:
        rows: int64 tokens of each sequence.
        width: number of tokens of each padded row.
        padding: token that fills sequences after their end.
        name: name of the argument and its part, for the message.

    Raises:
        DataError: names the row of the first sequence that is too long or too short.
    """
    made = torch.full((len(rows), width), padding or 0)
    for number, row in enumerate(rows):
        if len(row) > width:
            raise DataError(
                f"row {number} of {name} has {len(row)} tokens; allowed: at most {width}; cut the "
                "row, or give a larger length"
            )
        if len(row) < width and padding is None:
            raise DataError(
                f"row {number} of {name} has {len(row)} tokens; allowed: {width} tokens in each "
                "row, or padding=TOKEN to fill shorter rows"
            )
        made[number, : len(row)] = row
    return made


def _following(filled: Tensor, rows: Sequence[Tensor], padding: int) -> Tensor:
    """Return the token (n, L) that follows each position, and `padding` after the end.

    Args:
        filled: (n, L + 1) tokens.
        rows: each sequence without its padding.
        padding: target of a position that is not counted.
    """
    lengths = torch.tensor([len(row) for row in rows])
    position = torch.arange(1, filled.shape[1])
    return torch.where(position < lengths[:, None], filled[:, 1:], padding)
