"""Denormal numbers are 0 during training, and the caller's mode is restored afterwards."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from perdure.learner.learner import Learner
from perdure.strategies import Naive
from perdure.utils.denormals import flushed


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Use one thread and keep denormals, as torch does by default."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def denormal() -> float:
    return float(torch.tensor(1e-30) * 1e-10)


def test_denormal_numbers_are_0_only_inside_the_flushed_block() -> None:
    with flushed():
        assert denormal() == 0.0
    assert denormal() > 0.0


def test_the_flushed_block_ends_even_after_an_error() -> None:
    with pytest.raises(KeyError), flushed():
        raise KeyError
    assert denormal() > 0.0


def test_the_flushed_block_restores_the_mode_of_the_caller() -> None:
    torch.set_flush_denormal(True)
    with flushed():
        assert denormal() == 0.0
    assert denormal() == 0.0


def test_the_flushed_block_changes_nothing_with_several_threads() -> None:
    torch.set_num_threads(2)
    with flushed():
        assert denormal() > 0.0


def test_training_flushes_denormals_and_evaluation_does_not(toy_stream, toy_model) -> None:
    seen: dict[str, float] = {}
    learner = Learner(
        model=toy_model(toy_stream()),
        strategy=Naive(),
        optimizer=partial(torch.optim.Adam, lr=0.01),
        iterations=1,
        callbacks=[lambda point, _: seen.update({point: denormal()})],
    )
    learner.fit(toy_stream())
    assert seen["step.done"] == seen["experience.consolidated"] == 0.0
    assert seen["evaluated"] > 0.0
