"""Tiny Shakespeare: lines of 309 speakers of the plays, as sequences of characters."""

import re
from collections import defaultdict
from pathlib import Path

import torch

from perdure.data.datasets.base import Dataset, data_root
from perdure.data.domain import InputDomain
from perdure.data.records import Records
from perdure.errors import ConfigError, DataError
from perdure.tasks import NextToken
from perdure.utils.checked_arguments import checked_arguments

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_FILES = ("tinyshakespeare.txt", "input.txt")
CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""Characters of the published text; a character's token is its index, and 0 is a new line."""
TEST_SHARE = 10
"""One of this many sequences of each speaker is in the test part."""


@checked_arguments
def shakespeare(
    root: str | Path | None = None, *, length: int = 64, speakers: int | None = None
) -> Dataset:
    """15,920 sequences of 64 characters of tiny Shakespeare, each of one speaker.

    Reads ROOT/shakespeare/tinyshakespeare.txt or input.txt. The lines of a speaker are joined and
    cut into sequences without overlap; a shorter rest is dropped. A sequence is one record of the
    task `NextToken`: each character is predicted from the characters before it, the first one from
    a line break. The last tenth of the sequences of a speaker, rounded down, is in the test part.

    `attributes["domain"]` is the number of the speaker, `categories["domain"]` has the names.
    Speakers are numbered by the total length of their lines, the longest first.

    Args:
        root: data root; see `perdure.data.datasets.base`.
        length: number of characters of a sequence.
        speakers: number of speakers to keep, those with the longest lines; None for all.

    Raises:
        ConfigError: if `length` is below 2, or `speakers` below 1.
        DataError: if the file is missing, or has other characters than the published file.

    Source: Karpathy 2015, "The unreasonable effectiveness of recurrent neural networks".
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise ConfigError.of("length", length, "whole numbers from 2")
    if speakers is not None and speakers < 1:
        raise ConfigError.of("speakers", speakers, "whole numbers from 1")
    folder = data_root(root) / "shakespeare"
    path = next((folder / name for name in SHAKESPEARE_FILES if (folder / name).is_file()), None)
    if path is None:
        raise DataError(
            f"no {' or '.join(SHAKESPEARE_FILES)} in {folder}; get it from {SHAKESPEARE_URL}"
        )
    lines = read_speeches(path)
    names = tuple(sorted(lines, key=lambda name: (-len(lines[name]), name)))[:speakers]
    tokens = {character: token for token, character in enumerate(CHARACTERS)}
    targets = []
    speaker_of = []
    in_test = []
    for number, name in enumerate(names):
        text = lines[name]
        count = len(text) // length
        try:
            coded = torch.tensor([tokens[each] for each in text[: count * length]])
        except KeyError as strange:
            raise DataError(
                f"{path} has the character {strange} in the lines of {name}; allowed: those in "
                f"the published text; get it from {SHAKESPEARE_URL}"
            ) from None
        targets.append(coded.long().view(count, length))
        speaker_of += [number] * count
        in_test += [place >= count - count // TEST_SHARE for place in range(count)]
    following = torch.cat(targets)
    records = Records(
        inputs=torch.nn.functional.pad(following[:, :-1], (1, 0)),  # a new line comes first
        labels=following,
        ids=torch.arange(len(following)),
        partition="shakespeare",
        domain=InputDomain(
            shape=(length,), dtype=torch.int64, vocabulary=len(CHARACTERS), sequence_axes=(0,)
        ),
        attributes={"domain": torch.tensor(speaker_of)},
        task=NextToken(),
        size_published=True,
    )
    test = torch.tensor(in_test)
    return Dataset(
        name="shakespeare",
        train=records.take(~test),
        test=records.take(test),
        num_classes=len(CHARACTERS),
        input_shape=(length,),
        public_facts=("speakers and the lengths of their lines are those of the published text",),
        categories={"domain": names},
    )


def read_speeches(path: Path) -> dict[str, str]:
    """Lines of each speaker, joined, from a file of speeches separated by empty lines.

    Args:
        path: path of the text file.

    Raises:
        DataError: if the file cannot be read, or has a speech without a speaker.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; put a complete copy there") from error
    found: defaultdict[str, list[str]] = defaultdict(list)
    for speech in re.split(r"\n{2,}", text.strip()):
        first, _, lines = speech.partition("\n")
        if not first.endswith(":"):
            raise DataError(
                f"{path} has a speech that begins with {first[:40]!r}; allowed: a speaker and a "
                f"colon, as 'ROMEO:'; get the published text from {SHAKESPEARE_URL}"
            )
        found[first.removesuffix(":")].append(lines)
    return {name: "\n".join([*speeches, ""]) for name, speeches in found.items()}
