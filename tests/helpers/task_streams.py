"""Two small domain-incremental experiences of every task, and a model that learns each."""

from functools import partial

import torch
from torch import nn

from perdure.data import Dataset, Experience, InputDomain, Records, Stream
from perdure.learner.learner import Learner
from perdure.models import mlp
from perdure.strategies import Naive
from perdure.tasks import MultiLabel, NextToken, Regression, SingleLabel, Task

FEATURES = 6
OUTPUTS = 4
TOKENS = 6
LENGTH = 5
ROWS = 32
TASKS: tuple[Task, ...] = (SingleLabel(), MultiLabel(), Regression(), NextToken())


class TokenModel(nn.Module):
    """Logits (n, L, TOKENS) of the next token from the present one alone."""

    feature_size = 8

    def __init__(self) -> None:
        super().__init__()
        place = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(TOKENS, 8)
        self.head = nn.Linear(8, TOKENS)
        with torch.no_grad():
            for value in self.parameters():
                value.copy_(0.5 * torch.randn(value.shape, generator=place))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.embedding(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def model_of(task: Task) -> nn.Module:
    if isinstance(task, NextToken):
        return TokenModel()
    return mlp(input_shape=(FEATURES,), num_classes=OUTPUTS, hidden=(32,), seed=0)


def sequences(index: int, rows: int, place: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens that rise by one, or fall by one in the second experience; some sequences end
    early.
    """
    start = torch.randint(TOKENS, (rows, 1), generator=place)
    whole = (start + (1 - 2 * index) * torch.arange(LENGTH + 1)) % TOKENS
    targets = whole[:, 1:].clone()
    targets[::4, -1] = NextToken().padding
    return whole[:, :-1], targets


def part(task: Task, index: int, *, test: bool) -> Records:
    rows = ROWS // 2 if test else ROWS
    seed = 2 * index + test
    place = torch.Generator().manual_seed(seed)
    ids = 1000 * seed + torch.arange(rows)
    if isinstance(task, NextToken):
        inputs, targets = sequences(index, rows, place)
        domain = InputDomain(shape=(LENGTH,), dtype=torch.int64, vocabulary=TOKENS)
    else:
        weights = torch.randn(FEATURES, OUTPUTS, generator=torch.Generator().manual_seed(7))
        inputs = torch.randn(rows, FEATURES, generator=place)
        answers = inputs @ weights.roll(index, 1)
        inputs[:, 0] += 4 * index
        domain = InputDomain(shape=(FEATURES,))
        if isinstance(task, SingleLabel):
            targets = answers.argmax(1)
        else:
            targets = (answers > 0).float() if isinstance(task, MultiLabel) else answers
    return Records(
        inputs=inputs,
        labels=targets,
        ids=ids,
        partition=f"experience-{index}",
        declared_size=rows,
        domain=domain,
        task=task,
    )


def stream_of(task: Task) -> Stream:
    width = TOKENS if isinstance(task, NextToken) else OUTPUTS
    experiences = tuple(
        Experience(
            index=index,
            train=part(task, index, test=False),
            test=part(task, index, test=True),
            classes=tuple(range(width)),
        )
        for index in range(2)
    )
    return Stream(
        name=f"{task.name} made",
        scenario="domain",
        experiences=experiences,
        num_classes=width,
        input_shape=tuple(experiences[0].train.inputs.shape[1:]),
        assigned_by_record=True,
    )


def learner_of(task: Task, strategy=None, **changes) -> Learner:
    options = {
        "model": model_of(task),
        "strategy": strategy or Naive(),
        "optimizer": partial(torch.optim.Adam, lr=0.05),
        "iterations": 30,
        "batch_size": 16,
        "seed": 3,
    }
    return Learner(**options | changes)


__all__ = ["TASKS", "Dataset", "learner_of", "model_of", "part", "stream_of"]
