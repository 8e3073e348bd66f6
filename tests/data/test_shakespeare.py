"""Tiny Shakespeare from a small file in its format: speakers, sequences and refusals."""

import pytest
import torch

from perdure.data import load, shakespeare
from perdure.data.datasets.shakespeare import CHARACTERS
from perdure.errors import ConfigError, DataError
from perdure.tasks import NextToken

TEXT = "ROMEO:\n{}\n\nJULIET:\nAy me!\n\n\nROMEO:\nShe speaks.\nO, speak again!\n"


def place(root, text, name="tinyshakespeare.txt"):
    folder = root / "shakespeare"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return root


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "input.txt"])
def test_shakespeare_cuts_the_lines_of_a_speaker_into_sequences(tmp_path, name):
    place(tmp_path, TEXT.format("x" * 60), name)
    data = shakespeare(tmp_path, length=5)
    assert data.categories == {"domain": ("ROMEO", "JULIET")}
    assert data.task == NextToken() and data.num_classes == 65 == len(set(CHARACTERS))
    # 60 + 1 + 27 + 1 characters of ROMEO make 17 sequences, one for the test; JULIET's 7 make one
    assert len(data.train) == 17 and len(data.test) == 1
    assert data.train.attributes["domain"].tolist() == [0] * 16 + [1]
    assert sorted([*data.train.ids.tolist(), *data.test.ids.tolist()]) == list(range(18))
    spoken = "".join(CHARACTERS[token] for token in data.train.labels[-1].tolist())
    assert spoken == "Ay me"
    inputs, targets = data.train.inputs, data.train.labels
    assert torch.equal(inputs[:, 1:], targets[:, :-1]) and not inputs[:, 0].any()


def test_shakespeare_is_loaded_by_name(tmp_path):
    place(tmp_path, TEXT.format("so " * 300))
    assert load("shakespeare", tmp_path).input_shape == (64,)


def test_shakespeare_keeps_the_speakers_with_the_longest_lines(tmp_path):
    place(tmp_path, TEXT.format("x" * 60))
    data = shakespeare(tmp_path, length=5, speakers=1)
    assert data.categories == {"domain": ("ROMEO",)}
    assert not data.train.attributes["domain"].any()
    with pytest.raises(ConfigError, match=r"speakers = 0 .*whole numbers from 1"):
        shakespeare(tmp_path, speakers=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Enter ROMEO\nAy\n", "begins with 'Enter ROMEO'; allowed: a speaker and a colon"),
        ("ROMEO:\n100 lines\n", "has the character '1' in the lines of ROMEO"),
    ],
)
def test_shakespeare_refuses_a_text_in_another_format(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        shakespeare(place(tmp_path, text), length=3)


def test_shakespeare_refuses_a_missing_text_or_short_length(tmp_path):
    with pytest.raises(DataError, match=r"no tinyshakespeare.txt or input.txt in .*; get it from"):
        shakespeare(tmp_path)
    with pytest.raises(ConfigError, match=r"length = 1 .*whole numbers from 2"):
        shakespeare(tmp_path, length=1)
