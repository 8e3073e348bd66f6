"""Find the added data set by name, train on it, and name it in a config."""

from functools import partial

import torch

from perdure import Learner
from perdure.data import split
from perdure.data.datasets import find, load, names
from perdure.experiment import parse
from perdure.models import mlp
from perdure.strategies import Naive

assert "rings" in names() and find("rings").__name__ == "rings"
stream = split(load("rings", seed=1), scenario="class", experiences=2)
model = mlp(input_shape=stream.input_shape, num_classes=4, hidden=(8,), seed=0)
learner = Learner(
    model=model, strategy=Naive(), optimizer=partial(torch.optim.SGD, lr=0.1), iterations=3
)
assert learner.fit(stream).shape == (2, 2)
CONFIG = """
name = "rings"
[data]
name = "rings"
experiences = 2
[[arms]]
strategy = "naive"
"""
assert parse(CONFIG).data.name == "rings"
