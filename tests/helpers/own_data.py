"""Small data and a model that a config names as "helpers.own_data:NAME"."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from perdure.data import Dataset, Records
from perdure.tasks import MultiLabel, NextToken, Regression, SingleLabel

ROWS = 48
TEST = 24


def _data(name, inputs, targets, task, num_classes):
    """Records with a time and a domain; the last ones are for the test."""
    numbers = torch.arange(len(inputs))
    attributes = {"time": numbers % 8 / 1.0, "domain": numbers % 2}
    train, test = (
        Records(
            inputs=inputs[rows],
            labels=targets[rows],
            ids=numbers[rows],
            partition=partition,
            task=task,
            attributes={key: values[rows] for key, values in attributes.items()},
        )
        for partition, rows in ((name, slice(None, -TEST)), (f"{name}-test", slice(-TEST, None)))
    )
    return Dataset(
        name=name,
        train=train,
        test=test,
        num_classes=num_classes,
        input_shape=tuple(inputs.shape[1:]),
        categories={"domain": ("left", "right")},
    )


def _numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def blobs(seed=0, *, spread: float = 0.3):
    """Four classes of pictures (1, 2, 2), each around a corner of its own."""
    labels = torch.arange(ROWS + TEST) % 4
    centres = 2 * torch.eye(4)[labels].view(-1, 1, 2, 2)
    inputs = centres + spread * _numbers(len(labels), 1, 2, 2)
    return _data("blobs", inputs, labels, SingleLabel(), 4)


def with_nan():
    """Records of which one has a value that is not finite."""
    data = blobs()
    inputs = data.train.inputs.clone()
    inputs[3, 0] = float("nan")
    return replace(data, train=replace(data.train, inputs=inputs))


def other_blobs():
    """The same classes with other noise, from another source."""
    return blobs(spread=0.4)


def moods():
    """Texts of five tokens that begin with 1; the class is that of the token at place 2."""
    inputs = torch.randint(2, 9, (ROWS + TEST, 5), generator=torch.Generator().manual_seed(0))
    inputs[:, 0] = 1
    return _data("moods", inputs, inputs[:, 2] % 4, SingleLabel(), 4)


def prices():
    """Numbers to predict."""
    inputs = _numbers(ROWS + TEST, 3)
    return _data("prices", inputs, inputs.sum(1, keepdim=True), Regression(), 1)


def tags():
    """Three labels, of which a record may have any."""
    inputs = _numbers(ROWS + TEST, 3)
    return _data("tags", inputs, (inputs > 0).float(), MultiLabel(), 3)


def words():
    """Sequences of five tokens."""
    targets = torch.arange(ROWS + TEST)[:, None].add(torch.arange(4)) % 5
    inputs = nn.functional.pad(targets[:, :-1], (1, 0))
    return _data("words", inputs, targets, NextToken(), 5)


class Net(nn.Module):
    """A model of one's own."""

    def __init__(self, input_shape, num_classes, hidden: int = 4):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(input_shape[0], hidden), nn.Tanh())
        self.head = nn.Linear(hidden, num_classes)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.features(x))


def no_model(num_classes):
    """A function that returns no model."""
    return num_classes


def wards(root=None):
    """The same classes; a folder with a file `ward` is a site, which has its own domain alone.

    Without one it is the server, which has the public test records and one invented record.
    """
    data = blobs()
    path = Path(root or ".") / "ward"
    train = data.train
    if path.exists():
        mine = train.take(train.attributes["domain"] == int(path.read_text()))
    else:
        mine = train.take(slice(0, 1)).map(torch.zeros_like)
    return replace(data, name="wards", train=mine)
