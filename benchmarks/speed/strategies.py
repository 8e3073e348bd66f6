"""Step time of every strategy relative to Naive's, with the passes that its mathematics needs.

Class-incremental, five experiences of 2,000 random records of 784 numbers, an MLP 2 x 400, SGD,
batches of 128, one thread. Both learners train the same model in the same experience in turn, a
block of steps each; counted is processor time, and a row is the median over the blocks' ratios.
Steps are timed in the second experience, where every teacher, memory and penalty is in use, and
where a row says so in the first.

`forward` and `backward` are passes over one batch of new rows that the mathematics of the method
needs in a step; Naive needs one of each, and one backward pass costs two forward ones. `passes` is
the ratio that follows; what is above it is arithmetic on parameters, and overhead.

NCM, SLDA and RanPAC take no gradient, so they have no step. `herding` is the time that a memory of
200 records takes to choose them by herding out of 2,000 records with 400 features, over that of a
random choice; `ratio` does not apply to it.

    python benchmarks/speed/strategies.py --repeats 15
    python benchmarks/speed/strategies.py mir herding
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from perdure import Experience, Learner, Records, Strategy, Stream
from perdure.models import adapted, composed, generative, mlp, prompted, tiny
from perdure.strategies import (
    AGEM,
    DER,
    ERACE,
    EWC,
    GEM,
    L2,
    L2P,
    LUCIR,
    MAS,
    MIR,
    OGD,
    SI,
    AttributionDistillation,
    BiC,
    CODAPrompt,
    CWRStar,
    FeatureDistillation,
    FedProx,
    GDumb,
    GenerativeReplay,
    ICaRL,
    Joint,
    LoRA,
    LwF,
    Naive,
    PackNet,
    Replay,
    RWalk,
)
from perdure.utils import store_rows

BATCH = 128
MEMORY = 1000
RECORDS = 2000
EXPERIENCES = 5
CLASSES = 10
INPUT = (1, 28, 28)
HIDDEN = (400, 400)
STEPS = 8
"""Number of steps in one block, after which the other learner takes its turn."""
WARM = 4
HERDED = 200
FEATURES = 400

Row = dict[str, object]


def perceptron() -> nn.Module:
    """Make a multilayer perceptron, the model of most rows."""
    return mlp(input_shape=INPUT, num_classes=CLASSES, hidden=HIDDEN, seed=0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Strategy to be timed, with the passes that a step of it needs.

    Args:
        strategy: the strategy to be timed.
        forward: number of forward passes over one batch of new rows.
        backward: number of backward passes over one batch of new rows.
        experience: index of the experience whose steps are timed.
        model: function that makes the model for both strategies.
    """

    strategy: Strategy
    forward: float = 1
    backward: float = 1
    experience: int = 1
    model: Callable[[], nn.Module] = perceptron

    @property
    def passes(self) -> float:
        """Ratio to Naive that follows from the numbers of passes alone."""
        return (self.forward + 2 * self.backward) / 3


def generator() -> nn.Module:
    """Make a classifier together with a generator."""
    return generative(
        mlp(input_shape=INPUT, num_classes=CLASSES, hidden=HIDDEN, seed=0),
        input_shape=INPUT,
        latent=20,
        hidden=HIDDEN,
        seed=0,
    )


def pooled_prompts() -> nn.Module:
    """Make a frozen transformer with a pool of prompts."""
    return prompted(tiny(INPUT), num_classes=CLASSES, pool=10, length=2, chosen=3)


def composed_prompts() -> nn.Module:
    """Make a frozen transformer with components of prompts for every experience."""
    return composed(
        tiny(INPUT), num_classes=CLASSES, experiences=EXPERIENCES, components=2, length=2
    )


def adapters() -> nn.Module:
    """Make a frozen transformer with adapters for every experience."""
    return adapted(tiny(INPUT), num_classes=CLASSES, experiences=EXPERIENCES, rank=2)


# MIR: the new rows, whose gradient also makes the virtual step, two looks at the candidates, and
# the chosen rows.
CANDIDATES = 50
CHOSEN = 10
CASES: dict[str, Case] = {
    "naive": Case(strategy=Naive()),
    "agem": Case(strategy=AGEM(memory_size=MEMORY), forward=2, backward=2),
    # the rows, and the rows without each of nine groups, for the model and the teacher
    "attribution_distillation": Case(strategy=AttributionDistillation(), forward=20, backward=10),
    "bic": Case(strategy=BiC(memory_size=MEMORY), forward=2),
    "coda_prompt": Case(strategy=CODAPrompt(), model=composed_prompts),
    "cwr_star": Case(strategy=CWRStar(), backward=0),
    "cwr_star_first": Case(strategy=CWRStar(), experience=0),
    "der": Case(strategy=DER(memory_size=MEMORY, beta=0.5), forward=3, backward=2),
    "er_ace": Case(strategy=ERACE(memory_size=MEMORY), forward=2, backward=2),
    "ewc": Case(strategy=EWC(strength=100.0, fisher="empirical")),
    "feature_distillation": Case(strategy=FeatureDistillation(strength=1.0), forward=2),
    "fed_prox": Case(strategy=FedProx(strength=0.1)),
    "gdumb": Case(strategy=GDumb(memory_size=MEMORY)),
    "gem": Case(strategy=GEM(memory_size=MEMORY), forward=2, backward=2),
    "generative_replay": Case(
        # of every row the classifier, encoder and decoder, each as large; made-up rows come from
        # the teacher's decoder and classifier on top. Naive trains the classifier alone.
        strategy=GenerativeReplay(temperature=2.0),
        forward=8,
        backward=6,
        model=generator,
    ),
    "icarl": Case(strategy=ICaRL(memory_size=MEMORY), forward=2),
    "joint": Case(strategy=Joint()),
    "l2": Case(strategy=L2(strength=0.1)),
    "l2p": Case(strategy=L2P(), model=pooled_prompts),
    "lora": Case(strategy=LoRA(), model=adapters),
    "lucir": Case(
        strategy=LUCIR(memory_size=MEMORY),
        forward=2,
        model=partial(
            mlp,
            input_shape=INPUT,
            num_classes=CLASSES,
            hidden=HIDDEN,
            seed=0,
            activation="tanh",
            head="cosine",
        ),
    ),
    "lwf": Case(strategy=LwF(), forward=2),
    "mas": Case(strategy=MAS(strength=1.0)),
    "mir": Case(
        strategy=MIR(memory_size=MEMORY, candidates=CANDIDATES, batch_size=CHOSEN),
        forward=1 + (2 * CANDIDATES + CHOSEN) / BATCH,
        backward=1 + CHOSEN / BATCH,
    ),
    "ogd": Case(strategy=OGD()),
    "ogd_first": Case(strategy=OGD(), experience=0),
    "packnet": Case(strategy=PackNet()),
    "replay": Case(strategy=Replay(memory_size=MEMORY), forward=2, backward=2),
    "rwalk": Case(strategy=RWalk(strength=1.0)),
    "rwalk_first": Case(strategy=RWalk(strength=1.0), experience=0),
    "si": Case(strategy=SI(strength=1.0)),
}


def stream_of(features: tuple[int, ...], records: int, classes: int) -> Stream:
    """Make a stream of random records whose classes arrive over equally large experiences."""
    rng = torch.Generator().manual_seed(0)
    parts = []
    each = classes // EXPERIENCES or 1
    for index in range(min(EXPERIENCES, classes)):
        labels = index * each + torch.arange(records) % each
        rows = Records(
            inputs=torch.rand(records, *features, generator=rng),
            labels=labels,
            ids=index * records + torch.arange(records),
            partition=f"experience {index}",
        )
        own = tuple(range(index * each, (index + 1) * each))
        few = rows.take(torch.arange(each))
        parts.append(Experience(index=index, train=rows, test=few, classes=own))
    return Stream(
        name="random",
        scenario="class",
        experiences=tuple(parts),
        num_classes=classes,
        input_shape=features,
    )


def learner_in(stream: Stream, case: Case, strategy: Strategy) -> Learner:
    """Make a learner that has opened the timed experience and taken its first steps."""
    learner = Learner(
        model=case.model(),
        strategy=strategy,
        optimizer=partial(torch.optim.SGD, lr=1e-3),
        iterations=10**6,
        batch_size=BATCH,
    )
    learner.prepare(stream)
    for index in range(case.experience):
        learner.begin(index)
        learner.train(range(STEPS))
        learner.finish()
    learner.begin(case.experience)
    learner.train(range(WARM))
    return learner


def measure(stream: Stream, name: str, repeats: int) -> Row:
    """Return the median of the ratios of two blocks that are run one after the other."""
    case = CASES[name]
    pair = [learner_in(stream, case, strategy) for strategy in (case.strategy, Naive())]
    blocks = [range(start, start + STEPS) for start in range(WARM, WARM + repeats * STEPS, STEPS)]
    times = [[seconds(partial(one.train, block)) for one in pair] for block in blocks]
    ratios = [mine / naive for mine, naive in times]
    return {
        "benchmark": "strategies",
        "strategy": name,
        "experience": case.experience,
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "passes": case.passes,
        "forward": case.forward,
        "backward": case.backward,
        "milliseconds": 1e3 * statistics.median(time[0] for time in times) / STEPS,
        "naive_milliseconds": 1e3 * statistics.median(time[1] for time in times) / STEPS,
        "repeats": repeats,
    }


def seconds(run: Callable[[], object]) -> float:
    """Measure the processor time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def herding(repeats: int) -> Row:
    """Time the choice of 200 of 2,000 records by herding, and by chance.

    The model has no body, so that its features are the records.
    """
    stream = stream_of((FEATURES,), RECORDS, EXPERIENCES)  # one class in each experience
    model = partial(mlp, input_shape=(FEATURES,), num_classes=EXPERIENCES, hidden=(), seed=0)
    times = []
    for _ in range(repeats):
        pair = []
        for selection in ("herding", "class-balanced"):
            replay = Replay(memory_size=HERDED, selection=selection)
            case = Case(strategy=replay, experience=0, model=model)
            pair.append(seconds(learner_in(stream, case, replay).finish))
        times.append(pair)
    over = [herded - by_chance for herded, by_chance in times]
    return {
        "benchmark": "strategies",
        "strategy": "herding",
        "experience": 0,
        "ratio": None,
        "lowest": None,
        "highest": None,
        "passes": None,
        "forward": None,
        "backward": None,
        "milliseconds": 1e3 * statistics.median(over),
        "naive_milliseconds": 1e3 * statistics.median(time[1] for time in times),
        "repeats": repeats,
    }


def show(rows: list[Row]) -> None:
    """Print the rows as a table."""
    table = Table(title="step time of a strategy / Naive's (median, lowest, highest)")
    for column in list(rows[0])[1:]:
        table.add_column(column.replace("_", " "))
    for entry in rows:
        cells = list(entry.values())[1:]
        table.add_row(
            *["-" if c is None else f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells]
        )
    Console(width=150).print(table)


def main() -> None:
    """Time every strategy and Naive in turn, and print the median ratio."""
    names = [*CASES, "herding"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", choices=[*names, []], help="of these alone")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="store the rows in this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    stream = stream_of(INPUT, RECORDS, CLASSES)
    rows = [
        herding(min(args.repeats, 5)) if name == "herding" else measure(stream, name, args.repeats)
        for name in args.rows or names
    ]
    show(rows)
    if args.json:
        store_rows(args.json, rows, seed=0)


if __name__ == "__main__":
    main()
