"""Clipped sums of torchvision's networks, repaired by the guard and otherwise as they are built.

In double precision: in single precision rounding switches ReLUs of deep networks, in a batch
another one than in a record alone, and the sums of a right way would differ by up to 3 %.
"""

import pytest
import torch
import torchvision

from helpers.record_loops import TOLERANCE, gap_to_loop
from perdure.privacy.guard import fix

NETWORKS = (
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
)
OPTIONS = {
    "googlenet": {"aux_logits": False, "init_weights": False},
}


def network(name, **options):
    """Return a network in evaluation mode, because some have random depth per record."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=3, **options)
    return fix(model).eval().double()


def pictures(records, side):
    return torch.randn(records, 3, side, side, generator=torch.Generator().manual_seed(1)).double()


# torch says so of a pooling layer that two of them use, which go record by record
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.deep(reason="full replay: fifteen whole networks, record by record")
@pytest.mark.parametrize("name", NETWORKS)
def test_sums_of_15_torchvision_networks_equal_a_record_loop(name):
    model = network(name, **OPTIONS.get(name, {}))
    assert gap_to_loop(model, pictures(3, 64)) < TOLERANCE


@pytest.mark.parametrize("per_layer", [False, True], ids=["flat", "per layer"])
def test_sums_of_a_narrow_mobilenet_equal_a_record_loop(per_layer):
    model = network("mobilenet_v2", width_mult=0.1)
    assert any(getattr(part, "inplace", False) for part in model.modules())
    assert gap_to_loop(model, pictures(3, 64), per_layer=per_layer) < TOLERANCE


def test_sums_of_a_channels_last_shufflenet_equal_a_record_loop():
    model = network("shufflenet_v2_x0_5").to(memory_format=torch.channels_last)
    x = pictures(3, 64).to(memory_format=torch.channels_last)
    assert gap_to_loop(model, x) < TOLERANCE
