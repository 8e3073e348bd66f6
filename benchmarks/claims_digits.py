"""Claims on scikit-learn's digits, most of them for methods that need a special model.

See `claims.py`.

Prompts and adapters stand on a small vision transformer, pre-trained here on MNIST, which is taken
for public: its first 20,000 training images at 8 x 8 pixels, in four quarter turns, to tell the
digit and the turn.
"""

import copy
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from comparison import PAPER, Arm, Claim
from torch import Tensor, nn
from torch.optim import SGD

from perdure import Batch, Context, Forward, State, Strategy, Stream
from perdure.contract import cross_entropy_of
from perdure.data import digits, mnist, rotated, split
from perdure.models import (
    Classifier,
    Transformer,
    adapted,
    composed,
    frozen,
    generative,
    mlp,
    prompted,
    transformer,
)
from perdure.strategies import (
    L2P,
    LUCIR,
    OGD,
    CODAPrompt,
    GenerativeReplay,
    ICaRL,
    LoRA,
    LwF,
    Naive,
    Replay,
)
from perdure.tasks import MASKED
from perdure.utils import seeded

ADAM = partial(torch.optim.Adam, lr=3e-3, fused=True)
LONG = {"iterations": 200, "batch_size": 64}
SHORT = {"iterations": 100, "batch_size": 32, "reset_optimizer": True}
IMAGES = 20_000
STEPS = 1000
BATCH = 128
TURNS = 4
"""Angles of the quarter turns in the pre-training."""


def split_digits(seed: int, *, experiences: int) -> Stream:
    """Split the digits into experiences, in an order that the seed decides."""
    return split(digits(), scenario="class", experiences=experiences, seed=seed)


def turned(_: int) -> Stream:
    """Rotate all digits by one of four angles per experience, in an order that the seed decides."""
    return rotated(digits(), angles=(0.0, 15.0, 30.0, 45.0))


FIVE = partial(split_digits, experiences=5)
TWO = partial(split_digits, experiences=2)


def perceptron(stream: Stream, seed: int, *, cosine: bool = False) -> Classifier:
    """Make a perceptron with 100 hidden units and a linear or cosine head."""
    return mlp(
        input_shape=stream.input_shape,
        num_classes=stream.num_classes,
        hidden=(100,),
        seed=seed,
        head="cosine" if cosine else "linear",
    )


def with_generator(stream: Stream, seed: int) -> nn.Module:
    """Make the perceptron together with a generator."""
    shape = stream.input_shape
    return generative(
        perceptron(stream, seed), input_shape=shape, latent=20, hidden=(100,), seed=seed
    )


# ------------------------------------------------------------------------ a pre-trained transformer


@cache
def pretrained() -> Transformer:
    """Pre-train the transformer body; the result is the same in every process."""
    train = mnist().train
    places = torch.Generator().manual_seed(0)
    x = F.avg_pool2d(F.pad(train.inputs[:IMAGES], (2, 2, 2, 2)), 4)
    y = train.labels[:IMAGES]
    model = transformer(
        input_shape=(1, 8, 8), num_classes=10 * TURNS, seed=0, patch=4, width=48, depth=3, heads=4
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    for step in range(STEPS):
        rows = torch.randint(IMAGES, (BATCH,), generator=places)
        turn = step % TURNS
        loss = F.cross_entropy(model(x[rows].rot90(turn, (2, 3))), y[rows] + 10 * turn)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        scheduler.step()
    body = model.body
    assert isinstance(body, Transformer)
    return body


def opened(stream: Stream, seed: int) -> nn.Module:
    """Make the transformer with all parameters trained."""
    with seeded(seed):
        body = copy.deepcopy(pretrained())
        return Classifier(body, body.width, stream.num_classes)


def closed(stream: Stream, seed: int) -> nn.Module:
    """Make the frozen transformer with a trained head."""
    return frozen(
        pretrained(), input_shape=stream.input_shape, num_classes=stream.num_classes, seed=seed
    )


def with_pool(stream: Stream, seed: int) -> nn.Module:
    """Make the frozen transformer with a pool of prompts."""
    return prompted(
        pretrained(), num_classes=stream.num_classes, pool=10, length=2, chosen=3, seed=seed
    )


def with_components(stream: Stream, seed: int) -> nn.Module:
    """Make the frozen transformer with components of prompts for every experience."""
    return composed(
        pretrained(),
        num_classes=stream.num_classes,
        experiences=len(stream),
        components=4,
        length=2,
        seed=seed,
    )


def with_adapters(stream: Stream, seed: int, *, one: bool = False) -> nn.Module:
    """Make the frozen transformer with adapters for every experience, or with one set for all."""
    sets = 1 if one else len(stream)
    return adapted(
        pretrained(), num_classes=stream.num_classes, experiences=sets, rank=4, seed=seed
    )


@dataclass(frozen=True, kw_only=True)
class OwnClasses(Strategy):
    """Fine-tuning with the loss of L2P, CODA-Prompt and LoRA: over the experience's classes."""

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """Compute the (n,) cross entropy of each row."""
        own = context.task_classes[batch.tasks]
        return cross_entropy_of(torch.where(own, forward(batch.inputs), MASKED), batch.labels)


# --------------------------------------------------------------------------- the claims


def replayed(name: str, *, cosine: bool = False) -> Arm:
    """Make a rehearsal strategy with the small memory of LUCIR and equal weights of all rows."""
    model = partial(perceptron, cosine=cosine)
    return Arm(
        name=name,
        strategy=partial(Replay, memory_size=30, weighting="equal"),
        model=model,
        optimizer=ADAM,
    )


TUNED = Arm(name="fine-tuned", strategy=OwnClasses, model=opened, optimizer=ADAM)
POOL = Arm(name="l2p", strategy=partial(L2P, strength=0.5), model=with_pool, optimizer=ADAM)
HALVES = (
    "two experiences of five digits, after five of two had been seen: there no two pairs are "
    "ever told apart"
)

DIGITS = (
    Claim(
        name="ogd",
        sentence="Stepping only where earlier answers stay "
        "forgets less than plain gradient descent",
        paper="Farajtabar et al. 2020 (AISTATS)",
        stream=turned,
        training={"epochs": 3, "batch_size": 10},
        arms=(
            Arm(name="ogd", strategy=partial(OGD, directions=50), optimizer=partial(SGD, lr=0.05)),
            Arm(name="naive", strategy=Naive, optimizer=partial(SGD, lr=0.05)),
        ),
        note="rate, length and angles were set after single seeds had been seen; on permuted "
        "digits the first task is "
        "not kept better, and where classes arrive it does not help",
        measures=("forgetting", "average_accuracy"),
    ),
    Claim(
        name="generative_replay",
        sentence="Rehearsing what a generator makes up learns classes without stored records",
        paper="Shin et al. 2017 (NeurIPS)",
        stream=FIVE,
        training=LONG,
        arms=(
            Arm(
                name="generative_replay",
                strategy=GenerativeReplay,
                model=with_generator,
                optimizer=ADAM,
            ),
            Arm(name="naive", strategy=Naive, model=perceptron, optimizer=ADAM),
            Arm(name="lwf", strategy=LwF, model=perceptron, optimizer=ADAM),
            Arm(
                name="replay",
                strategy=partial(Replay, memory_size=100),
                model=perceptron,
                optimizer=ADAM,
                beside=True,
            ),
        ),
        note="length and rate were set after two seeds had been seen",
    ),
    Claim(
        name="lucir",
        sentence="Angles, held features and a margin keep off the bias to new classes with little "
        "memory",
        paper="Hou et al. 2019 (CVPR)",
        stream=FIVE,
        training=LONG,
        arms=(
            Arm(
                name="lucir",
                strategy=partial(LUCIR, memory_size=30),
                model=partial(perceptron, cosine=True),
                optimizer=ADAM,
                chosen=PAPER,
            ),
            replayed("replay"),
            replayed("replay, cosine head", cosine=True),
            Arm(
                name="icarl",
                strategy=partial(ICaRL, memory_size=30),
                model=perceptron,
                optimizer=ADAM,
                beside=True,
            ),
        ),
        measures=("anytime_accuracy", "average_accuracy", "old_and_new_apart"),
    ),
    Claim(
        name="l2p",
        sentence="Prompts on a frozen transformer forget less than fine-tuning it",
        paper="Wang et al. 2022 (CVPR)",
        stream=TWO,
        training=SHORT,
        arms=(
            POOL,
            TUNED,
            Arm(name="head only", strategy=OwnClasses, model=closed, optimizer=ADAM, beside=True),
        ),
        note=HALVES,
        measures=("forgetting", "average_accuracy"),
    ),
    Claim(
        name="coda_prompt",
        sentence="Weighted sums of components, earlier ones frozen, are above a pool of prompts",
        paper="Smith et al. 2023 (CVPR)",
        stream=TWO,
        training=SHORT,
        arms=(
            Arm(
                name="coda_prompt",
                strategy=partial(CODAPrompt, strength=0.1),
                model=with_components,
                optimizer=ADAM,
            ),
            POOL,
        ),
        note=HALVES,
    ),
    Claim(
        name="lora",
        sentence="Adapters orthogonal to the earlier ones forget "
        "less than one set trained in sequence",
        paper="Wang et al. 2023 (Findings of EMNLP), O-LoRA",
        stream=TWO,
        training=SHORT,
        arms=(
            Arm(
                name="o-lora",
                strategy=partial(LoRA, strength=0.5),
                model=with_adapters,
                optimizer=ADAM,
            ),
            Arm(
                name="one lora",
                strategy=OwnClasses,
                model=partial(with_adapters, one=True),
                optimizer=ADAM,
            ),
            Arm(
                name="lora, no penalty",
                strategy=partial(LoRA, strength=0.0),
                model=with_adapters,
                optimizer=ADAM,
                beside=True,
            ),
        ),
        note=HALVES,
        measures=("forgetting", "average_accuracy"),
    ),
)
