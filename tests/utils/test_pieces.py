import pytest
import torch

from perdure.utils.pieces import PIECE, pieces


@pytest.mark.parametrize("shape", [(), (7,), (PIECE,), (3, PIECE // 2), (PIECE + 1,)])
def test_pieces_cover_every_number_of_a_tensor_once(shape):
    counts = torch.zeros(shape)
    other = torch.rand(shape)
    sizes = []
    for piece, beside in pieces(counts, other):
        piece.add_(1 + beside)
        sizes.append(piece.numel())
    torch.testing.assert_close(counts, 1 + other)
    assert max(sizes) <= PIECE or len(sizes) == 1
    assert len(sizes) == -(-max(1, counts.numel()) // PIECE)


def test_a_tensor_without_a_flat_view_is_one_piece():
    turned = torch.zeros(400, 300).T
    ((piece, _),) = pieces(turned, torch.zeros(300, 400))
    piece.add_(1)
    assert bool((turned == 1).all())
