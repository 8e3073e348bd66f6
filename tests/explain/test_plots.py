import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
import torch

from perdure.errors import ConfigError
from perdure.explain import heat_maps

MOMENTS = ("after the first experience", "after the last")


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(3, 8, 8, generator=generator)
    rows = [(label, torch.randn(3, 8, 8, generator=generator)) for label in MOMENTS]
    return inputs, rows, ["a 3", "a 5", "an 8"]


def panels(figure):
    """Return the axes with a picture, without the colour bar, in order."""
    return [axis for axis in figure.axes if axis.images]


def test_heat_maps_show_inputs_and_one_row_per_moment(pictures):
    inputs, rows, titles = pictures
    axes = panels(heat_maps(*pictures))
    assert len(axes) == 9
    assert [axis.get_title() for axis in axes[:3]] == titles
    shown = [axis.images[0].get_array() for axis in axes]
    expected = [*inputs, *rows[0][1], *rows[1][1]]
    for got, values in zip(shown, expected, strict=True):
        assert np.allclose(got, values.numpy())
    labels = [axes[3].get_ylabel(), axes[6].get_ylabel()]
    assert tuple(label.replace("\n", " ") for label in labels) == MOMENTS


def test_heat_map_colours_centre_at_0_with_one_scale_per_column(pictures):
    _, rows, _ = pictures
    rows[1][1][2] *= 10
    axes = panels(heat_maps(*pictures))
    for column in range(3):
        largest = max(values[column].abs().max().item() for _, values in rows)
        for row in (1, 2):
            low, high = axes[3 * row + column].images[0].get_clim()
            assert (low, high) == (-high, pytest.approx(largest))
            red, _, blue, _ = axes[3 * row + column].images[0].to_rgba(np.array([[high]]))[0, 0]
            assert red > blue


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_heat_maps_show_rgb_inputs_and_summed_attributions(channels):
    generator = torch.Generator().manual_seed(0)
    inputs, values = torch.rand(2, 2, channels, 5, 4, generator=generator)
    axes = panels(heat_maps(inputs, [("now", values)], ["a", "b"]))
    expected = inputs.permute(0, 2, 3, 1) if channels == 3 else inputs.mean(1)
    assert np.allclose(axes[1].images[0].get_array(), expected[1].numpy(), atol=1e-6)
    assert np.allclose(axes[3].images[0].get_array(), values[1].sum(0).numpy(), atol=1e-6)


def test_heat_maps_of_zero_attributions_can_be_drawn(pictures):
    inputs, rows, titles = pictures
    figure = heat_maps(
        inputs, [(label, torch.zeros_like(values)) for label, values in rows], titles
    )
    figure.savefig(BytesIO(), format="png", dpi=40)
    colour = panels(figure)[3].images[0].to_rgba(np.zeros((1, 1)))[0, 0, :3]
    assert colour.min() > 0.95


def test_heat_map_labels_stay_inside_the_figure(pictures):
    figure = heat_maps(*pictures)
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    renderer = figure.canvas.get_renderer()
    for text in (text for axis in figure.axes for text in (axis.title, axis.yaxis.label)):
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        page = BytesIO()
        figure.savefig(page, format=kind)
        assert page.getvalue().startswith(start)


@pytest.mark.deep(reason="deployment: a fresh process that loads a library where it is used")
def test_heat_maps_load_matplotlib_only_when_drawn():
    code = (
        "import sys, torch; from perdure.explain import heat_maps; x = torch.rand(2, 4, 4); "
        "print({'matplotlib', 'shap', 'lime', 'sklearn'} & set(sys.modules)); "
        "heat_maps(x, [('now', x)], ['a', 'b']).canvas.draw(); "
        "print({'matplotlib', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["set()", "{'matplotlib'}"]


@pytest.mark.parametrize(
    "change, field",
    [
        ({"inputs": torch.rand(3, 64)}, "inputs.shape"),
        ({"rows": []}, "rows"),
        ({"rows": [("now", torch.rand(2, 8, 8))]}, "rows"),
        ({"titles": ["a"]}, "titles"),
    ],
)
def test_heat_maps_refuse_an_invalid_argument_and_name_it(pictures, change, field):
    given = dict(zip(("inputs", "rows", "titles"), pictures, strict=True)) | change
    with pytest.raises(ConfigError, match=f"^{field}"):
        heat_maps(**given)
