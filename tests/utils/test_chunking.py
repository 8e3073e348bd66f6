"""Pieces of rows, and the number of rows of one pass through a model."""

import pytest
import torch

from perdure.metrics import evaluate
from perdure.tasks import SingleLabel
from perdure.utils.chunking import by_pieces, rows_per_pass


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((5000, 64), 2048), ((5000, 3, 32, 32), 85), ((40, 3, 224, 224), 32), ((0, 3), 2048)],
    ids=["small rows", "CIFAR-10", "large rows", "no rows"],
)
def test_a_pass_has_fewer_rows_when_rows_are_large(shape, rows):
    assert rows_per_pass(torch.zeros(1).expand(shape)) == rows


def test_passes_cover_all_rows_in_order():
    passed = []
    inputs = torch.arange(200 * 3072.0).view(200, 3072)

    def answer(rows):
        passed.append(len(rows))
        return rows[:, :1]

    assert torch.equal(by_pieces(answer, inputs), inputs[:, :1])
    assert passed == [85, 85, 30]


def test_an_evaluation_passes_large_rows_in_pieces():
    passed = []

    def predict(rows):
        passed.append(len(rows))
        return torch.nn.functional.one_hot(rows[:, 0].long() % 2, 2).float()

    inputs = torch.arange(200.0)[:, None].expand(200, 3072)
    labels = torch.arange(200) % 2
    labels[:50] = 1 - labels[:50]
    assert evaluate(SingleLabel(), predict, inputs, labels) == 75.0
    assert passed == [85, 85, 30]
    assert evaluate(SingleLabel(), predict, inputs, labels, 200) == 75.0
    assert passed[3:] == [200]
