"""Pictures of streams, drawn from declared facts only."""

from dataclasses import replace

import numpy as np
import pytest

from perdure.data import blurry, online, permuted, plot_stream, split


def drawn(stream):
    """Return sizes and shades of the picture as arrays."""
    top, below = plot_stream(stream).axes
    (stairs,) = top.patches
    (mesh,) = below.collections
    return stairs.get_data().values, np.ma.filled(mesh.get_array(), np.nan)


@pytest.mark.parametrize(
    "build",
    [
        lambda data: split(data, scenario="class", increments=(2, 1, 1)),
        lambda data: permuted(data, experiences=3),
        lambda data: blurry(data, experiences=2),
        lambda data: online(split(data, scenario="class", experiences=2), chunk=5),
    ],
)
def test_a_stream_picture_shows_classes_and_declared_sizes(toy_data, build):
    stream = build(toy_data)
    sizes, shades = drawn(stream)
    assert sizes.tolist() == [each.train.declared_size for each in stream]
    for index, each in enumerate(stream):
        shown = np.flatnonzero(~np.isnan(shades[:, index]))
        assert shown.tolist() == sorted(each.classes)
        assert np.nansum(shades[:, index]) == pytest.approx(each.train.declared_size)


def test_a_stream_picture_does_not_depend_on_the_records(toy_data):
    stream = split(toy_data, scenario="class", experiences=2, declared_size=30)
    fewer = (replace(each, train=each.train.take(each.train.ids % 3 > 0)) for each in stream)
    rest = tuple(replace(each, train=each.train.declared(30)) for each in fewer)
    assert len(rest[0].train) < len(stream[0].train)
    for mine, theirs in zip(drawn(stream), drawn(replace(stream, experiences=rest)), strict=True):
        np.testing.assert_array_equal(mine, theirs)
