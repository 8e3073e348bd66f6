"""Find the added strategy, train it without and with privacy, and check it alone and combined."""

from functools import partial

import torch

from perdure import Learner, Privacy
from perdure.data import digits, split
from perdure.models import mlp
from perdure.strategies import Combine, Replay, Tether, find, names
from perdure.testing import CHECKS, check_strategy

assert "tether" in names() and find("tether") is Tether
stream = split(digits(), scenario="class", experiences=5)
for privacy in (None, Privacy(noise_multiplier=1.0, seed=0)):
    model = mlp(input_shape=stream.input_shape, num_classes=10, hidden=(8,), seed=0)
    optimizer = partial(torch.optim.SGD, lr=0.1)
    learner = Learner(
        model=model, strategy=Tether(), optimizer=optimizer, iterations=3, privacy=privacy
    )
    assert learner.fit(stream).shape == (5, 5)
for strategy in (Tether.example(), Combine(Tether(strength=0.1), Replay(memory_size=12))):
    assert set(check_strategy(strategy).passed) == set(CHECKS)
