"""Find the added attack, and compare it with FGSM, which is the strongest on this loss."""

import torch

from perdure.adversarial import FGSM, RandomPoint, find, names

assert "random_point" in names() and find("random_point") is RandomPoint
inputs = torch.full((5, 3), 0.5)


def losses(x):
    """Squared lengths (n,)."""
    return x.square().sum(1)


moved = RandomPoint(epsilon=0.1, points=8).perturb(losses, inputs)
assert (losses(moved) >= losses(inputs)).all() and (moved - inputs).abs().max() <= 0.1 + 1e-6
assert (losses(moved) <= losses(FGSM(epsilon=0.1).perturb(losses, inputs))).all()
